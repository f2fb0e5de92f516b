"""A model, an objective and an optimizer on a mesh: their state, and the steps of training."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from flax_transformers import ranges
from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Accumulator, fetched_one_behind
from flax_transformers.monitoring.progress import Progress
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.monitoring.throughput import StepMetrics
from flax_transformers.objectives.base import ModelFunctions, Objective
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import OptimizerConfig, OptimizerFactory, learning_rate_at
from flax_transformers.optim.selection import logical_axes, partition
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.parallel.mesh import AXES, make_mesh
from flax_transformers.parallel.rules import batch_sharding, check_batch_size
from flax_transformers.training.callbacks import Callback, Listeners
from flax_transformers.training.state import TrainState, abstract_state, initialize_state
from flax_transformers.training.step import (
    check_fits,
    compile_evaluation_step,
    compile_train_step,
    make_evaluation_step,
    make_train_step,
    model_functions,
)

log = logging.getLogger(__name__)

HostBatch = Mapping[str, Any]
"""Arrays [batch, ...] by name: on the mesh, or in numpy the rows of this process."""


class Trainer:
    """Trains ``model`` on ``objective`` with ``optimizer``, on ``mesh``.

    ``model``: a Linen module of this package, or a config of one. ``optimizer``: an
    optax transformation, or a config such as ``AdamW(...)``, whose schedule runs over
    ``total_steps``. ``mesh``: of ``ft.make_mesh``; by default data parallelism over all devices.
    ``micro_batches``: gradient-accumulation steps. ``ema``, ``lora``, ``skip_spikes_above``,
    ``max_consecutive_skips`` and ``module_norms`` are as in ``TrainConfig`` and its ``Logging``.

    Nothing is computed or allocated before ``init``, so the devices of ``mesh`` need not be there.
    Raises UserError for a model that lacks what the objective needs, or a layer named in ``lora``.
    """

    def __init__(
        self,
        *,
        model: nn.Module | TransformerConfig,
        objective: Objective,
        optimizer: optax.GradientTransformation | OptimizerFactory,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
        ema: EMAConfig = EMAConfig(),  # noqa: B008 (frozen)
        lora: LoraConfig = LoraConfig(),  # noqa: B008 (frozen)
        skip_spikes_above: float | None = None,
        max_consecutive_skips: int = 20,
        total_steps: int | None = None,
        module_norms: bool = False,
    ) -> None:
        self.mesh = make_mesh() if mesh is None else mesh
        if not {*AXES} <= {*self.mesh.axis_names}:
            raise UserError(f"the mesh lacks one of the axes {', '.join(AXES)}; use ft.make_mesh")
        if isinstance(model, TransformerConfig):
            compute = ComputeConfig(dtype="auto").resolve(self.mesh.devices.flat[0].platform)
            model = build_model(model, compute)
        check_fits(objective, model)
        self.model, self.objective, self.ema, self.lora = model, objective, ema, lora
        self.functions: ModelFunctions = model_functions(model)
        boxed, self.adapters = adapted_shapes(model, lora)
        base = () if self.adapters is None else self.adapters.frozen
        self.frozen: tuple[str, ...] = getattr(optimizer, "frozen", ()) + base
        self.learning_rate: optax.Schedule | None = None
        if not isinstance(optimizer, optax.GradientTransformation):
            if total_steps is None:
                raise UserError(
                    f"the optimizer {type(optimizer).__name__} has a schedule; give Trainer the "
                    "total_steps that it runs over"
                )
            self.learning_rate = learning_rate_at(optimizer, total_steps)
            # Only the optimizers of this package tell parameters apart by their logical axes.
            if isinstance(optimizer, OptimizerConfig):
                if base:
                    optimizer = dataclasses.replace(optimizer, frozen=self.frozen)
                optimizer, base = optimizer.make(total_steps, logical_axes(boxed)), ()
            else:
                optimizer = optimizer.make(total_steps)
        self.optimizer = _without(optimizer, base) if base else optimizer
        self.micro_batches, self.skip_spikes_above = micro_batches, skip_spikes_above
        self.max_consecutive_skips, self.module_norms = max_consecutive_skips, module_norms

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state.

        Raises UserError if a parameter does not divide over the mesh."""
        return abstract_state(
            self.model, self.optimizer, 0, self.mesh, ema=self.ema.is_on, adapters=self.adapters
        )

    @functools.cached_property
    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of what the model reads: parameters without adapters, and
        running statistics."""
        return base_of(self.abstract.variables)

    def model_params(self, state: TrainState, *, averaged: bool = True) -> Any:
        """The parameters to evaluate: the average if one is kept, with adapters merged into it."""
        params = state.evaluation_params if averaged else state.variables
        return params if self.adapters is None else self._merge(params)

    @functools.cached_property
    def _merge(self) -> Callable[[Any], Any]:
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return compiled_together(jax.jit(self._of_model, out_shardings=placed))

    def _of_model(self, params: Any) -> Any:
        """From the parameters of the state to those of the model."""
        return params if self.adapters is None else merged(params, self.lora.scale)

    def train_step(self, micro_batches: int | None = None) -> jax.stages.Wrapped:
        """The jitted ``(state, batch) -> (state, StepReport)``, to be called or lowered under
        ``jax.set_mesh(trainer.mesh)``; it donates its state."""
        compute = getattr(self.model, "compute", None)
        compute = compute if isinstance(compute, ComputeConfig) else ComputeConfig()
        step = make_train_step(
            self.objective,
            self.functions,
            self.optimizer,
            micro_batches or self.micro_batches,
            frozen=self.frozen,
            of_model=self._of_model,
            ema=self.ema,
            gradient_reduce_dtype=compute.gradient_reduce_dtype,
            skip_spikes_above=self.skip_spikes_above,
            with_module_norms=self.module_norms,
            in_place=self.mesh.devices.flat[0].platform == "cpu",
        )
        return compile_train_step(step, self.abstract, self.mesh)

    def evaluation_step(self) -> jax.stages.Wrapped:
        """The jitted ``(params, batch) -> {metric: (sum, count)}``, without dropout."""
        step = make_evaluation_step(self.objective, self.functions)
        return compile_evaluation_step(step, self.abstract_params, self.mesh)

    def init(self, seed: int = 0, params: Any = None) -> TrainState:
        """A fresh state on the mesh. Parameters of the model are a copy of ``params``, or drawn by
        ``seed``, as adapters are.

        Raises UserError for ``params`` of another model.
        """
        with jax.set_mesh(self.mesh):
            state = initialize_state(self.model, self.optimizer, seed, self.abstract, self.adapters)
            if params is None:
                return state
            return state.starting_from(self._copied(params), self.optimizer)

    def _copied(self, params: Any) -> Any:
        wanted = self.abstract_params
        _require_same_parameters(params, wanted)
        placed = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        given = jax.tree.map(jax.device_put, params, placed)
        # A step donates the state: the caller's arrays must not go with it.
        copy = jax.jit(
            lambda tree: jax.tree.map(lambda a, w: jnp.array(a, w.dtype, copy=True), tree, wanted),
            out_shardings=placed,
        )
        return copy(given)

    def place(self, batch: HostBatch, *, micro_batches: int | None = None) -> dict[str, jax.Array]:
        """A batch on the mesh, divided over its data axes.

        Arrays in numpy are this process's rows; all of them, where there is one process. Raises
        UserError for a batch that does not divide over the mesh and ``micro_batches``, by default
        those of a step.
        """
        sharding = batch_sharding(self.mesh)
        arrays = {name: leaf for name, leaf in batch.items() if name != "example_id"}
        if jax.process_count() == 1:
            parts = self.micro_batches if micro_batches is None else micro_batches
            check_batch_size(len(next(iter(arrays.values()))), parts, self.mesh)

        def put(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, sharding)
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return {name: put(leaf) for name, leaf in arrays.items()}

    @functools.cached_property
    def _take_step(self) -> Callable[..., Any]:
        return compiled_together(self.train_step())

    @functools.cached_property
    def _evaluate(self) -> Callable[..., Any]:
        return compiled_together(self.evaluation_step())

    def step(self, state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step: the new state, and the step's metrics ("train/loss" ...) on the device.

        ``state`` is donated: its arrays are gone after the call. It is the step that ``train``
        runs, and skips like it batches whose gradients are not finite.
        """
        batch = self.place(batch)
        with jax.set_mesh(self.mesh):
            state, report = self._take_step(state, batch)
            return state, report.means()

    def fit(
        self,
        state: TrainState,
        batches: Iterable[HostBatch],
        *,
        steps: int,
        callbacks: Sequence[Callback] = (),
        sinks: Sequence[MetricSink] | None = None,
        log_every: int = 10,
    ) -> TrainState:
        """Takes ``steps`` steps, fewer where ``batches`` end before, and returns the new state.

        ``state`` is donated, as by ``step``. A callback may stop it before. Metrics are means over
        ``log_every`` steps. ``sinks``, by default a line on the console, are closed at the end.
        Raises TooManySkipped for more than ``max_consecutive_skips`` skipped steps in a row, and
        UserError for a ``log_every`` below 1.
        """
        ranges.check_number("log_every", log_every, ranges.integers())
        step = first = int(state.step)
        last = first + steps
        sinks = [Progress(last, first)] if sinks is None else sinks
        listeners = Listeners(callbacks, sinks)
        step_metrics = StepMetrics(
            self.mesh,
            Clock(),
            learning_rate=self.learning_rate,
            max_consecutive_skips=self.max_consecutive_skips,
        )
        with listeners.training(first, last):
            for batch in itertools.islice(batches, steps):
                placed = self.place(batch)
                with jax.set_mesh(self.mesh), jax.transfer_guard("disallow"):
                    state, report = self._take_step(state, placed)
                    step_metrics.fetch_previous()
                step_metrics.sent(report, len(next(iter(placed.values()))))
                step += 1
                listeners.step(step, state)
                if step == last or step % log_every == 0:
                    listeners.metrics(step, step_metrics.row(step))
                if listeners.stop_reason is not None:
                    log.warning("a callback stops at step %d: %s", step, listeners.stop_reason)
                    break
            if step < last:
                if listeners.stop_reason is None:
                    log.warning("the batches ended after step %d of %d", step, last)
                if step > first and step % log_every:
                    listeners.metrics(step, step_metrics.row(step))
        return state

    def evaluate(self, state: TrainState, batches: Iterable[HostBatch]) -> dict[str, float]:
        """Scores over all examples of ``batches`` ("eval/loss" ...), without dropout.

        They are those of the average of the parameters, where one is kept. A last batch that is
        smaller than the first is filled up with zeros, which by contract weigh nothing.
        """
        totals, rows = Accumulator(), 0
        with jax.set_mesh(self.mesh):
            params = self.model_params(state)

        def score(batch: HostBatch) -> Any:
            nonlocal rows
            count = len(next(iter(batch.values())))
            rows = rows or count
            if count < rows:
                padding = [(0, rows - count)]
                batch = {
                    name: np.pad(leaf, padding + [(0, 0)] * (np.ndim(leaf) - 1))
                    for name, leaf in batch.items()
                }
            placed = self.place(batch, micro_batches=1)
            with jax.set_mesh(self.mesh):
                return self._evaluate(params, placed)

        for sums in fetched_one_behind(map(score, batches)):
            totals.add(sums)
        return {f"eval/{name}": mean for name, mean in totals.means().items()}


def _without(
    optimizer: optax.GradientTransformation, frozen: tuple[str, ...]
) -> optax.GradientTransformation:
    """``optimizer`` on the parameters that no pattern of ``frozen`` matches."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(gradients, state, partition(params, frozen)[0])

    return optax.GradientTransformation(
        lambda params: optimizer.init(partition(params, frozen)[0]), update
    )


def _require_same_parameters(params: Any, wanted: Any) -> None:
    """Raises UserError naming a parameter that is missing, too many or of another shape."""
    given, asked = (
        {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (params, wanted)
    )
    for name in sorted(given.keys() | asked.keys()):
        if given.get(name) != asked.get(name):
            raise UserError(
                f"params has {name} of shape {given.get(name, 'none')}, but the model has "
                f"{asked.get(name, 'none')}; give parameters of the Trainer's model, as "
                "load_pretrained returns them"
            )
