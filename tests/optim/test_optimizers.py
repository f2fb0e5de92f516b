"""AdamW, clipping and decay masks; parity with torch through tests/golden/optimizer.npz."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from flax_transformers.errors import UserError
from flax_transformers.optim.optimizers import (
    LAMB,
    AdamW,
    decay_mask,
    learning_rate_at,
)
from flax_transformers.optim.schedules import Schedule

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "optimizer.py"))


def nest(flat):
    """{"a/b": x} as {"a": {"b": x}}, the shape parameters have in a model."""
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = jnp.asarray(value)
    return tree


def leaf(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return np.asarray(tree)


def config_of(case):
    settings = dict(GOLDEN["CASES"][case])
    schedule = Schedule(settings.pop("schedule"), settings.pop("warmup_steps"))
    return AdamW(**settings, no_decay=GOLDEN["NO_DECAY"], schedule=schedule)


def run(config, params, gradients):
    """Parameters and state after one update per entry of ``gradients``."""
    optimizer = config.make(len(gradients))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def adam_state(state):
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    return next(node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(GOLDEN["CASES"]))
def test_ten_steps_agree_with_torch(case):
    expected = np.load(GOLDEN["OUTPUT"])
    gradients = [nest(GOLDEN["gradients"](step)) for step in range(GOLDEN["STEPS"])]
    params, state = run(config_of(case), nest(GOLDEN["parameters"]()), gradients)
    moments = adam_state(state)
    for part, tree in (("parameters", params), ("mu", moments.mu), ("nu", moments.nu)):
        for name in GOLDEN["SHAPES"]:
            theirs = expected[f"{case}/{part}/{name}"]
            difference = np.abs(leaf(tree, name) - theirs).max() / np.abs(theirs).max()
            assert difference < 1e-6, (part, name)


@pytest.mark.parametrize("case", list(GOLDEN["CASES"]))
def test_learning_rates_agree_with_transformers(case):
    rate = learning_rate_at(config_of(case), GOLDEN["STEPS"])
    ours = [float(rate(step)) for step in range(GOLDEN["STEPS"])]
    theirs = np.load(GOLDEN["OUTPUT"])[f"{case}/learning_rate"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7 * theirs.max())


def test_the_golden_clips_some_steps_and_leaves_others():
    norms = np.load(GOLDEN["OUTPUT"])["linear_clipped/grad_norm"]
    assert (norms < 0.9).sum() >= 3
    assert (norms > 1.1).sum() >= 3


@pytest.mark.parametrize("b2", [0.0, 0.95, 0.999, 0.999999])
def test_the_first_update_is_the_sign_of_the_gradient(b2):
    params, grads = {"kernel": jnp.zeros(3)}, {"kernel": jnp.array([1e-3, -2.0, 7.0])}
    config = AdamW(learning_rate=1.0, b2=b2, eps=1e-30, max_grad_norm=None)
    after, _ = run(config, params, [grads])
    np.testing.assert_allclose(after["kernel"], [-1, 1, -1], rtol=3e-7)


def test_decay_goes_by_name_whether_layers_are_stacked_or_not():
    stacked = {
        "kernel": jnp.zeros((3, 2, 2)),
        "bias": jnp.zeros((3, 2)),
        "scale": jnp.zeros((3, 2)),
    }
    single = jax.tree.map(lambda x: x[0], stacked)
    params = {"stack": stacked, "layer": single, "token": {"embedding": jnp.zeros((4, 2))}}
    names = {"kernel": True, "bias": False, "scale": False}
    mask = decay_mask(params, ("bias", "scale", "embedding"))
    assert mask == {"stack": names, "layer": names, "token": {"embedding": False}}


def test_a_module_called_bias_does_not_hide_its_kernel_from_decay():
    params = {"bias": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}}
    assert decay_mask(params, ("bias",)) == {"bias": {"kernel": True, "bias": False}}


def test_decay_sees_through_boxes_that_carry_axis_names():
    boxed = {
        "kernel": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("embed", "mlp")),
        "bias": nn.LogicallyPartitioned(jnp.zeros(2), ("mlp",)),
    }
    mask = decay_mask(boxed, ("bias",))
    assert nn.meta.unbox(mask) == {"kernel": True, "bias": False}


def test_only_masked_in_parameters_shrink_when_gradients_are_zero():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    config = AdamW(learning_rate=0.5, weight_decay=0.25, schedule=Schedule("constant"))
    after, _ = run(config, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_array_equal(after["kernel"], [0.875, 0.875])
    np.testing.assert_array_equal(after["bias"], [1, 1])


def test_stacked_layers_move_exactly_as_single_ones():
    kernel, grad = GOLDEN["draw"]("k", (3, 4, 5)), GOLDEN["draw"]("g", (3, 4, 5))
    config = AdamW(max_grad_norm=None, schedule=Schedule("constant"))
    stacked, _ = run(config, {"kernel": jnp.asarray(kernel)}, [{"kernel": jnp.asarray(grad)}] * 3)
    single = {str(i): {"kernel": jnp.asarray(kernel[i])} for i in range(3)}
    grads = {str(i): {"kernel": jnp.asarray(grad[i])} for i in range(3)}
    layers, _ = run(config, single, [grads] * 3)
    together = np.stack([layers[str(i)]["kernel"] for i in range(3)])
    np.testing.assert_array_equal(stacked["kernel"], together)


@pytest.mark.slow
def test_the_first_step_of_a_warmup_moves_nothing_but_fills_the_moments():
    params = {"kernel": jnp.ones(2)}
    config = AdamW(schedule=Schedule("constant", warmup_steps=1))
    optimizer = config.make(10)
    updates, state = optimizer.update({"kernel": jnp.ones(2)}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], [0, 0])
    assert (adam_state(state).mu["kernel"] > 0).all()


def test_moments_are_float32_and_shaped_like_the_parameters():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    moments = adam_state(AdamW().make(10).init(params))
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
            lambda x: (x.shape, jnp.dtype(jnp.float32)), params
        )


def test_a_first_moment_in_bfloat16_takes_half_the_room_and_nearly_the_same_steps():
    params = {"kernel": jnp.linspace(-1, 1, 64)}
    ends, states = [], []
    for dtype in ("float32", "bfloat16"):
        optimizer = AdamW(learning_rate=0.1, first_moment_dtype=dtype).make(10)
        now, state = params, optimizer.init(params)
        for k in range(10):
            updates, state = optimizer.update({"kernel": jnp.cos(now["kernel"] + k)}, state, now)
            now = optax.apply_updates(now, updates)
        ends.append(now["kernel"])
        states.append(adam_state(state))
    assert [s.mu["kernel"].dtype for s in states] == [jnp.float32, jnp.bfloat16]
    assert {s.nu["kernel"].dtype for s in states} == {jnp.dtype(jnp.float32)}
    moved = jnp.abs(ends[0] - params["kernel"]).max()
    assert 0 < jnp.abs(ends[1] - ends[0]).max() < 0.02 * moved


def test_switching_clipping_or_decay_off_keeps_the_tree_of_the_state():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}

    def structure(**settings):
        return jax.tree.structure(AdamW(**settings).make(10).init(params))

    assert structure() == structure(max_grad_norm=None) == structure(weight_decay=0.0)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"b1": 1.0}, "optimizer.b1 is 1.0"),
        ({"b2": -0.1}, "optimizer.b2 is -0.1"),
        ({"eps": 0.0}, "optimizer.eps is 0.0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay is -1.0"),
        ({"max_grad_norm": 0.0}, "optimizer.max_grad_norm is 0.0"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate is -1.0; it must be positive"),
        ({"schedule": Schedule(warmup_steps=11)}, "warmup_steps is 11"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, names):
    with pytest.raises(UserError, match=names):
        AdamW(**settings).make(10)


def test_a_kind_that_no_parameter_has_is_refused_unless_it_is_a_common_one():
    params = nest({"dense/kernel": np.ones((2, 2)), "mixer/decay_rate": np.ones(2)})
    LAMB(no_decay=("bias", "scale", "decay_rate"), no_adaptation=("embedding",)).make(9).init(
        params
    )
    says = "is no kind of parameter; the kinds are bias, decay_rate, embedding, kernel, scale"
    with pytest.raises(UserError, match=f"optimizer.no_decay: 'LayerNorm' {says}"):
        AdamW(no_decay=("bias", "LayerNorm")).make(9).init(params)
    with pytest.raises(UserError, match=f"optimizer.no_adaptation: 'norm' {says}"):
        LAMB(no_adaptation=("norm",)).make(9).init(params)
