"""Runs with every optimizer: resumed after 7 of 20 steps, divided over a mesh, frozen in part."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints, restore_params
from flax_transformers.objectives.base import LossTerms, ModelFunctions
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import (
    LAMB,
    LARS,
    Adafactor,
    AdamW,
    Lion,
    Muon,
)
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import batch_sharding
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training.state import abstract_state, initialize_state
from flax_transformers.training.step import compile_train_step, make_train_step
from tests.families.parity import some_by_default

KINDS = {
    "adamw": AdamW(layer_decay=0.8, rate_factors=(("words", 0.5),)),
    "lamb": LAMB(),
    "lars": LARS(),
    "lion": Lion(),
    "muon": Muon(),
    "adafactor": Adafactor(min_factored=1),
    "frozen": Adafactor(min_factored=8, frozen=("words", "*/bias")),
}
STEPS = 20


class Layers(nn.Module):
    """A table [6, 8] and two stacked layers [8, 12] with a bias."""

    def example_inputs(self):
        return {"ids": jnp.zeros((1, 2), jnp.int32)}

    @nn.compact
    def __call__(self, ids):
        return {name: make(name=name)() for name, make in PARTS.items()}


class Part(nn.Module):
    """Parameters of the given shapes below ``folders``."""

    parameters: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    folders: tuple[str, ...] = ()

    @nn.compact
    def __call__(self):
        if self.folders:
            return Part(self.parameters, self.folders[1:], name=self.folders[0])()
        for name, shape, axes in self.parameters:
            boxed = nn.with_logical_partitioning(nn.initializers.normal(0.5), axes)
            self.param(name, boxed, shape, jnp.float32)
        return None


LAYER = (
    ("kernel", (2, 8, 12), ("layers", "embed", "mlp")),
    ("bias", (2, 12), ("layers", "mlp")),
)


def words(name):
    return Part((("embedding", (6, 8), ("vocab", "embed")),), name=name)


def stack(name):
    return Part(LAYER, ("layers", "block_0", "mlp", "up"), name=name)


PARTS = {"words": words, "stack": stack}


@dataclasses.dataclass(frozen=True)
class Squares:
    """The mean square of what the layers make of the words, and of their difference."""

    def terms(self, model, params, batch, rngs):
        layer = params["stack"]["layers"]["block_0"]["mlp"]["up"]
        hidden = params["words"]["embedding"][batch["ids"]]
        for k in range(2):
            out = jnp.tanh(hidden @ layer["kernel"][k] + layer["bias"][k, None, None])
            hidden = hidden + out[..., :8]
        square = jnp.sum((hidden - 1) ** 2)
        return LossTerms({"square": (square, jnp.float32(batch["ids"].size), 1.0)}, {})


def batches():
    drawn = np.random.RandomState(0).randint(0, 6, (STEPS, 8, 4)).astype(np.int32)
    return [{"ids": ids} for ids in drawn]


class Trainer:
    """A state on a mesh, and the compiled step."""

    def __init__(self, config, ema, sizes=(1, 1, 1)):
        self.mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        optimizer = config.make(STEPS)
        self.abstract = abstract_state(Layers(), optimizer, 0, self.mesh, ema=ema.is_on)
        with jax.set_mesh(self.mesh):
            self.state = initialize_state(Layers(), optimizer, 0, self.abstract)
        functions = ModelFunctions(None, None, None)
        step = make_train_step(Squares(), functions, optimizer, 1, frozen=config.frozen, ema=ema)
        self.step = compile_train_step(step, self.abstract, self.mesh)

    def train(self, batches):
        norms = []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                placed = jax.device_put(batch, batch_sharding(self.mesh))
                self.state, report = self.step(self.state, placed)
                norms.append(float(report.grad_norm))
        return norms


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_by_default(KINDS, ["adamw", "frozen"]))
def test_seven_steps_a_checkpoint_and_thirteen_more_are_twenty_steps_to_the_last_bit(
    kind, tmp_path
):
    ema = EMAConfig(0.99 if kind in ("lion", "frozen") else None)
    straight = Trainer(KINDS[kind], ema)
    fresh = jax.device_get(straight.state)
    straight.train(batches()[:7])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(7, straight.state, {})
    checkpoints.wait()
    straight.train(batches()[7:])
    resumed = Trainer(KINDS[kind], ema)
    resumed.state = checkpoints.restore_newest(resumed.abstract).state
    checkpoints.close()
    resumed.train(batches()[7:])
    assert_bit_equal(resumed.state, straight.state)
    moved = jax.tree.map(
        lambda a, b: (np.asarray(a) != b).any(), resumed.state.params, fresh.params
    )
    assert moved["words"]["embedding"] == (kind != "frozen")
    assert moved["stack"]["layers"]["block_0"]["mlp"]["up"]["kernel"]


@pytest.mark.slow
def test_the_average_is_what_a_checkpoint_gives_unless_told_otherwise(tmp_path):
    trainer = Trainer(AdamW(learning_rate=0.1), EMAConfig(0.9))
    trainer.train(batches()[:3])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, trainer.state, {})
    checkpoints.close()
    state = trainer.state
    assert (np.asarray(state.ema["words"]["embedding"]) != state.params["words"]["embedding"]).any()
    assert_bit_equal(restore_params(tmp_path), state.ema)
    assert_bit_equal(restore_params(tmp_path, trainer.abstract.params), state.ema)
    assert_bit_equal(restore_params(tmp_path, averaged=False), state.params)
    off = Trainer(AdamW(), EMAConfig())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    restored = checkpoints.restore_newest(off.abstract).state
    assert restored.ema is None
    assert_bit_equal(restored.params, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_by_default(KINDS, ["muon", "adafactor"]))
def test_a_divided_run_is_the_run_on_one_device(kind):
    alone = Trainer(KINDS[kind], EMAConfig(0.9))
    divided = Trainer(KINDS[kind], EMAConfig(0.9), (2, 2, 2))
    norms = [trainer.train(batches()[:10]) for trainer in (alone, divided)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)


def test_factored_statistics_are_divided_along_the_axes_they_keep():
    abstract = Trainer(Adafactor(min_factored=1), EMAConfig(0.9), (2, 2, 2)).abstract
    found = {
        jax.tree_util.keystr(path[-4:]).replace("['", "/").replace("']", ""): tuple(
            leaf.sharding.spec
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
        if leaf.ndim
    }
    kinds = {
        (leaf.shape, tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(abstract.opt_state)
    }
    assert kinds == {
        ((), ()),
        ((6,), ("tensor",)),
        ((8,), ("fsdp",)),
        ((2, 8), (None, "fsdp")),
        ((2, 12), (None, "tensor")),
    }, found
    assert jax.tree.map(lambda x: x.sharding, abstract.ema) == jax.tree.map(
        lambda x: x.sharding, abstract.params
    )


@pytest.mark.slow
def test_gradients_of_frozen_parameters_are_not_computed():
    def flops(frozen):
        trainer = Trainer(AdamW(frozen=frozen), EMAConfig())
        with jax.set_mesh(trainer.mesh):
            compiled = trainer.step.lower(trainer.abstract, batches()[0]).compile()
        return compiled.cost_analysis()["flops"]

    # Of each layer's three products of 2 * 32 * 8 * 12 operations the last goes: its gradient.
    assert flops(()) - flops(("stack",)) > 2 * (2 * 32 * 8 * 12)
