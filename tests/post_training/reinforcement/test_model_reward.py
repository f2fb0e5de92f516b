"""A reward model as the source of rewards."""

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.post_training.reinforcement.model_reward import ModelReward
from flax_transformers.post_training.reinforcement.rewards import scores_of
from flax_transformers.restore import converted_meta
from flax_transformers.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

PROMPTS, COMPLETIONS = ["2+2=", "3+4=", "1+1="], ["4", "seven", "2!"]


def saved(folder, labels):
    """A classifier as ``convert`` saves it."""
    model, params = tiny_model(
        "LlamaForSequenceClassification", vocab_size=262, num_labels=labels, init_std=0.2
    )
    ByteTokenizer().save(folder / "tokenizer")
    files = {f"tokenizer/{f.name}": f.read_bytes() for f in (folder / "tokenizer").iterdir()}
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, converted_meta(model.config), files)
    checkpoints.close()
    return model, params


def test_a_reward_is_the_logit_at_the_last_token(tmp_path):
    model, params = saved(tmp_path, labels=1)
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    reward = ModelReward(path=str(tmp_path), batch_size=2)
    found = scores_of(reward, reward.scorer(mesh), PROMPTS, COMPLETIONS, [{}] * 3)
    for prompt, completion, value in zip(PROMPTS, COMPLETIONS, found, strict=True):
        ids = np.array([[*ByteTokenizer().encode_prompt(prompt + completion), 1]])
        logits = model.apply({"params": params}, ids, np.ones_like(ids)).logits
        np.testing.assert_allclose(value, logits[0, 0], rtol=1e-4)
    assert len(set(found)) == 3


def test_a_model_with_several_labels_is_refused(tmp_path):
    saved(tmp_path, labels=2)
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="with 2 labels; a reward model is a sequence classifier"):
        ModelReward(path=str(tmp_path)).scorer(mesh)


def test_a_text_that_is_too_long_is_reported(tmp_path):
    saved(tmp_path, labels=1)
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    scorer = ModelReward(path=str(tmp_path)).scorer(mesh)
    with pytest.raises(UserError, match="has 101 tokens, but the reward model takes 64"):
        scorer(["p" * 50], ["c" * 50], [{}])
