"""One step: its gradient by hand, what a bad gradient leaves alone, and what costs nothing."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import LossTerms, ModelFunctions
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import batch_sharding, replicated
from flax_transformers.testing import GivenLogits, assert_bit_equal
from flax_transformers.training.state import TrainState
from flax_transformers.training.step import (
    compile_train_step,
    make_evaluation_step,
    make_train_step,
    model_functions,
    module_norms,
    real_tokens,
    total_loss,
)


@dataclasses.dataclass(frozen=True)
class TwoTerms:
    """Half a squared error with coefficient 1, and the model's output itself with 0.25.

    ``noise_k`` reports the random number that the rows marked k were computed with.
    """

    def terms(self, model, params, batch, rngs):
        output = model.hidden_states(params, batch, rngs).last_hidden_state
        square = jnp.sum(batch["weight"] * (output - batch["target"]) ** 2 / 2)
        plain = jnp.sum(batch["other"] * output)
        weight, other = jnp.sum(batch["weight"]), jnp.sum(batch["other"])
        metrics = {"square": (square, weight), "plain": (plain, other)}
        if "dropout" in rngs:
            drawn = jax.random.uniform(rngs["dropout"])
            for k in range(4):
                rows = jnp.sum(batch["mark"] == k)
                metrics[f"noise_{k}"] = (drawn * rows, rows)
        return LossTerms({"square": (square, weight, 1.0), "plain": (plain, other, 0.25)}, metrics)


LINE = ModelFunctions(
    hidden_states=lambda params, batch, rngs: HiddenStates(batch["x"] @ params["w"]),
    unembedding=lambda params, hidden: hidden,
    head=lambda *_: None,
)
# Small integers, and totals that are powers of two: every sum and quotient is exact in float32,
# so that any order of adding up gives the same bits.
BATCH = {
    "x": np.array([[1, 0], [2, 1], [0, 3], [1, 1], [4, 0], [1, 2], [3, 1], [0, 1]], np.float32),
    "target": np.array([1, 0, 2, 5, 3, 1, 0, 4], np.float32),
    "weight": np.array([1, 0, 2, 3, 0, 0, 2, 0], np.float32),
    "other": np.array([0, 0, 0, 1, 0, 2, 1, 0], np.float32),
    "mark": np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32),
}
START = np.array([1, 2], np.float32)


def state_of(optimizer, step=0, seed=0):
    params = {"w": jnp.array(START)}
    key = jax.random.key_data(jax.random.key(seed))
    counts = [jnp.array(count, jnp.int32) for count in (step, 0, 0)]
    return TrainState(counts[0], params, optimizer.init(params), key, *counts[1:])


def take(batches=(BATCH,), micro_batches=1, optimizer=None, **state):
    """The state and the last report after a step on each batch."""
    optimizer = optimizer or optax.sgd(1.0)
    step = jax.jit(make_train_step(TwoTerms(), LINE, optimizer, micro_batches))
    reached = state_of(optimizer, **state)
    for batch in batches:
        reached, report = step(reached, batch)
    return jax.device_get((reached, report))


def gradient(batch):
    """By hand: each term's sum over its total weight."""
    error = batch["x"] @ START - batch["target"]
    square = (batch["weight"] * error) @ batch["x"] / batch["weight"].sum()
    plain = batch["other"] @ batch["x"] / batch["other"].sum() if batch["other"].any() else 0.0
    return square + 0.25 * plain


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_each_term_is_divided_by_its_weight_in_the_whole_batch(micro_batches):
    state, report = take(micro_batches=micro_batches)
    found = START - state.params["w"]  # gradient descent with a rate of one
    assert found.tolist() == gradient(BATCH).tolist() == [3.375, 3.875]
    assert float(report.grad_norm) == pytest.approx(np.hypot(*found), rel=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_term_without_weight_contributes_nothing(micro_batches):
    batch = BATCH | {"other": np.zeros(8, np.float32)}
    state, report = take([batch], micro_batches)
    assert (START - state.params["w"]).tolist() == gradient(batch).tolist()
    assert (report.sums["plain"], report.skipped) == ((0.0, 0.0), 0)


def test_a_sum_without_weight_is_not_trained():
    terms = LossTerms(
        {"a": (jnp.array(6.0), jnp.array(4.0), 2.0), "b": (3.0, jnp.zeros(()), 1.0)}, {}
    )
    assert float(total_loss(terms)) == 3.0


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_metrics_are_sums_and_counts_over_the_whole_batch(micro_batches):
    _, report = take(micro_batches=micro_batches)
    output = BATCH["x"] @ START
    square = np.sum(BATCH["weight"] * (output - BATCH["target"]) ** 2 / 2)
    assert report.sums["square"] == (square, 8.0)
    assert report.sums["plain"] == (BATCH["other"] @ output, 4.0)


def bad_batch():
    x = BATCH["x"].copy()
    x[2, 1] = np.inf
    return BATCH | {"x": x}


def adam():
    schedule = Schedule("linear", warmup_steps=4)
    return AdamW(learning_rate=0.1, schedule=schedule).make(total_steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(micro_batches):
    before, _ = take([BATCH, BATCH], micro_batches, adam())
    after, report = take([BATCH, BATCH, bad_batch(), bad_batch()], micro_batches, adam())
    assert_bit_equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert (after.step, after.skipped, after.consecutive_skips) == (4, 2, 2)
    assert (report.skipped, report.consecutive_skips) == (2, 2)
    assert not np.isfinite(report.grad_norm)
    assert all(pair == (0.0, 0.0) for pair in report.sums.values())


@pytest.mark.slow
def test_an_update_in_place_is_the_same_and_is_skipped_for_the_same_batches():
    reached = {}
    for in_place in (False, True):
        step = make_train_step(TwoTerms(), LINE, adam(), 1, ema=EMAConfig(0.9), in_place=in_place)
        step = jax.jit(step, donate_argnums=0)
        state = state_of(adam())
        state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
        for batch in (BATCH, bad_batch(), BATCH):
            state, report = step(state, batch)
        reached[in_place] = jax.device_get((state, report))
    # Compilers fuse multiplications and additions of the two programs differently.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7), reached[True], reached[False])
    assert (reached[True][0].step, reached[True][0].skipped) == (3, 1)
    assert reached[True][0].params["w"].tolist() != START.tolist()


def take_from(state, optimizer, **options):
    step = jax.jit(make_train_step(TwoTerms(), LINE, optimizer, 1, **options))
    return jax.device_get(step(state, BATCH))


def test_the_norms_of_modules_are_those_of_their_arrays():
    optimizer = adam()
    _, report = take_from(state_of(optimizer), optimizer, with_module_norms=True)
    [(norm, count)] = [
        pair for name, pair in report.sums.items() if name.startswith("optimizer/param_norm")
    ]
    assert (norm, count) == (np.linalg.norm(START).astype(np.float32), 1)
    tree = {
        "mlp": {"up": {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}},
        "norm": {"scale": jnp.array([[2.0]])},
    }
    norms = {name: float(norm) for name, (norm, _) in module_norms("grad_norm", tree).items()}
    assert norms == {"optimizer/grad_norm/mlp/up": 5.0, "optimizer/grad_norm/norm": 2.0}


def with_statistic(state, name, value):
    """The state, with one value in a statistic of Adam replaced."""
    adam_state, *rest = state.opt_state
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(value), getattr(adam_state, name))
    return state.replace(opt_state=(adam_state._replace(**{name: spoilt}), *rest))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("mu", np.nan), ("mu", np.inf), ("nu", np.nan), ("nu", np.inf)]
)
def test_a_statistic_that_is_not_finite_reaches_no_parameter_and_the_step_is_counted(name, value):
    optimizer = optax.adam(0.1)
    before = with_statistic(state_of(optimizer), name, value)
    after, report = take_from(before, optimizer)
    assert_bit_equal((after.params, after.opt_state), jax.device_get((before.params,
                     before.opt_state)))  # fmt: skip
    assert np.isfinite(report.grad_norm) and not report.update_is_finite
    assert (report.skipped, report.consecutive_skips) == (1, 1)
    assert all(pair == (0.0, 0.0) for pair in report.sums.values())


@pytest.mark.slow
def test_an_update_that_overflows_changes_nothing():
    optimizer = optax.chain(optax.sgd(1e38), optax.scale(1e3))
    after, report = take_from(state_of(optimizer), optimizer)
    assert after.params["w"].tolist() == START.tolist()
    assert (report.skipped, bool(report.update_is_finite)) == (1, False)


@pytest.mark.slow
def test_an_average_that_is_not_finite_stops_the_update_too():
    optimizer, ema = optax.sgd(1.0), EMAConfig(0.9)
    state = state_of(optimizer)
    for value, skipped in ((1.0, 0), (np.nan, 1)):
        average = {"w": jnp.array([value, 1.0])}
        after, report = take_from(state.replace(ema=average), optimizer, ema=ema)
        assert report.skipped == skipped
        assert (after.params["w"].tolist() == START.tolist()) is bool(skipped)


def test_after_a_skipped_step_the_next_update_is_the_one_that_was_due():
    """The rate rises in these steps, so a count that went on would show."""
    straight, _ = take([BATCH, BATCH, BATCH], optimizer=adam())
    after, report = take([BATCH, bad_batch(), BATCH, bad_batch(), BATCH], optimizer=adam())
    assert_bit_equal((after.params, after.opt_state), (straight.params, straight.opt_state))
    assert (after.params["w"] != START).all()
    assert (after.step, after.skipped, after.consecutive_skips) == (5, 2, 0)
    assert (report.skipped, report.consecutive_skips) == (2, 0)


def noise(micro_batches=4, **state):
    _, report = take(micro_batches=micro_batches, **state)
    return [float(report.sums[f"noise_{k}"][0]) for k in range(4)]


@pytest.mark.slow
def test_dropout_differs_between_steps_and_micro_batches_and_repeats_exactly():
    first, again = noise(step=5), noise(step=5)
    assert first == again
    drawn = [*first, *noise(step=6), *noise(step=5, seed=1)]
    assert len(set(drawn)) == 12
    assert len(set(noise(1))) == 1


def test_a_micro_batch_takes_every_kth_row():
    """Then a device splits the rows it has, whatever the mesh."""
    _, report = take(micro_batches=4)
    # The marks are row numbers modulo 4: each micro-batch has both rows of one mark.
    assert [report.sums[f"noise_{k}"][1] for k in range(4)] == [2, 2, 2, 2]
    assert len(set(noise(2))) == 2


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": np.zeros((2, 4))}, 8),
        ({"input_ids": np.ones((2, 4)), "attention_mask": np.eye(2, 4)}, 2),
        ({"input_ids": np.ones((1, 4)), "segment_ids": np.array([[1, 2, 2, 0]])}, 3),
        (
            {
                "input_ids": np.ones((1, 4)),
                "attention_mask": np.array([[1, 1, 0, 0]]),
                "decoder_input_ids": np.zeros((1, 5)),
                "decoder_attention_mask": np.array([[1, 1, 1, 0, 0]]),
            },
            5,
        ),
        ({"pixel_values": np.ones((2, 3, 4, 4))}, None),
    ],
)
def test_tokens_are_those_of_encoder_and_decoder_without_padding(batch, tokens):
    found = real_tokens(batch)
    assert found is None if tokens is None else int(found) == tokens


def test_the_evaluation_step_draws_nothing_and_gives_sums():
    sums = jax.jit(make_evaluation_step(TwoTerms(), LINE))({"w": START}, BATCH)
    assert set(sums) == {"square", "plain"}
    assert tuple(map(float, sums["plain"])) == (BATCH["other"] @ BATCH["x"] @ START, 4.0)


class Noisy(nn.Module):
    """Keeps or drops its one input; ``unembedding`` doubles, ``classify`` trebles and may drop."""

    inputs: ClassVar[tuple[str, ...]] = ("x", "mask")

    @nn.compact
    def hidden_states(self, x: Any, mask: Any = None, *, deterministic: bool = True):
        scale = self.param("scale", nn.initializers.ones, ())
        x = nn.Dropout(0.5)(x * scale, deterministic=deterministic)
        return x if mask is None else x * mask

    def unembedding(self, hidden: Any):
        return 2 * hidden

    @nn.compact
    def classify(self, hidden: Any, mask: Any, *, deterministic: bool = True):
        return nn.Dropout(0.5)(3 * hidden * mask, deterministic=deterministic)


@pytest.mark.slow
def test_model_functions_hand_over_what_the_model_takes_and_drop_only_with_a_key():
    functions, params = model_functions(Noisy()), {"scale": jnp.array(3.0)}
    x, key = jnp.ones(64), jax.random.key(0)
    batch = {"x": x, "labels": jnp.zeros(64)}
    assert (functions.hidden_states(params, batch, {}) == 3 * x).all()
    masked = functions.hidden_states(params, batch | {"mask": jnp.zeros(64)}, {})
    assert not masked.any()
    assert set(functions.hidden_states(params, batch, {"dropout": key}).tolist()) == {0.0, 6.0}
    assert (functions.unembedding(params, x) == 2 * x).all()
    assert (functions.head("classify", params, {}, x, 2 * x) == 6 * x).all()
    dropped = functions.head("classify", params, {"dropout": key}, x, 2 * x)
    assert set(dropped.tolist()) == {0.0, 12.0}


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.mark.slow
def test_the_compiled_step_donates_its_state():
    mesh, optimizer = one_device(), adam()
    state = jax.device_put(state_of(optimizer), replicated(mesh))
    batch = jax.device_put(BATCH, batch_sharding(mesh))
    step = compile_train_step(make_train_step(TwoTerms(), LINE, optimizer, 1), state, mesh)
    with jax.set_mesh(mesh):
        new, _ = step(state, batch)
    old = jax.tree.leaves((state.params, state.opt_state))
    assert old and all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


@dataclasses.dataclass(frozen=True)
class WeightsByHand(MaskedLM):
    """The weights pass, known by its lack of random numbers, touches no model at all."""

    def terms(self, model, params, batch, rngs):
        if rngs:
            return super().terms(model, params, batch, rngs)
        return LossTerms({"masked_lm": (0.0, jnp.sum(batch["masked_weights"]), 1.0)}, {})


def layers(params, batch, rngs):
    """Hidden states of a stack of two layers, scanned as the real ones are."""
    hidden = params["table"][batch["input_ids"]]
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), hidden, params["stack"])[0]


STACK = ModelFunctions(
    hidden_states=lambda params, batch, rngs: HiddenStates(layers(params, batch, rngs)),
    unembedding=lambda params, hidden: GivenLogits(hidden @ params["table"].T),
    head=lambda *_: None,
)


def flops(objective):
    """Of a compiled step in two micro-batches, by the compiler's own count."""
    params = {"table": jnp.zeros((60, 8)), "stack": jnp.zeros((2, 8, 8))}
    optimizer = optax.sgd(1.0)
    state = state_of(optimizer).replace(params=params, opt_state=optimizer.init(params))
    batch = {"input_ids": jnp.zeros((4, 16), jnp.int32), "masked_weights": jnp.ones((4, 2))}
    batch |= dict.fromkeys(("masked_positions", "masked_labels"), jnp.zeros((4, 2), jnp.int32))
    step = jax.jit(make_train_step(objective, STACK, optimizer, 2))
    return step.lower(state, batch).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_adding_up_the_weights_first_computes_no_model():
    assert flops(MaskedLM()) == flops(WeightsByHand())
