"""The training step of this package; started by ``benchmarks/step_time.py``.

python benchmarks/steps/ours.py '{"preset": "cpu", "model": "bert-base", "dtype": "float32", ...}'
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from steps.cases import PRESETS, Case
from steps.turns import serve

from flax_transformers import runtime
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.training.trainer import Trainer


def main(options: dict[str, Any]) -> None:
    runtime.start(None)
    case = PRESETS[options["preset"]][options["model"]]
    trainer = trainer_of(case, options["dtype"], scan=options["scan"])
    step = steps_of(trainer, case)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    leaves = jax.tree.leaves(trainer.abstract.params)
    about = {"parameters": sum(leaf.size for leaf in leaves), "device": jax.default_backend()}
    serve(step, {"versions": versions} | about)


def trainer_of(case: Case, dtype: Any, *, scan: bool, remat: Any = "none") -> Trainer:
    """The trainer of a case, with the optimizer of ``theirs.py``."""
    compute = ComputeConfig(dtype=dtype, scan_layers=scan, remat=remat)
    compute = compute.resolve(jax.default_backend())
    return Trainer(
        model=build_model(case.model, compute),
        objective=case.objective,
        optimizer=AdamW(no_decay=("bias", "scale")),
        total_steps=1000,
    )


def steps_of(trainer: Trainer, case: Case) -> Callable[[], float]:
    """What takes the next step of a new state, and returns its loss."""
    state, batch = trainer.init(), trainer.place(case.rows())

    def step() -> float:
        nonlocal state
        state, means = trainer.step(state, batch)
        jax.block_until_ready(state)
        return float(means["train/loss"])

    return step


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
