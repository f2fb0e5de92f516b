"""Sinks of metric trackers, to name in ``logging.sinks`` of a config: W&B, MLflow, Trackio, CSV.

Each is a config that opens the sink; its client is imported then. A resumed run continues the run
of the tracker, whose id is kept in the workdir. A tracker that fails during training is left out
from then on, with a warning: metrics.jsonl has all metrics in any case.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from etils import epath

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.storage.workdir import read_side_file, write_side_file

log = logging.getLogger(__name__)


class TrackerSink(MetricSink):
    """A sink that stops with a warning where its client fails; subclasses override ``_log`` and
    ``_finish``."""

    tracker: ClassVar[str]

    def __init__(self) -> None:
        self._works = True

    def _log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def _finish(self) -> None: ...

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._attempt(self._log, step, metrics)

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
                self.tracker, type(error).__name__, error,
            )  # fmt: skip


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


@dataclass(frozen=True)
class WeightsAndBiases:
    """Weights & Biases. It keeps the first row of a step: rows that an interrupted run wrote after
    its last checkpoint stay."""

    project: str = "flax_transformers"
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging.sinks")

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if wandb is not installed or refuses the run."""
        return _WandbSink(_client("wandb"), self, workdir)


class _WandbSink(TrackerSink):
    tracker = "W&B"

    def __init__(self, wandb: Any, settings: WeightsAndBiases, workdir: epath.Path) -> None:
        super().__init__()
        run_id, _ = _run_id(workdir, "wandb")
        try:
            self._run = wandb.init(
                project=settings.project,
                name=settings.name or workdir.name,
                entity=settings.entity,
                mode=settings.mode,
                id=run_id,
                resume="allow",
                config=_config_of(workdir),
                dir=os.fspath(workdir) if "://" not in str(workdir) else None,
            )
        except Exception as error:
            raise UserError(
                f"wandb refuses the run ({error}); log in, or set mode='offline'"
            ) from error
        _keep_id(workdir, "wandb", run_id)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def _finish(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Mlflow:
    """MLflow, with ``tracking_uri`` or, if it is None, the database mlflow.db in the workdir.

    A step that is trained again after an interruption has two values.
    """

    experiment: str = "flax_transformers"
    name: str | None = None
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging.sinks")

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if mlflow is not installed or its server refuses the run."""
        return _MlflowSink(_client("mlflow"), self, workdir)


class _MlflowSink(TrackerSink):
    tracker = "MLflow"

    def __init__(self, mlflow: Any, settings: Mlflow, workdir: epath.Path) -> None:
        super().__init__()
        uri = settings.tracking_uri
        if uri is None:
            uri = f"sqlite:///{os.fspath(workdir / 'mlflow.db')}"
        self._metric = mlflow.entities.Metric
        run_id, known = _run_id(workdir, "mlflow")
        try:
            self._client = mlflow.MlflowClient(uri)
            if known:
                self._client.update_run(run_id, status="RUNNING")
            else:
                run_id = self._new_run(settings, workdir)
        except Exception as error:
            raise UserError(
                f"mlflow refuses the run ({error}); correct the tracking_uri of the sink, which is "
                f"{uri}"
            ) from error
        self._run_id = run_id
        _keep_id(workdir, "mlflow", run_id)

    def _new_run(self, settings: Mlflow, workdir: epath.Path) -> str:
        experiment = self._client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            number = self._client.create_experiment(settings.experiment)
        else:
            number = experiment.experiment_id
        run = self._client.create_run(number, run_name=settings.name or workdir.name)
        for key, value in _flat(_config_of(workdir)):
            self._client.log_param(run.info.run_id, key, str(value)[:500])
        return str(run.info.run_id)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        rows = [self._metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def _finish(self) -> None:
        self._client.set_terminated(self._run_id)


def _flat(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of a config with their paths, such as ``optimizer.learning_rate``."""
    if not isinstance(node, dict):
        return [(path, node)]
    return [
        leaf
        for name, value in node.items()
        for leaf in _flat(value, f"{path}.{name}" if path else str(name))
    ]


@dataclass(frozen=True)
class Trackio:
    """Trackio (Hugging Face), stored on this machine. Rows that an interrupted run wrote after its
    last checkpoint stay."""

    project: str = "flax_transformers"
    name: str | None = None

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging.sinks")

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """Raises UserError if trackio is not installed or refuses the run."""
        return _TrackioSink(_client("trackio"), self, workdir)


class _TrackioSink(TrackerSink):
    tracker = "Trackio"

    def __init__(self, trackio: Any, settings: Trackio, workdir: epath.Path) -> None:
        super().__init__()
        run_id, known = _run_id(workdir, "trackio")
        name = run_id if known else f"{settings.name or workdir.name}-{run_id[:8]}"
        try:
            self._run = trackio.init(
                project=settings.project,
                name=name,
                config=dict(_flat(_config_of(workdir))),
                resume="allow",
                embed=False,
            )
        except Exception as error:
            raise UserError(f"trackio refuses the run ({error}); remove the sink") from error
        _keep_id(workdir, "trackio", name)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def _finish(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Csv:
    """A file of the workdir with a line for each step and metric: ``step,name,value``. Lines of
    steps after a resumed checkpoint are dropped."""

    file: str = "metrics.csv"

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging.sinks")

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """The sink; the file is written at each flush."""
        return _CsvSink(workdir / self.file, start_step)


class _CsvSink(TrackerSink):
    tracker = "CSV"

    def __init__(self, path: epath.Path, start_step: int) -> None:
        super().__init__()
        self._path = path
        rows = csv.reader(io.StringIO(read_side_file(path) or ""))
        whole = [row for row in rows if len(row) == 3 and row[0].isascii() and row[0].isdecimal()]
        self._rows: list[tuple[Any, ...]] = [
            tuple(row) for row in whole if int(row[0]) <= start_step
        ]

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.extend((step, name, float(value)) for name, value in metrics.items())

    def flush(self) -> None:
        self._attempt(self._save)

    def _save(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([("step", "name", "value"), *self._rows])
        write_side_file(self._path, text.getvalue())

    def _finish(self) -> None:
        self._save()
