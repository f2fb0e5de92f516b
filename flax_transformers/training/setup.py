"""What a run computes on its mesh: the model, the optimizer, and the steps made of them.

Training and planning build it here, so that what is planned is what will run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Totals
from flax_transformers.monitoring.model_flops import step_flops
from flax_transformers.monitoring.throughput import Meter
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.optim.optimizers import learning_rate_at, make_optimizer
from flax_transformers.parallel.rules import check_batch, check_length
from flax_transformers.training.config import AnyPhase, ImagePhase, TrainConfig
from flax_transformers.training.state import TrainState, abstract_state, initialize_state
from flax_transformers.training.step import (
    check_fits,
    compile_evaluation_step,
    compile_train_step,
    make_evaluation_step,
    make_train_step,
    model_functions,
)


@dataclass(frozen=True)
class Program:
    """A config on a mesh. Its steps are to be called, or lowered, under ``jax.set_mesh(mesh)``."""

    config: TrainConfig
    mesh: Mesh
    model: nn.Module
    functions: ModelFunctions
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """Shapes, dtypes and shardings of the state."""

    def initial_state(self) -> TrainState:
        """A fresh state on the mesh."""
        return initialize_state(self.model, self.optimizer, self.config.seed, self.abstract)

    def train_step(self, phase: AnyPhase) -> jax.stages.Wrapped:
        """The jitted ``(state, batch) -> (state, report)`` of a phase, which donates its state."""
        step = make_train_step(
            self.config.objective,
            self.functions,
            self.optimizer,
            phase.micro_batches,
            frozen=self.config.optimizer.frozen,
            ema=self.config.ema,
            gradient_reduce_dtype=self.config.compute.gradient_reduce_dtype,
            skip_spikes_above=self.config.skip_spikes_above,
        )
        return compile_train_step(step, self.abstract, self.mesh)

    def evaluation_step(self) -> jax.stages.Wrapped:
        """The jitted ``(params, batch) -> metric sums``."""
        step = make_evaluation_step(self.config.objective, self.functions)
        return compile_evaluation_step(step, self.abstract.params, self.mesh)


def check_phase(phase: AnyPhase, mesh: Mesh) -> None:
    """Raises UserError unless the rows of a phase, and their places, divide over the mesh."""
    check_batch(phase.batch_size, phase.micro_batches, mesh)
    check_length(None if isinstance(phase, ImagePhase) else phase.sequence_length, mesh)


def build_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Computes and allocates nothing: the devices of ``mesh`` need not be there.

    Raises UserError for a model that lacks what the objective needs, and for parameters that do not
    divide over the mesh or that the optimizer's patterns do not fit.
    """
    model = config.model.build(config.compute.resolve(mesh.devices.flat[0].platform))
    check_fits(config.objective, model)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    abstract = abstract_state(model, optimizer, config.seed, mesh, ema=config.ema.is_on)
    return Program(config, mesh, model, model_functions(model), optimizer, abstract)


def phase_flops(config: TrainConfig, phase: AnyPhase, params: Any) -> float:
    """Matmul FLOPs of one step of a phase; ``params`` are parameters or their shapes."""
    return step_flops(
        config.model,
        config.objective,
        params,
        batch_size=phase.batch_size,
        sequence_length=phase.sequence_length,
    )


def make_meter(
    config: TrainConfig,
    phase: AnyPhase,
    params: Any,
    mesh: Mesh,
    clock: Clock,
    totals: Totals | None = None,
) -> Meter:
    """What measures the steps of a phase; ``params`` are parameters or their shapes."""
    return Meter(
        mesh,
        clock,
        totals,
        batch_size=phase.batch_size,
        sequence_length=None if isinstance(phase, ImagePhase) else phase.sequence_length,
        flops_per_step=phase_flops(config, phase, params),
        learning_rate=learning_rate_at(config.optimizer, config.total_steps),
        max_consecutive_skips=config.max_consecutive_skips,
    )
