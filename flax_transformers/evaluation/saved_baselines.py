"""What a run has to beat, computed once and kept in its workdir."""

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
from flax_transformers.data.images.dataset import PreparedImages
from flax_transformers.data.mixture import PreparedMixture
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.scores import baselines
from flax_transformers.storage.workdir import read_side_file, write_text
from flax_transformers.training.config import TrainConfig
from flax_transformers.version import __version__

BASELINES = "baselines.json"
_FIELDS = [field.name for field in dataclasses.fields(Baseline)]


def baselines_of_run(config: TrainConfig, prepared: Dataset, workdir: epath.Path) -> list[Baseline]:
    """`baselines`, read from the workdir where it holds those of the same data and settings.

    A first run leaves them there at once, for when it is stopped; `keep_baselines` replaces those
    of another run once this one has been let into the workdir.
    """
    asked = _fingerprint(config, prepared)
    text = read_side_file(workdir / BASELINES)
    if text is None:
        found = baselines(config, prepared)
        keep_baselines(config, prepared, workdir, found)
        return found
    return _saved(text, asked) or baselines(config, prepared)


def _saved(text: str, asked: str) -> list[Baseline]:
    """Those that were written down; none of another run, of another version, or damaged ones."""
    try:
        rows = json.loads(text)
        if all(row["of"] == asked and row["checksum"] == _checksum(row) for row in rows):
            return [Baseline(**{name: row[name] for name in _FIELDS}) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return []


def keep_baselines(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path, found: Sequence[Baseline]
) -> None:
    """Writes them down, each with what it belongs to."""
    if jax.process_index() != 0:
        return
    of = _fingerprint(config, prepared)
    rows = [{**dataclasses.asdict(one), "counted": one.counted, "of": of} for one in found]
    for row in rows:
        row["checksum"] = _checksum(row)
    write_text(workdir / BASELINES, json.dumps(rows, indent=1) + "\n")


def _checksum(row: dict[str, Any]) -> str:
    """Of a row without its checksum."""
    rest = {name: value for name, value in row.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(config: TrainConfig, prepared: Dataset) -> str:
    """Of all that a guess or its score depends on: the data and how they are read and scored."""
    settings = [
        config.objective,
        config.data,
        config.model,
        config.evaluation,
        config.phases[-1].sequence_length,
        config.seed,
    ]
    parts = prepared.parts if isinstance(prepared, PreparedMixture) else (prepared,)
    held_out = [
        part.validation and part.validation.fingerprint
        for part in parts
        if isinstance(part, PreparedText | PreparedImages)
    ]
    made_of = [__version__, prepared.fingerprint, held_out, *map(to_json, settings)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
