"""Runs with adapters: resumed, restored with merged weights, and exported."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.checkpointing import manager
from flax_transformers.cli.main import main
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.pretrained import initial_parameters
from flax_transformers.restore import restore_model
from flax_transformers.testing import assert_bit_equal, tiny_bert, tiny_config, write_corpus
from flax_transformers.training.config import Evaluation
from flax_transformers.training.loop import train_prepared
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

LORA = LoraConfig(rank=4, targets=("attention",))


class StopAt(ft.Callback):
    def __init__(self, last):
        self.last = last

    def on_step(self, step, state):
        if step == self.last:
            self.stop("the test asks for it")


def run(folder, workdir, stop=0, **changes):
    """Six steps from the model in ``folder``; returns what its evaluator saw at the end."""
    config = tiny_config(
        folder / "text.txt", folder / "store", steps=6, init_from=str(folder / "base"), lora=LORA
    )
    config = dataclasses.replace(config, evaluation=Evaluation(every_steps=6), **changes)
    seen = []

    def look(snapshot):
        seen.append(jax.device_get(snapshot.params))
        return {}

    def initial(mesh):
        return initial_parameters(config.init_from, config.model, mesh, config.seed)

    train_prepared(config, prepare(config.data), workdir, [look], initial, callbacks=[StopAt(stop)])
    return seen[-1] if seen else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_corpus(folder / "text.txt", documents=20)
    model = build_model(tiny_bert(), ComputeConfig())
    ft.save_pretrained(folder / "base", model, drawn_parameters(model, parameter_shapes(model)))
    return folder


@pytest.fixture(scope="module")
def seen(folder, one_device):
    return run(folder, folder / "straight")


def assert_close(found, expected):
    for name, tree in found.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), tree, expected[name]
        )


def arrays(workdir):
    return manager.restore_arrays(manager.find_checkpoint(workdir))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, seen):
    run(folder, folder / "stopped", stop=3)
    assert manager.find_checkpoint(folder / "stopped").step == 3
    run(folder, folder / "stopped")
    assert_bit_equal(arrays(folder / "stopped"), arrays(folder / "straight"))


def test_the_base_stays_and_everything_that_reads_the_run_gets_merged_weights(folder, seen):
    saved = arrays(folder / "straight")["params"]
    _, base = ft.load_pretrained(folder / "base")
    assert_bit_equal(base_of(saved), base)
    expected = merged(saved, LORA.scale)
    _, loaded = ft.load_pretrained(folder / "straight")
    restored = restore_model(folder / "straight").params
    _, as_other = ft.load_pretrained(folder / "straight", architecture="BertModel")
    query, before = (
        tree["stack"]["layers"]["block_0"]["attention"]["query"]["kernel"]
        for tree in (expected, base)
    )
    assert not np.array_equal(query, before)
    for found in (seen, loaded, restored, as_other):
        assert_close({name: found[name] for name in found if name in expected}, expected)


def test_a_run_resumes_with_the_same_adapters_only(folder, seen):
    for lora in (LoraConfig(), dataclasses.replace(LORA, alpha=1.0)):
        with pytest.raises(UserError, match=r"belongs to another run \(lora\."):
            run(folder, folder / "straight", lora=lora)


def test_convert_writes_merged_weights_or_the_adapters_alone(folder, seen, capsys):
    straight, base = str(folder / "straight"), str(folder / "base")
    assert main(["convert", straight, str(folder / "merged")]) == 0
    assert main(["convert", straight, str(folder / "adapter"), "--adapter-of", base]) == 0
    _, expected = ft.load_pretrained(straight)
    for written in ("merged", "adapter"):
        _, found = ft.load_pretrained(folder / written)
        assert_close(found, expected)


def test_adapters_are_written_for_the_model_they_belong_to_alone(folder, seen, tmp_path, capsys):
    model, params = ft.load_pretrained(folder / "base")
    other = jax.tree.map(lambda leaf: leaf * 2, params)
    ft.save_pretrained(tmp_path / "other", model, other)
    convert = ["convert", str(folder / "straight"), str(tmp_path / "out"), "--adapter-of"]
    assert main([*convert, str(tmp_path / "other")]) == 2
    assert "and did not train it; give the model that the run" in capsys.readouterr().err
    convert[1] = str(folder / "base")
    assert main([*convert, str(folder / "base")]) == 2
    assert "is no run with adapters" in capsys.readouterr().err
