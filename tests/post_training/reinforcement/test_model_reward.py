"""A reward model as the source of rewards."""

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.data.tokenizers.facts import TEMPLATE_FILE
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import CHATML, ChatTemplate
from flax_transformers.post_training.conversations import conversation
from flax_transformers.post_training.reinforcement.model_reward import ModelReward
from flax_transformers.post_training.reinforcement.rewards import checked_scores
from flax_transformers.restore import converted_meta
from flax_transformers.testing import tiny_model
from tests.cli.test_generate import WORDS, tokenizer_with_added_padding

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

# Of two lengths: the expected values are computed without padding.
PROMPTS, COMPLETIONS = ["2+2=", "3+4=", "1+1="], ["4", "seven", "2"]
BYTES = ByteTokenizer()


def saved(folder, labels, template=None, tokenizer=BYTES, vocab_size=262):
    """A classifier as ``convert`` saves it."""
    sizes = {"vocab_size": vocab_size, "num_labels": labels, "max_positions": 100, "init_std": 0.2}
    model, params = tiny_model("LlamaForSequenceClassification", **sizes)
    tokenizer.save(folder / "tokenizer")
    files = {f"tokenizer/{f.name}": f.read_bytes() for f in (folder / "tokenizer").iterdir()}
    if template is not None:
        files[f"tokenizer/{TEMPLATE_FILE}"] = template.encode()
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, converted_meta(model.config), files)
    checkpoints.close()
    return folder, model, params


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("plain"), labels=1)


@pytest.fixture(scope="module")
def of_messages(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("messages"), labels=1, template=CHATML)


def test_a_reward_is_the_logit_at_the_last_token(plain):
    folder, model, params = plain
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    reward = ModelReward(path=str(folder), batch_size=2)
    found = checked_scores(reward, reward.scorer(mesh), PROMPTS, COMPLETIONS, [{}] * 3)
    apply = jax.jit(model.apply)
    for prompt, completion, value in zip(PROMPTS, COMPLETIONS, found, strict=True):
        ids = np.array([[*ByteTokenizer().encode_prompt(prompt + completion), 1]])
        logits = apply({"params": params}, ids, np.ones_like(ids)).logits
        np.testing.assert_allclose(value, logits[0, 0], rtol=1e-4)
    assert len(set(found)) == 3


def test_a_padding_token_that_the_model_lacks_changes_nothing(tmp_path):
    tokenizer_with_added_padding(tmp_path / "words")
    words = load_tokenizer(tmp_path / "words")
    saved(tmp_path, labels=1, tokenizer=words, vocab_size=len(WORDS))
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    scorer = ModelReward(path=str(tmp_path), batch_size=2).scorer(mesh)
    prompts, completions = ["a ", "b c "], ["d", "e d c a"]
    together = scorer(prompts, completions, [{}] * 2)
    alone = [scorer([p], [c], [{}])[0] for p, c in zip(prompts, completions, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_messages_are_scored_in_the_form_they_were_trained_in(of_messages):
    folder, model, params = of_messages
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    (found,) = ModelReward(path=str(folder), messages=True).scorer(mesh)(["2+2="], ["4"], [{}])
    turns = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    document = conversation({"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]})
    ids = encode(document, ChatTemplate(), ByteTokenizer())[0][0][None]
    logits = jax.jit(model.apply)({"params": params}, ids, np.ones_like(ids)).logits
    np.testing.assert_allclose(found, logits[0, 0], rtol=1e-4)


def test_a_prompt_that_the_template_has_rendered_is_not_rendered_again(of_messages):
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    scorer = ModelReward(path=str(of_messages[0]), messages=True).scorer(mesh)
    asked = [{"role": "user", "content": "2+2="}]
    rendered = ChatTemplate().render(asked, answer_next=True)
    prompts = ["2+2=", rendered, rendered.strip()]
    found = scorer(prompts, ["4"] * 3, [{}] * 3)
    assert found[0] == found[1] == found[2]


def test_a_template_leaves_open_what_a_reward_model_was_trained_on(of_messages):
    path = str(of_messages[0])
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="has a chat template; set messages of ModelReward"):
        ModelReward(path=path).scorer(mesh)
    assert ModelReward(path=path, messages=False).scorer(mesh)(["2"], ["4"], [{}])


def test_a_model_with_several_labels_is_refused(tmp_path):
    saved(tmp_path, labels=2)
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="with 2 labels; a reward model is a sequence classifier"):
        ModelReward(path=str(tmp_path)).scorer(mesh)


def test_a_text_that_is_too_long_is_reported(plain):
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    scorer = ModelReward(path=str(plain[0])).scorer(mesh)
    with pytest.raises(UserError, match="has 101 tokens, but the reward model takes 100"):
        scorer(["p" * 50], ["c" * 50], [{}])
