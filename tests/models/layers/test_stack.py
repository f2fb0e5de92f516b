"""Stacks: order of layers, scanned and written out alike, dropout, rematerialisation."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from flax_transformers.models.layers.linear import Linear
from flax_transformers.models.layers.stack import (
    Stack,
    are_separate,
    make_stack,
    separate_layers,
    separate_leaves,
)
from tests.families.parity import first_by_default
from tests.huggingface.tensors import drawn_model
from tests.models.reference import equations, randomize

SCAN = pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
BOTH = (True, False)
POLICIES = ("dots", "full")


class Digit(nn.Module):
    """Appends a digit to a decimal number; hands back its own slice and what it has written."""

    digit: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, hidden, broadcast, per_layer):
        hidden = hidden * broadcast["base"] + self.digit
        return hidden, {"rate": per_layer["rate"], "number": hidden}


@pytest.mark.slow
@SCAN
def test_layers_run_first_then_pattern_by_pattern_then_remainder(scan):
    one, two, three, four, five = (partial(Digit, digit) for digit in range(1, 6))
    stack = Stack(first=(one,), pattern=(two, three), repeats=2, remainder=(four, five), scan=scan)
    assert stack.num_layers == 7
    per_layer = {"rate": jnp.arange(7.0) / 10}
    number, outs = jax.jit(partial(stack.apply, {}))(
        jnp.float32(0), {"base": jnp.float32(10)}, per_layer
    )
    assert number.item() == 1232345
    # What layers give back is in their order, and so is what each of them was given.
    assert outs["number"].tolist() == [1, 12, 123, 1232, 12323, 123234, 1232345]
    assert np.round(10 * outs["rate"]).tolist() == list(range(7))


class Layer(nn.Module):
    """A layer with parameters and dropout; hands back its dropout mask."""

    width: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, hidden, broadcast, per_layer):
        shape, axes = (self.width, self.width), ("embed", "mlp")
        update = Linear("BTD,DF->BTF", shape, axes, dtype=jnp.float32, name="linear")(hidden)
        mask = nn.Dropout(0.5, deterministic=self.deterministic)(jnp.ones_like(update))
        return hidden + jnp.tanh(update) * mask, mask


def make(scan, remat="none"):
    layer = partial(Layer, 4)
    parts = {"first": (layer,), "pattern": (layer, layer), "remainder": (layer,)}
    return Stack(**parts, repeats=3, scan=scan, remat=remat)


X = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def fresh():
    """Parameters as they are initialised."""
    return jax.jit(lambda: nn.meta.unbox(make(True).init(jax.random.key(0), X)["params"]))()


@pytest.fixture(scope="module")
def results(fresh):
    """By way of execution: outputs, gradients, and the dropout masks of two steps."""
    params = randomize(fresh)
    found = {}
    for scan in BOTH:
        stack = make(scan)

        def run(params, key, stack=stack):
            rngs = {"dropout": key}
            out, masks = stack.apply({"params": params}, X, deterministic=False, rngs=rngs)
            return jnp.sum(jnp.square(out)), (out, masks)

        step = jax.jit(jax.value_and_grad(run, has_aux=True))
        (_, (out, masks)), grads = step(params, jax.random.key(1))
        (_, (_, other)), _ = step(params, jax.random.key(2))
        found[scan] = {
            "out": np.asarray(out),
            "grads": grads,
            "masks": np.asarray(masks),
            "masks of another step": np.asarray(other),
        }
    return found


def test_parameters_are_stacked_whether_scanned_or_not():
    for scan in BOTH:
        boxed = jax.eval_shape(make(scan).init, jax.random.key(0), X)["params"]
        assert jax.tree.map(np.shape, nn.meta.unbox(boxed)) == {
            "first": {"block_0": {"linear": {"kernel": (1, 4, 4), "bias": (1, 4)}}},
            "layers": {
                "block_0": {"linear": {"kernel": (3, 4, 4), "bias": (3, 4)}},
                "block_1": {"linear": {"kernel": (3, 4, 4), "bias": (3, 4)}},
            },
            "remainder": {"block_0": {"linear": {"kernel": (1, 4, 4), "bias": (1, 4)}}},
        }
        kernel = boxed["layers"]["block_0"]["linear"]["kernel"]
        assert kernel.names == ("layers", "embed", "mlp")


@pytest.mark.slow
def test_layers_start_from_different_numbers(fresh):
    kernels = np.concatenate(
        [block["linear"]["kernel"] for part in fresh.values() for block in part.values()]
    )
    assert len({kernel.tobytes() for kernel in kernels}) == 8


@pytest.mark.slow
def test_scanned_and_unrolled_give_equal_outputs_and_gradients(results):
    scanned, unrolled = results[True], results[False]
    np.testing.assert_allclose(scanned["out"], unrolled["out"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        scanned["grads"],
        unrolled["grads"],
    )


def test_scanned_and_unrolled_drop_the_same_units(results):
    for name in ("masks", "masks of another step"):
        np.testing.assert_array_equal(results[True][name], results[False][name])


@SCAN
def test_each_layer_and_each_step_drops_other_units(results, scan):
    masks = [*results[scan]["masks"], *results[scan]["masks of another step"]]
    assert set(np.unique(masks)) == {0, 2}
    assert len({mask.tobytes() for mask in masks}) == 16


def test_a_stack_is_deterministic_unless_told_otherwise(fresh):
    _, masks = jax.jit(make(True).apply)({"params": fresh}, X)
    assert set(np.unique(masks)) == {1}


CONFIG = TransformerConfig(hidden_size=8, num_layers=3, num_heads=2, intermediate_size=12)
HIDDEN = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)


@pytest.mark.slow
@SCAN
def test_layers_that_give_nothing_back_give_nothing_back(scan):
    stack = make_stack(CONFIG, ComputeConfig(scan_layers=scan))
    shapes = jax.eval_shape(stack.init, jax.random.key(0), HIDDEN, LayerInputs())["params"]
    params = randomize(nn.meta.unbox(shapes))
    _, out = jax.eval_shape(stack.apply, {"params": params}, HIDDEN, LayerInputs())
    assert out == LayerOutput()


def make_gradient(remat, scan=True, repeats=3):
    """The gradient of a sum over a small transformer as a function of its parameters, and these."""
    block = partial(TransformerBlock, CONFIG, ComputeConfig())
    stack = Stack(pattern=(block,), repeats=repeats, scan=scan, remat=remat)
    shared = LayerInputs()
    shapes = jax.eval_shape(stack.init, jax.random.key(0), HIDDEN, shared)["params"]
    params = randomize(nn.meta.unbox(shapes))

    def loss(params):
        return jnp.sum(jnp.square(stack.apply({"params": params}, HIDDEN, shared)[0]))

    return jax.grad(loss), params


def count_products(remat):
    """Matrix products in the gradient, those of a loop counted once."""
    return sum(e.primitive.name == "dot_general" for e in equations(*make_gradient(remat)))


@pytest.mark.slow
def test_dots_keeps_projections_and_full_keeps_nothing():
    # Six projections and two products inside attention: one forward and two backward for each.
    assert count_products("none") == 8 * 3
    assert count_products("dots") == count_products("offload") == 8 * 3 + 2
    # The result of the last projection is the next layer's input, which is kept.
    assert count_products("full") == 8 * 3 + 7


@pytest.mark.slow
def test_offload_keeps_projections_in_the_memory_of_the_host():
    gradient, params = make_gradient("offload")
    moved = [e for e in equations(gradient, params) if e.primitive.name == "device_put"]
    kept = [e for e in moved if "host" in str(e.outvars[0].aval.memory_space).lower()]
    assert len(kept) == 5  # of six projections; the last one's result is the next layer's input


@pytest.mark.slow
@pytest.mark.parametrize("remat", POLICIES)
def test_recomputing_does_not_change_gradients_with_dropout_on(fresh, results, remat):
    stack = make(True, remat)

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        out, _ = stack.apply({"params": params}, X, deterministic=False, rngs=rngs)
        return jnp.sum(jnp.square(out))

    again = jax.jit(jax.grad(loss))(randomize(fresh))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        results[True]["grads"],
        again,
    )


@pytest.mark.parametrize("remat", POLICIES)
@pytest.mark.parametrize(
    ("scan", "repeats", "fenced"), [(True, 3, False), (False, 3, True), (True, 1, True)]
)
def test_the_compiler_may_not_merge_the_recomputation_unless_a_loop_divides_them(
    scan, repeats, fenced, remat
):
    traced = equations(*make_gradient(remat, scan, repeats))
    assert {e.params["prevent_cse"] for e in traced if "prevent_cse" in e.params} == {fenced}


@pytest.mark.slow
def test_a_single_layer_is_recomputed_by_the_compiled_program():
    products = {}
    for remat in ("none", "full"):
        gradient, params = make_gradient(remat, repeats=1)
        products[remat] = jax.jit(gradient).lower(params).compile().as_text().count(" dot(")
    assert products["full"] - products["none"] == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", first_by_default(["T5ForConditionalGeneration", "GPT2LMHeadModel"])
)
def test_separate_layers_give_the_same_outputs_with_and_without_a_cache(architecture):
    model, params = drawn_model(architecture)
    ids = np.arange(3, 13).reshape(2, 5)
    apart = separate_layers(params)
    assert are_separate(apart) and not are_separate(params)
    apply = jax.jit(model.apply)
    expected = apply({"params": params}, ids).logits
    np.testing.assert_allclose(apply({"params": apart}, ids).logits, expected, atol=1e-5)
    cache = model.empty_cache(2, 5)
    cache = cache.replace(layers=separate_leaves(cache.layers))
    output = apply({"params": apart}, ids, cache=cache)
    np.testing.assert_allclose(output.logits, expected, atol=1e-5)
    assert [leaf.shape[0] for leaf in output.cache.layers.own.keys] == [2, 2]
