"""Losses over conversations: constants, and what may not change them."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.post_training.preference import DirectPreference, log_probs
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.post_training.supervised import SupervisedFineTuning
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_model
from tests.post_training.preferences import (
    VOCAB,
    batch_of,
    element,
    example,
    model,
    pad_to,
    scores,
)

REWARD = "LlamaForSequenceClassification"
LENGTHS = {  # objective, architecture, completions of each element
    "supervised": (SupervisedFineTuning(), "LlamaForCausalLM", 1),
    "reward": (RewardModel(completions=8, centering=0.01), REWARD, 2),
    "preference": (DirectPreference(completions=8, loss="ipo"), "LlamaForCausalLM", 2),
}


def full(*values):
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.fixture(scope="module", params=["preference", *full("supervised", "reward")])
def case(request):
    """An objective, its architecture and eight elements, with a reference for each sequence."""
    objective, architecture, completions = LENGTHS[request.param]
    rng = np.random.default_rng(1)
    elements = [element(rng, completions) for _ in range(16)]
    reference = rng.normal(-20, 3, (16, completions)).astype(np.float32)
    return objective, architecture, elements, reference


def packed(case, per_row, order=None):
    """The batch with ``per_row`` elements in each row."""
    objective, _, elements, reference = case
    chosen = list(range(16)) if order is None else order
    groups = [chosen[i : i + per_row] for i in range(0, 16, per_row)]
    rows = [example([elements[i] for i in one], reference[one].ravel()) for one in groups]
    return batch_of(objective, rows)


@pytest.fixture(scope="module")
def expected(case):
    """Metrics and parameters after a step on two elements a row."""
    return scores(case[0], packed(case, 2), case[1])


def assert_equal(found, expected):
    for name, value in expected[0].items():
        if name.startswith("train/"):
            assert math.isclose(found[0][name], value, rel_tol=1e-5, abs_tol=1e-5), name
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [1, *full(4)])
def test_packing_does_not_change_the_loss(case, expected, per_row):
    assert_equal(scores(case[0], packed(case, per_row), case[1]), expected)


@pytest.mark.slow
def test_the_side_of_padding_does_not_change_the_loss(case, expected):
    batch = packed(case, 2)
    used = (batch["segment_ids"] > 0).sum(1)
    shift = batch["segment_ids"].shape[1] - used
    for name, values in batch.items():
        if values.ndim == 2 and values.shape[1] == batch["input_ids"].shape[1]:
            pairs = zip(values, shift, strict=True)
            batch[name] = np.stack([np.roll(row, by) for row, by in pairs])
    if "ends" in batch:
        batch["ends"] = np.where(batch["ends"] > 0, batch["ends"] + shift[:, None], 0)
    assert_equal(scores(case[0], batch, case[1]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [4, *full(2)])
def test_micro_batches_do_not_change_the_loss(case, expected, micro_batches):
    found = scores(case[0], packed(case, 2), case[1], micro_batches=micro_batches)
    assert_equal(found, expected)


@pytest.mark.slow
def test_rows_of_zeros_weigh_nothing(case, expected):
    assert_equal(scores(case[0], pad_to(packed(case, 2), 12), case[1]), expected)


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=4, context=2),
    "tensor": MeshConfig(data=2, tensor=4),
}


@pytest.mark.slow
@pytest.mark.full  # tests/multi_device has losses on meshes
@pytest.mark.parametrize("name", MESHES)
def test_the_mesh_does_not_change_the_loss(case, expected, name):
    mesh = ft.make_mesh(MESHES[name])
    assert_equal(scores(case[0], packed(case, 2), case[1], mesh=mesh), expected)


def metric_sums(objective, network, params, batch, rngs=None):
    functions = model_functions(network)
    return jax.jit(lambda p: objective.terms(functions, p, batch, rngs or {}).metrics)(params)


def test_the_loss_of_a_head_of_zeros_is_ln_2():
    network, params = drawn_model(REWARD, num_labels=1)
    params = params | {"classification_head": {"kernel": np.zeros((32, 1), np.float32)}}
    rng = np.random.default_rng(0)
    batch = batch_of(RewardModel(), [example([element(rng, 2)]) for _ in range(2)])
    total, count = metric_sums(RewardModel(), network, params, batch)["loss"]
    assert float(total / count) == pytest.approx(0.693147, abs=1e-6)


def test_three_completions_of_a_prompt_weigh_as_much_as_two():
    rng = np.random.default_rng(0)
    two, three = element(rng, 2), element(rng, 3)
    objective = RewardModel(completions=5)
    batch = batch_of(objective, [example([two, three], margins=np.array([2, 0], np.float32))])
    np.testing.assert_allclose(batch["preferred"][0].sum(1), [1, 0, 2 / 3, 1 / 3, 0], rtol=1e-6)
    assert batch["margins"][0, 0, 1] == 2 and batch["margins"].sum() == 2


def log_probs_of(network, params, batch):
    functions = model_functions(network)
    return jax.jit(lambda p: log_probs(functions, p, batch)[0])(params)


@pytest.mark.parametrize("loss", [{"loss": "sigmoid"}, {"loss": "sigmoid", "label_smoothing": 0.2}])
def test_the_first_loss_of_dpo_is_ln_2_with_margin_0(loss):
    network, params = model()
    rng, objective = np.random.default_rng(0), DirectPreference(**loss)
    pairs = [element(rng, 2) for _ in range(2)]
    batch = batch_of(objective, [example([one], np.zeros(2, np.float32)) for one in pairs])
    batch["reference"] = log_probs_of(network, params, batch)
    sums = metric_sums(objective, network, params, batch)
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    assert means["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert means["margin"] == means["accuracy"] == means["kl"] == 0


@pytest.mark.parametrize(
    ("objective", "architecture"),
    [(DirectPreference(), "LlamaForCausalLM"), (RewardModel(), REWARD)],
)
def test_preferences_are_learned_without_dropout(objective, architecture):
    labels = {"num_labels": 1, "classifier_dropout": 0.1} if architecture == REWARD else {}
    network, params = drawn_model(architecture, dropout=0.1, attention_dropout=0.1, **labels)
    rng, rngs = np.random.default_rng(0), {"dropout": jax.random.key(0)}
    pairs = [element(rng, 2) for _ in range(2)]
    batch = batch_of(objective, [example([one], np.zeros(2, np.float32)) for one in pairs])
    if architecture != REWARD:
        batch["reference"] = log_probs_of(network, params, batch)
    found = metric_sums(objective, network, params, batch, rngs)
    assert_bit_equal(found, metric_sums(objective, network, params, batch))
    if architecture != REWARD:
        assert float(found["loss"][0] / found["loss"][1]) == pytest.approx(math.log(2), abs=1e-7)
        assert float(found["margin"][0]) == 0


def test_the_divergence_of_dpo_is_the_mean_log_ratio_of_the_reference_to_the_model():
    """Of the completions of a pair, and of pairs: not of tokens."""
    network, params = model()
    rng, objective = np.random.default_rng(0), DirectPreference(beta=0.3)
    pairs = [example([element(rng, 2)], np.zeros(2, np.float32)) for _ in range(2)]
    batch = batch_of(objective, pairs)
    found = log_probs_of(network, params, batch)
    batch["reference"] = found + np.array([[1.0, 2.0], [-0.5, 4.0]], np.float32)
    total, count = metric_sums(objective, network, params, batch)["kl"]
    assert float(total / count) == pytest.approx((1.0 + 2.0 - 0.5 + 4.0) / 4, rel=1e-5)


PREFERRED = np.zeros((2, 3, 3), np.float32)
PREFERRED[0, 2, 0] = 1
PREFERRED[1, 0, 1] = PREFERRED[1, 0, 2] = 0.5
ROW, FIRST, SECOND = PREFERRED.nonzero()
BETTER, WORSE, WEIGHTS = (ROW, FIRST), (ROW, SECOND), PREFERRED[PREFERRED > 0]


@dataclass(frozen=True, kw_only=True)
class Given(DirectPreference):
    """The log-probabilities and lengths of sequences are those of the parameters."""

    def log_probs(self, model, params, batch):
        return params


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, lambda d: -log_sigmoid(0.3 * d)),
        (
            {"label_smoothing": 0.2},
            lambda d: -0.8 * log_sigmoid(0.3 * d) - 0.2 * log_sigmoid(-0.3 * d),
        ),
        ({"loss": "hinge"}, lambda d: np.maximum(0, 1 - 0.3 * d)),
        ({"loss": "ipo"}, lambda d: (d - 1 / 0.6) ** 2),
    ],
)
def test_the_losses_of_preferences_are_those_of_the_formulas(settings, loss):
    log_probs = np.array([[-9.0, -7.0, -4.0], [-8.0, -3.0, -6.0]], np.float32)
    reference = np.array([[-7.0, -1.0, -6.0], [-7.0, -4.0, -2.0]], np.float32)
    lengths = np.array([[4.0, 2.0, 5.0], [2.0, 8.0, 1.0]], np.float32)
    terms = Given(beta=0.3, completions=3, **settings).terms(
        None,
        (jnp.asarray(log_probs), jnp.asarray(lengths)),
        {"preferred": PREFERRED, "reference": reference},
        {},
    )
    ratio = (log_probs - reference).astype(np.float64)
    per = ratio / lengths if settings.get("loss") == "ipo" else ratio
    each = loss(per[BETTER] - per[WORSE])
    total, weight, coefficient = terms.losses["preference"]
    assert float(total) == pytest.approx(WEIGHTS @ each, rel=1e-5)
    assert (float(weight), coefficient) == (2.0, 1.0)
    means = {name: float(value / count) for name, (value, count) in terms.metrics.items()}
    assert means == {
        "loss": pytest.approx(WEIGHTS @ each / 2, rel=1e-5),
        "accuracy": WEIGHTS @ (ratio[BETTER] > ratio[WORSE]) / 2,
        "margin": pytest.approx(0.3 * WEIGHTS @ (ratio[BETTER] - ratio[WORSE]) / 2, rel=1e-5),
        "kl": pytest.approx(-WEIGHTS @ (ratio[BETTER] + ratio[WORSE]) / 4, rel=1e-5),
        "reward_chosen": pytest.approx(0.3 * WEIGHTS @ ratio[BETTER] / 2, rel=1e-5),
        "reward_rejected": pytest.approx(0.3 * WEIGHTS @ ratio[WORSE] / 2, rel=1e-5),
        "log_prob_chosen": WEIGHTS @ log_probs[BETTER] / 2,
        "log_prob_rejected": WEIGHTS @ log_probs[WORSE] / 2,
    }


def test_the_loss_of_rewards_is_that_of_the_formula():
    rewards = np.array([[0.5, 9.0, 1.0], [-1.0, 0.25, 2.0]], np.float32)
    margins = PREFERRED * np.float32(0.75)
    ends = np.array([[2, 0, 5], [1, 3, 4]])
    hidden = np.full((2, 6, 1), 50.0, np.float32)
    np.put_along_axis(hidden, np.maximum(ends - 1, 0)[..., None], rewards[..., None], axis=1)
    hidden[0, 0] = 50.0  # of no sequence
    functions = ModelFunctions(
        lambda *_: HiddenStates(jnp.asarray(hidden)), None, lambda *given: given[3][:, 0]
    )
    batch = {
        "preferred": PREFERRED, "margins": margins, "ends": ends,
        "input_ids": np.ones((2, 6), np.int32),
    }  # fmt: skip
    terms = RewardModel(completions=3, centering=0.01).terms(functions, {}, batch, {})
    better, worse = rewards[BETTER].astype(np.float64), rewards[WORSE].astype(np.float64)
    loss = WEIGHTS @ -log_sigmoid(better - worse - margins[PREFERRED > 0])
    found = {name: (float(s), float(w), c) for name, (s, w, c) in terms.losses.items()}
    assert found == {
        "reward": (pytest.approx(loss, rel=1e-5), 2.0, 1.0),
        "centering": (pytest.approx(WEIGHTS @ (better + worse) ** 2, rel=1e-5), 2.0, 0.01),
    }
    assert terms.metrics["accuracy"] == (1.0, 2.0)
    assert terms.metrics["reward"] == (rewards[ends > 0].sum(), 5.0)


def test_a_reward_is_one_number():
    rng = np.random.default_rng(0)
    batch = batch_of(RewardModel(), [example([element(rng, 2)])])
    network, params = drawn_model(REWARD, num_labels=2)
    with pytest.raises(UserError, match="model.num_labels is 2; set --model.num-labels 1"):
        RewardModel().terms(model_functions(network), params, batch, {})


def test_smoothing_is_for_the_sigmoid_loss():
    with pytest.raises(UserError, match="must be 0 with the loss 'hinge'"):
        DirectPreference(loss="hinge", label_smoothing=0.1)


def test_what_inspect_shows_is_what_is_learned():
    rng = np.random.default_rng(0)
    one = element(rng, 1)
    ((ids, start),) = one
    row = SupervisedFineTuning().prepare(example([one]), rng, VOCAB, 16)
    (view,) = SupervisedFineTuning().example_views(row)
    assert view.ids.tolist() == ids.tolist()
    assert view.labels.tolist() == [-1] * start + ids[start:].tolist()
    row = RewardModel().prepare(example([element(rng, 2)]), rng, VOCAB, 48)
    assert RewardModel().example_views(row)[0].note == "1 is better than 2"
