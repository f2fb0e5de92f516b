"""Optimizers against their papers' equations in float64, and layer by layer."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.errors import UserError
from flax_transformers.optim.optimizers import (
    LAMB,
    LARS,
    Adafactor,
    AdamW,
    Lion,
    Muon,
)
from flax_transformers.optim.schedules import Schedule
from flax_transformers.optim.selection import name_of
from flax_transformers.optim.transforms import FactoredState

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "optimizer.py"))
draw = GOLDEN["draw"]
CONSTANT = Schedule("constant")
STEPS = 10
# Attention and the experts of a layer, whose kernels are matrices in more than two axes.
SHAPES = {
    "words/embedding": (24, 8),
    "attention/query/kernel": (8, 2, 6),
    "attention/query/bias": (2, 6),
    "attention/output/kernel": (2, 6, 8),
    "mlp/up/kernel": (8, 16),
    "norm/scale": (8,),
}
AXES = {
    "words/embedding": ("vocab", "embed"),
    "attention/query/kernel": ("embed", "heads", "head_dim"),
    "attention/query/bias": ("heads", "head_dim"),
    "attention/output/kernel": ("heads", "head_dim", "embed"),
    "mlp/up/kernel": ("embed", "mlp"),
    "experts/up/kernel": ("expert", "embed", "mlp"),
    "norm/scale": ("norm",),
}
MATRICES = {  # name: [inputs, outputs]
    "words/embedding": (24, 8),
    "attention/query/kernel": (8, 12),
    "attention/output/kernel": (12, 8),
    "mlp/up/kernel": (8, 16),
}


def tree_of(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = jnp.asarray(value)
    return tree


def flat_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(name_of(path)): np.asarray(leaf) for path, leaf in leaves}


def start(shapes=None):
    return {name: 0.1 * draw(name, shape) for name, shape in (shapes or SHAPES).items()}


def gradients(step, shapes=None):
    scale = np.float32(GOLDEN["GRADIENT_SCALES"][step])
    grads = {n: scale * draw(f"{n}/{step}", s) for n, s in (shapes or SHAPES).items()}
    if "words/embedding" in grads:
        grads["words/embedding"][::2] = 0  # words that no batch has
    return grads


def axes_of(flat):
    """The logical axes of parameters whose names end as one of AXES; layers and experts may be
    apart or stacked."""
    found = {}
    for name, value in flat.items():
        folders = tuple(name.split("/"))
        named = AXES.get("/".join(folders[-3:]), AXES.get("/".join(folders[-2:])))
        if named is not None:
            named = ("layers", *named) if "layers" in folders else named
            found[folders] = named[len(named) - value.ndim :]
    return found


def run(config, params, grads):
    optimizer = config.make(len(grads), axes_of(params))
    params = tree_of(params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for each in grads:
        params, state = step(params, state, tree_of(each))
    return flat_of(params), state


def by_hand(update, config):
    """Ten steps of ``update(name, parameter, gradient, t, memory) -> step`` in float64."""
    params = {name: value.astype(np.float64) for name, value in start().items()}
    memory = {name: {} for name in params}
    for t in range(1, STEPS + 1):
        grads = gradients(t - 1)
        total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        shrink = min(1.0, config.max_grad_norm / total) if config.max_grad_norm else 1.0
        for name, grad in grads.items():
            direction = update(
                name, params[name], shrink * grad.astype(np.float64), t, memory[name]
            )
            params[name] = params[name] - config.learning_rate * direction
    return params


def decay(config, name, parameter):
    return config.weight_decay * parameter * (name.split("/")[-1] not in config.no_decay)


def lamb(config):
    def update(name, x, g, t, memory):
        m = memory["m"] = config.b1 * memory.get("m", 0) + (1 - config.b1) * g
        v = memory["v"] = config.b2 * memory.get("v", 0) + (1 - config.b2) * g**2
        ratio = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        step = ratio + decay(config, name, x)
        if name.split("/")[-1] in config.no_adaptation:
            return step
        return np.linalg.norm(x) / np.linalg.norm(step) * step

    return update


def lion(config):
    def update(name, x, g, t, memory):
        m = memory.get("m", 0)
        memory["m"] = config.b2 * m + (1 - config.b2) * g
        return np.sign(config.b1 * m + (1 - config.b1) * g) + decay(config, name, x)

    return update


def lars(config):
    def update(name, x, g, t, memory):
        u = g + decay(config, name, x)
        if name.split("/")[-1] not in config.no_adaptation:
            u = config.trust_coefficient * np.linalg.norm(x) / np.linalg.norm(u) * u
        memory["m"] = config.momentum * memory.get("m", 0) + u
        return memory["m"]

    return update


def muon(config):
    """Newton-Schulz iterations of Nesterov's momentum, both bias-corrected; Adam elsewhere."""

    def update(name, x, g, t, memory):
        beta = config.b1 if not name.endswith("kernel") else config.momentum
        m = memory["m"] = beta * memory.get("m", 0) + (1 - beta) * g
        if not name.endswith("kernel"):
            v = memory["v"] = config.b2 * memory.get("v", 0) + (1 - config.b2) * g**2
            step = m / (1 - beta**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
            return step + decay(config, name, x)
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        matrix = ahead.reshape(MATRICES[name])
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        matrix = matrix / np.linalg.norm(matrix)
        for _ in range(5):
            square = matrix @ matrix.T
            matrix = 3.4445 * matrix + (-4.775 * square + 2.0315 * square @ square) @ matrix
        if MATRICES[name][0] > MATRICES[name][1]:
            matrix = matrix.T
        scaled = 0.2 * np.sqrt(max(MATRICES[name])) * matrix.reshape(x.shape)
        return scaled + decay(config, name, x)

    return update


def adafactor(config):
    """Algorithm 4 for matrices and 5 for vectors, with the decay of section 7.2."""

    def update(name, x, g, t, memory):
        beta = 1 - t**-config.decay_exponent
        square = g**2 + config.eps
        if name in MATRICES:
            square = square.reshape(MATRICES[name])
            r = memory["r"] = beta * memory.get("r", 0) + (1 - beta) * square.sum(1)
            c = memory["c"] = beta * memory.get("c", 0) + (1 - beta) * square.sum(0)
            v = (np.outer(r, c) / r.sum()).reshape(g.shape)
        else:
            v = memory["v"] = beta * memory.get("v", 0) + (1 - beta) * square
        u = g / np.sqrt(v)
        if config.clip_threshold is not None:
            u = u / max(1, np.sqrt(np.mean(u**2)) / config.clip_threshold)
        if config.scale_parameter:
            u = u * max(config.least_scale, np.sqrt(np.mean(x**2)))
        return u + decay(config, name, x)

    return update


CASES = {
    "lamb": (LAMB(learning_rate=2e-2, weight_decay=0.1, schedule=CONSTANT), lamb),
    "lion": (Lion(learning_rate=3e-3, weight_decay=0.2, schedule=CONSTANT), lion),
    "lars": (LARS(learning_rate=2.0, weight_decay=0.1, schedule=CONSTANT), lars),
    "muon": (Muon(learning_rate=1e-2, max_grad_norm=None, schedule=CONSTANT), muon),
    "adafactor": (Adafactor(min_factored=1), adafactor),
    "adafactor, clipped and decaying": (
        Adafactor(
            learning_rate=3e-2,
            min_factored=1,
            decay_exponent=0.7,
            clip_threshold=0.5,
            scale_parameter=False,
            weight_decay=0.1,
            max_grad_norm=1.0,
        ),
        adafactor,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_ten_steps_are_those_of_the_papers_equations(case):
    config, equations = CASES[case]
    found, _ = run(config, start(), [gradients(step) for step in range(STEPS)])
    expected = by_hand(equations(config), config)
    for name in SHAPES:
        difference = np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()
        moved = np.abs(expected[name] - start()[name]).max() / np.abs(expected[name]).max()
        assert difference < 1e-6 < 1e-3 < moved, name


@pytest.mark.slow
@pytest.mark.parametrize("case", list(GOLDEN["ADAFACTOR_CASES"]))
def test_ten_steps_of_adafactor_agree_with_transformers(case):
    settings = GOLDEN["ADAFACTOR_CASES"][case]
    rate = settings["lr"] or 1e-2  # the relative step is 0.01 up to update 10,000
    config = Adafactor(
        learning_rate=rate,
        scale_parameter=settings["scale_parameter"],
        decay_exponent=-settings["decay_rate"],
        clip_threshold=settings["clip_threshold"],
        min_factored=1,
    )
    shapes = GOLDEN["ADAFACTOR_SHAPES"]
    params = {name: np.float32(0.1) * draw(name, shape) for name, shape in shapes.items()}
    grads = [GOLDEN["adafactor_gradients"](step) for step in range(STEPS)]
    found, _ = run(config, params, grads)
    expected = np.load(GOLDEN["OUTPUT"])
    for name in shapes:
        theirs = expected[f"adafactor/{case}/{name}"]
        assert np.abs(found[name] - theirs).max() / np.abs(theirs).max() < 1e-6, name


LAYERS = 2
EXPERTS = 2
LAYER_SHAPES = {n: s for n, s in SHAPES.items() if not n.startswith("words")} | {
    "experts/up/kernel": (EXPERTS, 8, 16)
}


def apart(stacked):
    return {f"{i}/{name}": value[i] for name, value in stacked.items() for i in range(LAYERS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        AdamW(max_grad_norm=None),
        LAMB(max_grad_norm=None),
        Lion(max_grad_norm=None),
        Adafactor(min_factored=4),
        Adafactor(min_factored=4, scale_parameter=False),
        Adafactor(min_factored=10),
        Adafactor(),
    ],
    ids=["adamw", "lamb", "lion", "adafactor", "absolute", "partly factored", "unfactored"],
)
def test_stacked_layers_and_experts_move_as_they_do_apart(config):
    """But for the last bit. Sizes differ by a factor of 100, so that a shared statistic shows."""
    sizes = 100.0 ** np.arange(LAYERS)
    stacked = {n: draw(n, (LAYERS, *s)) for n, s in LAYER_SHAPES.items()}
    stacked = {n: (v.T * sizes).T.astype(np.float32) for n, v in stacked.items()}
    grads = [{n: draw(f"{n}/{k}", v.shape) for n, v in stacked.items()} for k in range(3)]
    grads = [{n: (g.T / sizes).T.astype(np.float32) for n, g in each.items()} for each in grads]

    def below_stack(flat):
        return {f"stack/layers/block_0/{name}": value for name, value in flat.items()}

    def experts_apart(flat):
        single = {n: v for n, v in flat.items() if "experts" not in n}
        experts = {n: v for n, v in flat.items() if "experts" in n}
        return single | {f"{e}/{n}": v[e] for n, v in experts.items() for e in range(EXPERTS)}

    together, _ = run(config, below_stack(stacked), [below_stack(each) for each in grads])
    singles = [experts_apart(apart(each)) for each in grads]
    single, _ = run(config, experts_apart(apart(stacked)), singles)
    layers = {n.removeprefix("stack/layers/block_0/"): v for n, v in together.items()}
    for name, expected in single.items():
        found = experts_apart(apart(layers))[name]
        np.testing.assert_allclose(found, expected, rtol=3e-7, err_msg=name)
        assert (found != experts_apart(apart(stacked))[name]).any(), name


def test_a_factored_kernel_keeps_one_vector_a_side_and_a_bias_all_of_it():
    _, state = run(Adafactor(min_factored=8), start(), [gradients(0)])
    kept = next(s for s in jax.tree.leaves(state, is_leaf=is_factored) if is_factored(s))
    shapes = {
        field: {n: v.shape for n, v in flat_of(getattr(kept, field)).items()}
        for field in ("row", "column", "full")
    }
    assert shapes["row"] == {
        "words/embedding": (24,),
        "attention/query/kernel": (8,),
        "attention/output/kernel": (2, 6),
        "mlp/up/kernel": (8,),
    }
    assert shapes["column"] == {
        "words/embedding": (8,),
        "attention/query/kernel": (2, 6),
        "attention/output/kernel": (8,),
        "mlp/up/kernel": (16,),
    }
    assert shapes["full"] == {"attention/query/bias": (2, 6), "norm/scale": (8,)}


def is_factored(node):
    return isinstance(node, FactoredState)


def test_a_row_without_gradients_beside_huge_ones_stays_finite_in_adafactor():
    grad = np.zeros((8, 16), np.float32)
    grad[0] = 1e6
    after, _ = run(Adafactor(min_factored=1), {"kernel": np.ones((8, 16))}, [{"kernel": grad}] * 2)
    assert np.isfinite(after["kernel"]).all()
    np.testing.assert_array_equal(after["kernel"][1:], 1)


def test_lamb_takes_a_ratio_of_one_for_a_parameter_of_zeros():
    config = LAMB(learning_rate=0.5, eps=1e-30, max_grad_norm=None, schedule=CONSTANT)
    after, _ = run(config, {"kernel": np.zeros(3)}, [{"kernel": np.array([1.0, -2.0, 3.0])}])
    np.testing.assert_allclose(after["kernel"], [-0.5, 0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (Lion, {"b1": 1.0}, "optimizer.b1 is 1.0"),
        (LAMB, {"eps": 0.0}, "optimizer.eps is 0.0"),
        (Adafactor, {"decay_exponent": 0.0}, "optimizer.decay_exponent is 0.0"),
        (Adafactor, {"clip_threshold": -1.0}, "optimizer.clip_threshold is -1.0"),
        (Adafactor, {"least_scale": 0.0}, "optimizer.least_scale is 0.0"),
        (Adafactor, {"min_factored": 0}, "optimizer.min_factored is 0"),
    ],
)
def test_a_setting_out_of_range_is_named(kind, settings, says):
    with pytest.raises(UserError, match=says):
        kind(**settings)
