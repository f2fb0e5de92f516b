"""Losses, gradients and statistics of post-training against TRL's trainers, live.

Both read the same records with the same tokenizer and template, and the same weights.
"""

from __future__ import annotations

import json
import tempfile

import datasets
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import trl

import flax_transformers as ft
from flax_transformers.data.dataset import prepare
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.chat_template import CHATML
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.preference import DirectPreference, log_probs
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.post_training.supervised import SupervisedFineTuning
from flax_transformers.testing import relative_difference, tiny_model
from flax_transformers.training.step import model_functions, total_loss
from tests.parity.test_chat import folder  # noqa: F401

CAUSAL, REWARD = "LlamaForCausalLM", "LlamaForSequenceClassification"
LENGTH = 256
ROWS = [
    ("What is 2?", "Two, it is.", "It"),
    ("And 4 + 4?", "8", "Is it 9?"),
    ("Say it.", "It is what it is.", "What is it?"),
    ("system?", "user", "assistant"),
]


def message(role, content):
    return {"role": role, "content": content}


def records(kind):
    found = []
    for number, (asked, good, bad) in enumerate(ROWS):
        prompt, answer = message("user", asked), message("assistant", good)
        if kind == "messages":
            more = [message("user", bad), message("assistant", asked)]
            found.append({"messages": [prompt, answer, *more[: 2 * (number % 2)]]})
        else:
            pair = {"chosen": [answer], "rejected": [message("assistant", bad)]}
            found.append({"prompt": [prompt], **pair})
            if kind == "margins":
                found[-1]["margin"] = 0.5 * number
    return found


def with_noise(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):  # noqa: F811
    """A folder with the tokenizer, and a model of each architecture."""
    path = tmp_path_factory.mktemp("place")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<unk>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path / "tokenizer")
    for architecture, seed in ((CAUSAL, 0), (REWARD, 0), ("reference", 1)):
        labels = {"num_labels": 1} if architecture == REWARD else {}
        name = CAUSAL if architecture == "reference" else architecture
        model, params = tiny_model(name, vocab_size=400, max_positions=LENGTH, **labels)
        ft.save_pretrained(path / architecture, model, with_noise(params, seed))
    return path


def prepared(place, kind):
    """The store of the records."""
    file = place / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records(kind)))
    return prepare(
        ChatData(
            source=ConversationSource(str(file)),
            tokenizer=TokenizerConfig(path=str(place / "tokenizer")),
            validation_fraction=0.0,
            shards=1,
        ),
        place / f"store of {kind}",
    )


def batch_of(place, objective, kind):
    store, rng = prepared(place, kind), np.random.default_rng(0)
    examples = store.examples("train", objective.window_spec(LENGTH))
    rows = [
        objective.prepare(examples.read(i, rng), rng, store.vocabulary, LENGTH)
        for i in range(len(examples))
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def ours(place, objective, batch, architecture=CAUSAL):
    """Loss and metrics, and the gradients by their names in the published format."""
    model, params = ft.load_pretrained(place / architecture)
    functions = model_functions(model)

    def loss(params):
        terms = objective.terms(functions, params, batch, {})
        return total_loss(terms), terms.metrics

    with jax.default_matmul_precision("highest"):
        (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    with tempfile.TemporaryDirectory() as scratch:
        ft.save_pretrained(f"{scratch}/out", model, grads)
        named = safetensors.torch.load_file(f"{scratch}/out/model.safetensors")
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    return float(value), means, named


def theirs(place, method, kind, architecture=CAUSAL, reference=None, **settings):
    """The same of a trainer of TRL."""
    trainer_class, config_class = getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")
    auto = transformers.AutoModelForCausalLM
    if architecture == REWARD:
        auto = transformers.AutoModelForSequenceClassification
    arguments = config_class(
        output_dir=str(place / "out"),
        per_device_train_batch_size=len(ROWS),
        max_length=None,
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        **settings,
    )
    references = {} if reference is None else {"ref_model": auto.from_pretrained(place / reference)}
    trainer = trainer_class(
        model=auto.from_pretrained(place / architecture, dtype=torch.float32),
        args=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "tokenizer"),
        train_dataset=datasets.Dataset.from_list(records(kind)),
        **references,
    )
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: float(values[0]) for name, values in trainer._metrics["train"].items()}
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), metrics, grads, inputs


def assert_equal(found, expected, names):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, other in names.items():
        assert found[1][name] == pytest.approx(expected[1][other], rel=1e-5, abs=1e-5), name
    assert len(expected[2]) > 15
    for name, gradient in expected[2].items():
        assert relative_difference(found[2][name].numpy(), gradient.numpy()) < 1e-5, name


def test_supervised_fine_tuning(place):
    objective = SupervisedFineTuning()
    batch = batch_of(place, objective, "messages")
    expected = theirs(place, "SFT", "messages", assistant_only_loss=True)
    labels = expected[3]["labels"]
    assert (labels != -100).sum() == batch["label_weights"].sum()
    names = {"loss": "loss", "accuracy": "mean_token_accuracy"}
    expected[1]["loss"] = expected[0]
    assert_equal(ours(place, objective, batch), expected, names)


@pytest.mark.parametrize("kind", ["pairs", "margins"])
def test_reward_model(place, kind):
    objective = RewardModel(completions=8, centering=0.01)
    found = ours(place, objective, batch_of(place, objective, kind), REWARD)
    settings = {"architecture": REWARD, "center_rewards_coefficient": 0.01}
    expected = theirs(place, "Reward", kind, **settings)
    names = {"accuracy": "accuracy", "margin": "margin", "reward": "mean_reward"}
    assert_equal(found, expected, names)


DPO = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "log_prob_chosen": "logps/chosen",
    "log_prob_rejected": "logps/rejected",
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "sigmoid"}, {"loss_type": "sigmoid"}),
        ({"loss": "hinge"}, {"loss_type": "hinge"}),
        ({"loss": "ipo"}, {"loss_type": "ipo"}),
    ],
)
def test_direct_preference(place, settings, expected):
    objective = DirectPreference(completions=8, beta=0.3, **settings)
    batch = batch_of(place, objective, "pairs")
    model, params = ft.load_pretrained(place / "reference")
    with jax.default_matmul_precision("highest"):
        batch["reference"] = log_probs(model_functions(model), params, batch)[0]
    given = {"beta": 0.3, "reference": "reference", **expected}
    found, other = ours(place, objective, batch), theirs(place, "DPO", "pairs", **given)
    assert_equal(found, other, DPO)
    both = other[1]["rewards/chosen"] + other[1]["rewards/rejected"]
    assert found[1]["kl"] == pytest.approx(-both / (2 * 0.3), rel=1e-5, abs=1e-5)


def test_label_smoothing_is_that_of_torch(place):
    """This version of TRL has smoothing only in losses that sort a batch: of one pair, nothing."""
    rng, objective = np.random.default_rng(0), DirectPreference(beta=0.3, label_smoothing=0.2)
    store = prepared(place, "pairs")
    alone = DirectPreference(beta=0.3, label_smoothing=0.2, cross_documents=False)
    examples = store.examples("train", alone.window_spec(LENGTH))
    row = objective.prepare(examples.read(0, rng), rng, store.vocabulary, LENGTH)
    batch = {name: values[None] for name, values in row.items()}
    batch["reference"] = np.array([[-20.0, -22.0]], np.float32)
    loss, means, _ = ours(place, objective, batch)
    margin = torch.tensor(means["margin"])
    logsigmoid = torch.nn.functional.logsigmoid
    expected = -0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin)
    assert loss == pytest.approx(float(expected), rel=1e-5)
