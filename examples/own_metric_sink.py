"""A metric sink of your own: named in a config file, and passed as an object.

    python own_metric_sink.py
    flax-transformers train own_metric_sink.py --workdir runs/own_metric_sink

A sink gets every row of metrics, on process 0, beside metrics.jsonl, the console and TensorBoard.
"""

import csv
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import flax_transformers as ft
from flax_transformers.training.config import Logging, Phase, TrainConfig


class CsvWriter(ft.MetricSink):
    """One row per step and metric. Rows after ``start_step`` of an interrupted run are dropped."""

    def __init__(self, path: Path, start_step: int) -> None:
        text = path.read_text() if path.exists() else ""
        rows = csv.reader(text.splitlines())
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows(row for row in rows if int(row[0]) <= start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.writerows((step, name, value) for name, value in metrics.items())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Csv:
    """What stands in the config: it is saved with every checkpoint and opens the sink."""

    name: str = "metrics.csv"

    def open(self, workdir: Path, start_step: int) -> CsvWriter:
        return CsvWriter(Path(workdir) / self.name, start_step)


class Table(ft.MetricSink):
    """A sink that is passed as an object: a table in memory."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "train/loss" in metrics:
            self.losses[step] = metrics["train/loss"]


def get_config() -> TrainConfig:
    recipe = ft.recipe("bert_tiny")
    return replace(
        recipe,
        model=replace(recipe.model, hidden_size=64, intermediate_size=128),
        phases=(Phase(steps=10, sequence_length=32, batch_size=16),),
        optimizer=replace(
            recipe.optimizer, schedule=replace(recipe.optimizer.schedule, warmup_steps=2)
        ),
        logging=Logging(every_steps=5, tensorboard=False, sinks=(Csv(),)),
    )


def main() -> None:
    table = Table()
    with tempfile.TemporaryDirectory() as workdir:
        ft.train(get_config(), workdir, sinks=[table])
        text = (Path(workdir) / "metrics.csv").read_text()
    rows = list(csv.reader(text.splitlines()))
    print(f"losses {table.losses}; {len(rows)} rows in metrics.csv")
    assert list(table.losses) == [5, 10]
    assert (
        float(next(row[2] for row in rows if row[:2] == ["10", "train/loss"])) == table.losses[10]
    )


if __name__ == "__main__":
    main()
