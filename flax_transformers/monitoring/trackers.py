"""Sinks of metric trackers, to name in ``logging.sinks`` of a config: W&B, MLflow, Trackio, CSV.

Each is a config that opens the sink; its client is imported then. A resumed run continues the run
of the tracker, whose id is kept in the workdir. A tracker that fails during training is left out
from then on, with a warning: metrics.jsonl has all metrics in any case.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from etils import epath
from flax.traverse_util import flatten_dict

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.storage.workdir import read_side_file, write_side_file

log = logging.getLogger(__name__)


class TrackerSink(MetricSink):
    """A sink that stops with a warning where its client fails.

    ``tracker``: its name; ``log_row`` and ``finish``: calls of the client.
    """

    def __init__(
        self,
        tracker: str,
        log_row: Callable[[int, dict[str, float]], Any],
        finish: Callable[[], Any],
    ) -> None:
        self._tracker, self._log_row, self._finish = tracker, log_row, finish
        self._works = True

    def __enter__(self) -> Self:
        self._works = True  # a client that cannot go on after its end says so
        return self

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._attempt(self._log_row, step, dict(metrics))

    def close(self) -> None:
        self._attempt(self._finish)
        self._works = False

    def _attempt(self, call: Any, *arguments: Any) -> None:
        if not self._works:
            return
        try:
            call(*arguments)
        except Exception as error:  # each client has errors of its own
            self._works = False
            log.warning(
                "%s failed (%s: %s) and gets no more metrics; metrics.jsonl has all of them",
                self._tracker, type(error).__name__, error,
            )  # fmt: skip


class _Settings:
    """Base of the configs of sinks."""

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging.sinks")


def _client(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"logging.sinks has a sink for {module}, which cannot be imported ({error}); install "
            f"it with pip install {module}, or remove the sink"
        ) from error


def _run_id(workdir: epath.Path, tracker: str) -> tuple[str, bool]:
    """The id of the tracker's run, and whether an earlier process of this run chose it."""
    kept = (read_side_file(workdir / f"{tracker}_run.txt") or "").strip()
    return (kept, True) if kept else (uuid.uuid4().hex, False)


def _keep_id(workdir: epath.Path, tracker: str, run_id: str) -> None:
    write_side_file(workdir / f"{tracker}_run.txt", f"{run_id}\n")


def _config_of(workdir: epath.Path) -> dict[str, Any]:
    """The config of the run as it is saved; empty if it cannot be read."""
    try:
        content = json.loads(read_side_file(workdir / "config.json") or "")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _refusals(client: str, remedy: str) -> Iterator[None]:
    """Turns errors of a client that opens a run into a UserError."""
    try:
        yield
    except Exception as error:  # each client has errors of its own
        raise UserError(f"{client} refuses the run ({error}); {remedy}") from error


@dataclass(frozen=True)
class WeightsAndBiases(_Settings):
    """Weights & Biases. It keeps the first row of a step: rows that an interrupted run wrote after
    its last checkpoint stay."""

    project: str = "flax_transformers"
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if wandb is not installed or refuses the run."""
        wandb = _client("wandb")
        run_id, _ = _run_id(workdir, "wandb")
        with _refusals("wandb", "log in, or set mode='offline'"):
            run = wandb.init(
                project=self.project,
                name=self.name or workdir.name,
                entity=self.entity,
                mode=self.mode,
                id=run_id,
                resume="allow",
                config=_config_of(workdir),
                dir=os.fspath(workdir) if "://" not in str(workdir) else None,
            )
        _keep_id(workdir, "wandb", run_id)
        return TrackerSink("W&B", lambda step, row: run.log(row, step=step), run.finish)


@dataclass(frozen=True)
class Mlflow(_Settings):
    """MLflow, with ``tracking_uri`` or, if it is None, the database mlflow.db in the workdir.

    A step that is trained again after an interruption has two values.
    """

    experiment: str = "flax_transformers"
    name: str | None = None
    tracking_uri: str | None = None

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if mlflow is not installed or its server refuses the run."""
        mlflow = _client("mlflow")
        uri = self.tracking_uri
        if uri is None:
            uri = f"sqlite:///{os.fspath(workdir / 'mlflow.db')}"
        run_id, known = _run_id(workdir, "mlflow")
        with _refusals("mlflow", f"correct the tracking_uri of the sink, which is {uri}"):
            client = mlflow.MlflowClient(uri)
            if known:
                client.update_run(run_id, status="RUNNING")
            else:
                run_id = self._new_run(client, workdir)
        _keep_id(workdir, "mlflow", run_id)

        def log_row(step: int, row: dict[str, float]) -> None:
            now, metric = int(1000 * time.time()), mlflow.entities.Metric
            rows = [metric(name, float(value), now, step) for name, value in row.items()]
            client.log_batch(run_id, metrics=rows)

        return TrackerSink("MLflow", log_row, lambda: client.set_terminated(run_id))

    def _new_run(self, client: Any, workdir: epath.Path) -> str:
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            number = client.create_experiment(self.experiment)
        else:
            number = experiment.experiment_id
        run = client.create_run(number, run_name=self.name or workdir.name)
        for key, value in flatten_dict(_config_of(workdir), sep=".").items():
            client.log_param(run.info.run_id, key, str(value)[:500])
        return str(run.info.run_id)


@dataclass(frozen=True)
class Trackio(_Settings):
    """Trackio (Hugging Face), stored on this machine. Rows that an interrupted run wrote after its
    last checkpoint stay."""

    project: str = "flax_transformers"
    name: str | None = None

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if trackio is not installed or refuses the run."""
        trackio = _client("trackio")
        run_id, known = _run_id(workdir, "trackio")
        name = run_id if known else f"{self.name or workdir.name}-{run_id[:8]}"
        with _refusals("trackio", "remove the sink"):
            run = trackio.init(
                project=self.project,
                name=name,
                config=flatten_dict(_config_of(workdir), sep="."),
                resume="allow",
                embed=False,
            )
        _keep_id(workdir, "trackio", name)
        return TrackerSink("Trackio", lambda step, row: run.log(row, step=step), run.finish)


@dataclass(frozen=True)
class Csv(_Settings):
    """A file of the workdir with a line for each step and metric: ``step,name,value``. Lines of
    steps after a resumed checkpoint are dropped."""

    file: str = "metrics.csv"

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """The sink; the file is written at each flush."""
        return _CsvSink(workdir / self.file, start_step)


class _CsvSink(TrackerSink):
    def __init__(self, path: epath.Path, start_step: int) -> None:
        super().__init__("CSV", self._add, self._save)
        self._path = path
        rows = csv.reader(io.StringIO(read_side_file(path) or ""))
        whole = [row for row in rows if len(row) == 3 and row[0].isascii() and row[0].isdecimal()]
        self._rows: list[tuple[Any, ...]] = [
            tuple(row) for row in whole if int(row[0]) <= start_step
        ]

    def _add(self, step: int, row: dict[str, float]) -> None:
        self._rows.extend((step, name, float(value)) for name, value in row.items())

    def flush(self) -> None:
        self._attempt(self._save)

    def _save(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([("step", "name", "value"), *self._rows])
        write_side_file(self._path, text.getvalue())
