"""The dtype that a run computes in where its config leaves it open."""

import contextlib
import dataclasses
import logging

import jax
import pytest

import flax_transformers as ft
from flax_transformers import runtime
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints, find_checkpoint
from flax_transformers.data.dataset import prepare
from flax_transformers.restore import saved_config
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training import run_state, setup
from flax_transformers.training.loop import train_prepared

pytestmark = pytest.mark.usefixtures("one_device", "compiled_once")


@pytest.fixture
def on_processor(monkeypatch):
    def has(*instructions, devices=1):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(setup, "bfloat16_instructions", lambda: list(instructions))

    return has


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "text.txt", documents=20)
    config = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=2)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="auto"))


def dtype(config, workdir):
    return run_state.with_compute_of_run(config, workdir).compute.dtype


def test_a_new_run_takes_bfloat16_where_the_processor_has_instructions_for_it(
    config, tmp_path, on_processor, caplog
):
    caplog.set_level(logging.INFO)
    on_processor("amx_bf16")
    assert dtype(config, tmp_path) == "bfloat16"
    assert "bfloat16, for which this processor has instructions (amx_bf16)" in caplog.text
    asked = dataclasses.replace(config.compute, dtype="float32")
    assert dtype(dataclasses.replace(config, compute=asked), tmp_path) == "float32"
    on_processor()
    assert dtype(config, tmp_path) == "auto"
    on_processor("amx_bf16", devices=2)
    assert dtype(config, tmp_path) == "auto"


def test_all_that_a_run_builds_computes_in_its_dtype(config, tmp_path, on_processor, monkeypatch):
    class Stop(Exception):
        pass

    def built(config):
        raise Stop(config.compute.dtype)

    monkeypatch.setattr(runtime, "start", lambda *_: None)
    monkeypatch.setattr(runtime, "built", built)  # for evaluators and exports
    on_processor("amx_bf16")
    with pytest.raises(Stop, match="^bfloat16$"):
        ft.train(config, tmp_path / "run")


def saved(config, workdir):
    """A checkpoint of a run that begins here, without a step; what it says of the compute."""
    config, prepared = run_state.with_compute_of_run(config, workdir), prepare(config.data)
    meta = run_state.checkpoint_meta(config, prepared, run_state.RunPosition(), {}, {}, 0, 0)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", CheckpointConfig())) as folder:
        folder.save(0, {"params": {"one": jax.numpy.ones(1)}}, meta)
    return saved_config(find_checkpoint(workdir)).compute


def trained(config, workdir):
    train_prepared(config, prepare(config.data), workdir)
    return saved_config(find_checkpoint(workdir)).compute


@pytest.mark.parametrize(
    "begin", [saved, pytest.param(trained, marks=[pytest.mark.full, pytest.mark.slow])]
)
def test_a_run_keeps_the_dtype_that_it_began_with(config, tmp_path, on_processor, begin):
    on_processor("avx512_bf16")
    began = begin(config, tmp_path / "fast")
    assert (began.dtype, began.gradient_reduce_dtype) == ("bfloat16", "float32")
    on_processor()
    assert run_state.with_compute_of_run(config, tmp_path / "fast").compute == began
    begin(config, tmp_path / "plain")
    on_processor("avx512_bf16")
    assert dtype(config, tmp_path / "plain") == "auto"
