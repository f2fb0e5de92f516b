"""What a config computes on a mesh: training and planning build it here, so that what is planned
is what will run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh

from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Totals
from flax_transformers.monitoring.model_flops import frozen_names, step_flops
from flax_transformers.monitoring.throughput import StepMetrics
from flax_transformers.optim.optimizers import learning_rate_at
from flax_transformers.optim.selection import Axes, logical_axes
from flax_transformers.parallel.cpu_products import bfloat16_instructions
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.parallel.rules import check_batch_size, check_sequence_length
from flax_transformers.training.config import AnyPhase, ImagePhase, TrainConfig
from flax_transformers.training.trainer import Trainer

log = logging.getLogger(__name__)


def checked_mesh(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run. Raises UserError if it does not fit the devices, or a batch the mesh."""
    mesh = make_mesh(config.mesh, devices)
    check_batches(config, mesh)
    return mesh


def check_batches(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError unless the batches of all phases and of the evaluation, and the positions of
    their rows, divide over the mesh."""
    for phase in config.phases:
        check_batch_size(phase.batch_size, phase.micro_batches, mesh)
        length = None if isinstance(phase, ImagePhase) else phase.sequence_length
        check_sequence_length(length, mesh)
    check_batch_size(config.evaluation.batch_size, 1, mesh, name="evaluation.batch_size")


def fastest_compute(compute: ComputeConfig, platform: str, device_count: int) -> ComputeConfig:
    """``compute`` in bfloat16 where it leaves the dtype open, and the only device is a CPU with
    instructions for it."""
    if compute.dtype != "auto" or platform != "cpu" or device_count > 1:
        return compute
    instructions = bfloat16_instructions()
    if not instructions:
        return compute
    log.info(
        "computing in bfloat16, for which this processor has instructions (%s); set compute.dtype "
        "to float32 if rounding matters more than speed",
        ", ".join(instructions),
    )
    # A single device reduces nothing, so its gradients stay as they were summed.
    return replace(compute, dtype="bfloat16", gradient_reduce_dtype="float32")


def make_trainer(config: TrainConfig, mesh: Mesh) -> Trainer:
    """The trainer of a config. Computes and allocates nothing: see ``Trainer``.

    Raises UserError for a model that lacks what the objective needs.
    """
    return Trainer(
        model=build_model(config.model, config.compute.resolve(mesh.devices.flat[0].platform)),
        objective=config.objective,
        optimizer=config.optimizer,
        mesh=mesh,
        ema=config.ema,
        lora=config.lora,
        skip_spikes_above=config.skip_spikes_above,
        max_consecutive_skips=config.max_consecutive_skips,
        total_steps=config.total_steps,
        module_norms=config.logging.module_norms,
    )


@functools.cache
def shapes_and_axes(model: TransformerConfig) -> tuple[Any, Axes]:
    """Shapes of the parameters of a model, and their logical axes."""
    boxed = boxed_shapes(build_model(model))
    return nn.meta.unbox(boxed), logical_axes(boxed)


def phase_flops(config: TrainConfig, phase: AnyPhase) -> float:
    """Matmul FLOPs of one step of a phase."""
    params, axes = shapes_and_axes(config.model)
    return step_flops(
        config.model,
        config.objective,
        params,
        axes,
        batch_size=phase.batch_size,
        sequence_length=phase.sequence_length,
        frozen=frozen_names(config.model, config.optimizer, config.lora, params),
    )


def make_step_metrics(
    config: TrainConfig,
    phase: AnyPhase,
    mesh: Mesh,
    clock: Clock,
    totals: Totals | None = None,
) -> StepMetrics:
    """What measures the steps of a phase."""
    return StepMetrics(
        mesh,
        clock,
        totals,
        batch_size=phase.batch_size,
        flops_per_step=phase_flops(config, phase),
        learning_rate=learning_rate_at(config.optimizer, config.total_steps),
        max_consecutive_skips=config.max_consecutive_skips,
    )
