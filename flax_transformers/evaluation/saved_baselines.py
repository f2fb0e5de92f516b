"""The baselines of a run, computed once and kept in ``baselines.json`` of its workdir."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from flax_transformers.config_json import to_json
from flax_transformers.data.dataset import Dataset
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.tasks import Sets, baselines
from flax_transformers.storage.workdir import read_side_file, write_side_file
from flax_transformers.training.config import TrainConfig

BASELINES = "baselines.json"
VERSION = 2
"""To be raised when a baseline changes, so that saved ones are computed again."""
_FIELDS = [field.name for field in dataclasses.fields(Baseline)]


def baselines_of_run(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path, sets: Sets = ()
) -> list[Baseline]:
    """`baselines`, read from the workdir if it holds those of the same data and settings.

    The first run of a workdir writes them at once, so that a restart finds them. Those of another
    run are replaced later, by `keep_baselines`, once this run has passed the workdir's checks.
    """
    asked = _fingerprint(config, prepared, sets)
    text = read_side_file(workdir / BASELINES)
    if text is None:
        found = baselines(config, prepared, sets)
        keep_baselines(config, prepared, workdir, found, sets)
        return found
    return _saved(text, asked) or baselines(config, prepared, sets)


def read_baselines(workdir: epath.Path) -> list[Baseline]:
    """The baselines that a run has kept in its workdir; none if there are none, or damaged ones."""
    return _saved(read_side_file(workdir / BASELINES) or "", None)


def _saved(text: str, asked: str | None) -> list[Baseline]:
    """The saved baselines; none if they are damaged, or not those of the run ``asked`` for."""
    try:
        rows = json.loads(text)
        if all(asked in (None, row["of"]) and row["checksum"] == _checksum(row) for row in rows):
            return [Baseline(**{name: row[name] for name in _FIELDS}) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return []


def keep_baselines(
    config: TrainConfig,
    prepared: Dataset,
    workdir: epath.Path,
    found: Sequence[Baseline],
    sets: Sets = (),
) -> None:
    """Writes the baselines, each with the fingerprint of its run."""
    if jax.process_index() != 0:
        return
    of = _fingerprint(config, prepared, sets)
    rows = [{**dataclasses.asdict(one), "counted": one.counted, "of": of} for one in found]
    for row in rows:
        row["checksum"] = _checksum(row)
    write_side_file(workdir / BASELINES, json.dumps(rows, indent=1) + "\n")


def _checksum(row: dict[str, Any]) -> str:
    """The checksum of a row's other fields."""
    rest = {name: value for name, value in row.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(config: TrainConfig, prepared: Dataset, sets: Sets) -> str:
    """A hash of all that a baseline depends on: the data, and how they are read and scored."""
    settings = [
        config.objective,
        config.data,
        config.model,
        config.evaluation,
        config.phases[-1].sequence_length,
        config.seed,
    ]
    held_out = [part.held_out_fingerprint for _, part in (*prepared.components, *sets)]
    made_of = [VERSION, prepared.fingerprint, held_out, *map(to_json, settings)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
