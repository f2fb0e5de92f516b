"""A contrastive run through the command line: locked image encoder, resume, evaluate, convert."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from tests.data.images.test_dataset import write_idx

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

CONFIG = """
import dataclasses
from flax_transformers.data.images.image_text import ClassTexts, ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.siglip import SiglipConfig, SiglipVision
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule

SIZES = dict(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)


def get_config():
    return TrainConfig(
        model=SiglipConfig(**SIZES, vocab_size=262, max_positions=8, pad_id=0, vision=SiglipVision(
            **SIZES, image_size=8, patch_size=4, num_channels=1)),
        objective=ImageTextContrastive(loss="sigmoid", image_size=8, mean=(0.5,), std=(0.5,)),
        data=ImageTextData(source=ImageSource("DATA"), channels=1, crop_fraction=1.0,
                           tokenizer=TokenizerConfig("bytes"),
                           captions=(ClassTexts(("a", "b", "c"), ("{}", "x {}")),),
                           zero_shot=(ClassTexts(("a", "b", "c")),)),
        optimizer=AdamW(learning_rate=1e-3, schedule=Schedule("constant"), frozen=("image_*",)),
        phases=(Phase(steps=3, sequence_length=8, batch_size=8),),
        checkpoints=CheckpointConfig(every_steps=1),
        evaluation=Evaluation(batch_size=8),
        logging=Logging(every_steps=1, tensorboard=False),
    )
"""


def metrics(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("train/", "eval/"))
    }


def test_a_run_resumes_exactly_with_a_locked_image_encoder_and_is_exported(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_idx(tmp_path / "digits", count=(48, 10))
    config, whole, again = tmp_path / "config.py", tmp_path / "whole", tmp_path / "again"
    config.write_text(CONFIG.replace("DATA", str(data)))
    assert main(["train", str(config), "--workdir", str(whole)]) == 0
    assert "zero shot accuracy" in capsys.readouterr().out
    shutil.copytree(whole, again)
    for step in ("2", "3"):
        shutil.rmtree(again / "checkpoints" / step)
    assert main(["train", str(config), "--workdir", str(again)]) == 0
    found, expected = metrics(again), metrics(whole)
    names = {"train/loss", "eval/loss", "eval/image_to_text_recall_at_5", "eval/zero_shot_accuracy"}
    assert names <= {name for _, name in expected}
    assert {key: found[key] for key in expected if key[1] in names} == {
        key: expected[key] for key in expected if key[1] in names
    }

    states = []
    for step in ("1", "3"):
        out = tmp_path / f"out{step}"
        assert main(["convert", str(whole / "checkpoints" / step), str(out)]) == 0
        states.append(ft.load_pretrained(str(out))[1])
    first, _ = states
    for name in first:
        same = [
            np.array_equal(a, b)
            for a, b in zip(*(jax.tree.leaves(state[name]) for state in states), strict=True)
        ]
        assert all(same) == name.startswith("image_"), name
    described = json.loads((tmp_path / "out3" / "preprocessor_config.json").read_text())
    assert described["crop_size"] == {"height": 8, "width": 8}
    assert described["image_mean"] == [0.5]
    tokenizer = json.loads((tmp_path / "out3" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 8


def test_inspect_writes_a_picture_and_prints_captions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, picture = tmp_path / "config.py", tmp_path / "examples.png"
    config.write_text(CONFIG.replace("DATA", str(write_idx(tmp_path / "digits", count=(48, 10)))))
    assert main(["inspect", str(config), "--examples", "9", "--picture", str(picture)]) == 0
    assert picture.is_file()
    assert capsys.readouterr().out.count("caption: ") == 9
