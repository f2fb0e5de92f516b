"""What a report shows of runs and sweeps, read from their folders."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from flax_transformers.checkpointing.step_directories import finished_steps
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import FILE_NAME, read_metrics
from flax_transformers.reporting.attention_charts import AttentionMaps

_TABLE = "table.jsonl"
_RECORD = "sweep.json"
"""Of a sweep and of each of its trainings, as `sweeps.runner` writes it."""


@dataclass(frozen=True)
class Picture:
    """A PNG file as the ``uri`` of an image that is part of the page."""

    title: str
    uri: str


@dataclass(frozen=True)
class Text:
    """A text file of a run."""

    title: str
    content: str


@dataclass(frozen=True)
class ReportedRun:
    """A run, with those of the newest step of each kind of its files.

    ``config``: values by the path of their field, as text. ``rows``: those of `read_metrics`.
    ``baselines``: scores without a model, of baselines.json. ``attention``: of the model, which
    `read` does not read.
    """

    name: str
    folder: epath.Path
    config: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    baselines: Sequence[Mapping[str, Any]]
    samples: Text | None
    reports: Sequence[Text]
    pictures: Sequence[Picture]
    attention: Sequence[AttentionMaps] = ()
    attention_note: str = ""
    """What the maps are of, or why there are none."""


@dataclass(frozen=True)
class SweepTable:
    """The records of a sweep's table.jsonl, which is empty before the first table, and its plot;
    how many of its ``runs`` are ``finished``."""

    name: str
    folder: epath.Path
    records: Sequence[Mapping[str, Any]]
    plot: Picture | None
    finished: int
    runs: int


def read(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[ReportedRun], list[SweepTable]]:
    """The runs among ``paths`` and in the sweeps among them, and the sweeps, in order.

    Raises UserError for a folder that is neither.
    """
    _names([os.fspath(path) for path in paths])  # refuses what is given twice
    runs: dict[str, epath.Path] = {}
    sweeps: dict[str, epath.Path] = {}
    for path in paths:
        folder = epath.Path(path).expanduser()
        if _is_sweep(folder):
            sweeps[str(folder)] = folder
            runs |= {str(one): one for one in _trainings(folder) if (one / FILE_NAME).exists()}
        elif (folder / FILE_NAME).exists():
            runs[str(folder)] = folder
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.stat(folder / FILE_NAME)  # raises PermissionError where `exists` is False
            raise UserError(
                f"{os.fspath(path)} has none of {FILE_NAME}, {_TABLE} and the {_RECORD} of a "
                "sweep; give the workdir of a run that has logged a step, or of a sweep"
            )
    names = dict(zip([*runs, *sweeps], _names([*runs, *sweeps]), strict=True))
    return (
        [_run(names[path], folder) for path, folder in runs.items()],
        [_sweep(names[path], folder) for path, folder in sweeps.items()],
    )


def _is_sweep(folder: epath.Path) -> bool:
    return (folder / _TABLE).exists() or "base" in _record(folder)


def _trainings(folder: epath.Path) -> list[epath.Path]:
    """The workdirs in the folder of a sweep, by name."""
    return sorted(one for one in folder.iterdir() if "config" in _record(one))


def _record(folder: epath.Path) -> dict[str, Any]:
    """The record of a sweep or of one of its trainings; empty if there is none."""
    try:
        found = json.loads(_text(folder / _RECORD) or "{}")
    except ValueError:  # damaged, and written again when the sweep goes on
        return {}
    return found if isinstance(found, dict) else {}


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a run is given twice; give each once")


def _run(name: str, folder: epath.Path) -> ReportedRun:
    config = _json(folder / "config.json", "{}")
    rows = read_metrics(folder)
    steps = [row["step"] for row in rows] + finished_steps(folder / "checkpoints")
    last = max(steps, default=0)  # a stop saves without a row, and `evaluate` may have scored it
    samples = _texts(folder / "samples", ".txt", last)
    return ReportedRun(
        name,
        folder,
        dict(_leaves(config)),
        rows,
        _json(folder / "baselines.json", "[]"),
        samples[0] if samples else None,
        _texts(folder / "evaluation", ".classes.txt", last),
        [
            *_pictures("reconstructions", folder / "samples", ".png", last),
            *_pictures("confusion matrix", folder / "evaluation", ".confusion.png", last),
        ],
    )


def _sweep(name: str, folder: epath.Path) -> SweepTable:
    lines = (_text(folder / _TABLE) or "").splitlines()
    plot = folder / "plot.png"
    picture = _picture("scores of all runs, plot.png", plot) if plot.exists() else None
    records = {one.name: _record(one) for one in _trainings(folder)}
    runs = _record(folder).get("runs", [*records])  # those of earlier sweeps are not listed
    ended = [run for run in runs if records.get(run, {}).get("finished_step") is not None]
    table = [_parsed(folder / _TABLE, line) for line in lines]
    return SweepTable(name, folder, table, picture, len(ended), len(runs))


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Paths and JSON texts of the values of a config."""
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        pairs = {str(number): one for number, one in enumerate(value)}.items()
    else:
        return [(path, value if isinstance(value, str) else json.dumps(value))]
    return [
        leaf for key, one in pairs for leaf in _leaves(one, f"{path}.{key}" if path else str(key))
    ]


def _json(path: epath.Path, default: str) -> Any:
    """The content of a file, or of ``default`` without one."""
    return _parsed(path, _text(path) or default)


def _parsed(path: epath.Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, and it is left out of the report"
        ) from error


def _text(path: epath.Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.exists() else None


def _newest(folder: epath.Path, ending: str, last: int) -> list[epath.Path]:
    """The files step_N.ENDING and step_N.PART.ENDING of the newest step: that of the whole data
    first, then those of components and evaluation sets, by name.

    Files of steps after the ``last`` one are from before the run went back to a checkpoint.
    """
    if not folder.exists():
        return []
    pattern = re.compile(rf"step_(\d+)(\..+)?{re.escape(ending)}")
    steps: dict[int, list[tuple[str, epath.Path]]] = {}
    for path in folder.iterdir():
        if (match := pattern.fullmatch(path.name)) and int(match[1]) <= last:
            steps.setdefault(int(match[1]), []).append((match[2] or "", path))
    return [path for _, path in sorted(steps[max(steps)])] if steps else []


def _texts(folder: epath.Path, ending: str, last: int) -> list[Text]:
    paths = _newest(folder, ending, last)
    return [Text(_title(path, ending), (_text(path) or "").strip("\n")) for path in paths]


def _pictures(what: str, folder: epath.Path, ending: str, last: int) -> list[Picture]:
    paths = _newest(folder, ending, last)
    return [_picture(f"{what}, {_title(path, ending)}", path) for path in paths]


def _picture(title: str, path: epath.Path) -> Picture:
    data = base64.b64encode(path.read_bytes()).decode()
    return Picture(title, f"data:image/png;base64,{data}")


def _title(path: epath.Path, ending: str) -> str:
    """ "step 1,200, cs" for step_00001200.cs.txt."""
    step, _, part = path.name.removesuffix(ending).partition(".")
    title = f"step {int(step.removeprefix('step_')):,}"
    return f"{title}, {part}" if part else title
