"""Training batches with the logits of a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from flax_transformers.distillation.objectives import LOGITS
from flax_transformers.objectives.base import Batch, Params
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.parallel.rules import batch_sharding
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.resume import Batches, OnlineBatches, Run
from flax_transformers.training.run_state import RunPosition
from flax_transformers.training.step import compile_evaluation_step, model_functions

LoadTeacher = Callable[[Mesh], tuple[nn.Module, Any]]
"""Gives the teacher's model, and its parameters on a mesh."""


def taught_batches(load: LoadTeacher) -> OnlineBatches:
    """The batches of a run's data, each with the logits of the teacher.

    They depend on neither the student nor the step, so that the loss is the same for any number of
    micro-batches and devices, and a resumed run repeats them.
    """
    found: dict[Mesh, Any] = {}  # read once for all phases

    @contextlib.contextmanager
    def batches(run: Run, position: RunPosition, state: Callable[[], Any]) -> Iterator[Batches]:
        if run.mesh not in found:
            model, params = load(run.mesh)
            found[run.mesh] = _compiled(run.config.objective, model, params, run.mesh), params
        step, params = found[run.mesh]
        with batches_on_mesh(run.config, run.prepared, run.mesh, position) as plain:
            yield ((batch | {LOGITS: step(params, batch)}, ids) for batch, ids in plain)

    return batches


def _compiled(objective: Any, model: nn.Module, params: Any, mesh: Mesh) -> Callable[..., Any]:
    functions = model_functions(model)

    def teacher_step(params: Params, batch: Batch) -> jax.Array:
        return objective.teacher_logits(functions, params, batch)

    return compiled_together(
        compile_evaluation_step(teacher_step, params, mesh, batch_sharding(mesh))
    )
