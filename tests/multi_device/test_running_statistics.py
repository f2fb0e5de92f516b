"""Running statistics of batch norm are those of the global batch, on any mesh and in any parts."""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.families._maps import BatchNorm, BatchNormConfig
from flax_transformers.objectives.base import LossTerms
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import batch_sharding
from flax_transformers.training.state import abstract_state, initialize_state
from flax_transformers.training.step import compile_train_step, make_train_step
from tests.families.parity import some_by_default

CONFIG, EPS = BatchNormConfig(rows=4, momentum=0.25), 1e-3
ROWS, FEATURES, STEPS = 32, 3, 2
BATCHES = np.random.default_rng(0).normal(2.0, 3.0, (STEPS, ROWS, 5, FEATURES)).astype(np.float32)


class Norm(nn.Module):
    """A batch norm and nothing else."""

    def example_inputs(self):
        return {"x": jnp.zeros((1, 5, FEATURES))}

    @nn.compact
    def __call__(self, x, deterministic=True):
        return BatchNorm(CONFIG, EPS, np.float32, name="norm")(x, deterministic=deterministic)


def terms(functions, variables, batch, rngs):
    y = Norm().apply({"params": variables}, batch["x"], deterministic="dropout" not in rngs)
    return LossTerms({"loss": (jnp.sum(y**3), jnp.float32(y.size), 1.0)}, {})


def trained(devices, micro_batches):
    """The state after two steps."""
    mesh, optimizer = make_mesh(MeshConfig(), devices=jax.devices()[:devices]), optax.sgd(0.1)
    step = make_train_step(SimpleNamespace(terms=terms), None, optimizer, micro_batches)
    with jax.set_mesh(mesh):
        abstract = abstract_state(Norm(), optimizer, 0, mesh)
        state = initialize_state(Norm(), optimizer, 0, abstract)
        step = compile_train_step(step, abstract, mesh)
        for x in BATCHES:
            state, _ = step(state, jax.device_put({"x": x}, batch_sharding(mesh)))
    return jax.device_get(state)


def expected():
    """Mean and variance after the steps, in float64."""
    mean, variance = np.zeros(FEATURES), np.ones(FEATURES)
    groups = ROWS // CONFIG.rows
    for x in BATCHES.astype(np.float64):
        of_groups = [x[group::groups].reshape(-1, FEATURES) for group in range(groups)]
        mean += CONFIG.momentum * (np.mean([one.mean(0) for one in of_groups], 0) - mean)
        unbiased = np.mean([one.var(0, ddof=1) for one in of_groups], 0)
        variance += CONFIG.momentum * (unbiased - variance)
    return {"norm": {"mean": mean, "variance": variance}}


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", some_by_default([1, 2, 4], [1, 4]))
@pytest.mark.parametrize("devices", some_by_default([1, 2, 8], [1, 8]))
def test_statistics_are_those_of_the_global_batch(devices, micro_batches):
    state = trained(devices, micro_batches)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5),
        state.model_state,
        expected(),
    )
    assert set(state.params["norm"]) == {"scale", "bias"}
