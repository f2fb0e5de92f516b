"""Images through the command line: inspect, train, resume at another size, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from flax_transformers.cli.main import main
from tests.data.images.test_dataset import write_idx

pytestmark = pytest.mark.usefixtures("one_device", "compiled_once")

COMMON = """
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.families.vit import ViTConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.training.config import Evaluation, ImagePhase, Logging, TrainConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule

SMALL = dict(image_size=8, patch_size=2, num_channels=1, num_labels=3, hidden_size=8, num_layers=1,
             num_heads=2, intermediate_size=8)
PIXELS = dict(mean=(0.5,), std=(0.5,))


def get_config():
    return TrainConfig(
        model={model},
        objective={objective},
        data=ImageData(source=ImageSource("{data}"), channels=1, crop_fraction=1.0,
                       augmentation=Augmentation(crop="shift", padding=1)),
        optimizer=AdamW(learning_rate=1e-3, schedule=Schedule("constant")),
        phases={phases},
        checkpoints=CheckpointConfig(every_steps=100),
        evaluation=Evaluation(batch_size=8),
        logging=Logging(every_steps=1, tensorboard=False, example_log=True),
    )
"""
VIT = {
    "model": "ViTConfig(**SMALL)",
    "objective": "ImageClassification(**PIXELS, mixup=0.8, cutmix=1.0)",
    "phases": "(ImagePhase(steps=1, image_size=6, batch_size=8), "
    "ImagePhase(steps=1, image_size=8, batch_size=8))",
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_idx(tmp_path / "mnist", count=(48, 10))

    def write(**fields):
        path = tmp_path / "config.py"
        text = COMMON.replace("{data}", str(data))
        for name, value in fields.items():
            text = text.replace("{" + name + "}", value)
        path.write_text(text)
        return str(path)

    return write


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in rows for name, value in row.items()}


@pytest.mark.slow
def test_a_run_continues_at_a_larger_image_size(tmp_path, config, capsys):
    path, workdir = config(**VIT), tmp_path / "run"
    assert main(["train", path, "--workdir", str(workdir)]) == 0
    said = capsys.readouterr().out
    assert "48 training images of 3 classes, 10 held out; batches of 8 x 6 x 6" in said
    assert "baseline: accuracy 40.0% on 10 held-out images (majority class)" in said
    assert main(["train", path, "--workdir", str(workdir), "--phases.1.steps", "2"]) == 0
    found = metrics(workdir)
    for name in ("train/loss", "train/accuracy", "train/top_5", "eval/loss", "eval/top_5"):
        assert np.isfinite(found[3, name])
    assert len((workdir / "ledger-0.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["evaluate", str(workdir), "--phases.1.steps", "2"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["eval/accuracy"] == pytest.approx(found[3, "eval/accuracy"])
    assert scores["majority_class_accuracy"] == 0.4
    assert main(["fill-mask", str(workdir), "--text", "a [MASK]"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_inspect_writes_a_picture_and_prints_labels(tmp_path, config, capsys):
    picture = tmp_path / "examples.png"
    arguments = ["inspect", config(**VIT), "--examples", "9", "--picture", str(picture)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"9 prepared images, row by row, are in {picture}" in " ".join(said.split())
    assert said.count("%") >= 9 and "2.1  image" in said
    assert imread(picture).ndim == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--model.num-labels", "5"], "the data has 3 classes, but model.num_labels is 5"),
        (["--data.channels", "3"], "data.channels is 3, but model.num_channels is 1"),
        (["--data.source.path", "nowhere"], "There is no file or folder nowhere"),
        (["--data.source.label-names", "a", "b"], "has 2 names, but there are 3 classes"),
    ],
)
def test_what_does_not_fit_is_told_before_training(tmp_path, config, capsys, overrides, says):
    arguments = ["train", config(**VIT), "--workdir", str(tmp_path / "run"), *overrides]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
