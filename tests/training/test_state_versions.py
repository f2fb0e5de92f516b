"""Checkpoints with fewer fields of the state than this version has."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformers.checkpointing.compatibility import (
    as_saved,
    from_saved,
    without_missing,
    without_unwanted,
)
from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    Checkpoints,
    find_checkpoint,
    restore_arrays,
)
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.testing import assert_bit_equal, tiny_config, write_corpus
from flax_transformers.training.loop import train_prepared
from flax_transformers.training.state import TrainState

ONE = np.zeros(1, np.float32)
STATE = TrainState(ONE, {"w": ONE}, (), ONE, ONE, ONE, ema={"w": ONE}, norm_mean=ONE)


def test_optional_fields_that_a_checkpoint_lacks_are_named():
    saved = {"step": ONE, "params": {"w": ONE}, "ema": None}
    asked, missing = without_missing(saved, STATE)
    assert missing == ["ema", "norm_mean"]
    assert asked.ema is None and asked.params == STATE.params
    assert without_missing(saved | {"ema": {"w": ONE}, "norm_mean": ONE}, STATE) == (STATE, [])


def test_consecutive_skips_keep_their_former_name_in_checkpoints():
    saved = as_saved(STATE)
    assert "skipped_in_a_row" in saved and "consecutive_skips" not in saved
    assert from_saved(STATE, saved) == STATE


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A state with an optional field that checkpoints have under its former name."""

    mean: object = dataclasses.field(default=None, metadata={"saved_as": "former"})


def test_a_renamed_optional_field_is_found_by_its_saved_name():
    assert without_missing({"former": ONE}, Renamed(ONE)) == (Renamed(ONE), [])
    assert without_missing({}, Renamed(ONE)) == (Renamed(None), ["former"])
    assert without_unwanted({"former": ONE}, Renamed(None)) == ({}, ["former"])


def test_fields_that_every_checkpoint_has_are_not_optional():
    _, missing = without_missing({}, STATE)
    assert "params" not in missing and "opt_state" not in missing


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device, compiled_once):
    """The config of a run that saved after each of its three steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "text.txt", documents=20)
    config = tiny_config(
        folder / "text.txt", folder / "store", steps=3, checkpoints=CheckpointConfig(every_steps=1)
    )
    train_prepared(config, prepare(config.data), folder / "run")
    return folder, config


def with_state(trained, workdir, change, **meta):
    """A workdir with the checkpoint of step 2, whose state and meta are changed."""
    folder, config = trained
    found = find_checkpoint(folder / "run" / "checkpoints" / "2")
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoints)
    state = restore_arrays(found)
    change(state)
    files = {"tokenizer": found.folder / "tokenizer"}
    checkpoints.save(2, state, found.meta | meta, files=files)
    checkpoints.close()
    return config


def losses(workdir):
    """Of step 3."""
    rows = read_metrics(workdir)
    return [row["train/loss"] for row in rows if row["step"] == 3 and "train/loss" in row]


@pytest.mark.slow
def test_a_run_resumes_from_a_state_without_a_field_that_is_new_since(trained, tmp_path, caplog):
    caplog.set_level("INFO", "flax_transformers")
    config = with_state(trained, tmp_path, lambda state: state.pop("norm_mean"))
    train_prepared(config, prepare(config.data), tmp_path)
    assert "has no norm_mean: initialized" in caplog.text
    found, expected = (
        restore_arrays(find_checkpoint(folder)) for folder in (tmp_path, trained[0] / "run")
    )
    assert found["norm_mean"] != expected["norm_mean"]
    assert_bit_equal(found["params"], expected["params"])
    assert losses(tmp_path) == losses(trained[0] / "run") != []


@pytest.mark.slow
def test_an_average_that_is_kept_from_now_on_starts_from_the_parameters(trained, tmp_path, caplog):
    caplog.set_level("INFO", "flax_transformers")
    config = with_state(trained, tmp_path, lambda state: None)
    config = dataclasses.replace(config, ema=EMAConfig(decay=0.5, warmup=False))
    train_prepared(config, prepare(config.data), tmp_path)
    assert "has no ema: initialized" in caplog.text
    state = restore_arrays(find_checkpoint(tmp_path))
    before = restore_arrays(find_checkpoint(trained[0] / "run" / "checkpoints" / "2"))
    found, old, new = (
        tree["mlm_head"]["bias"] for tree in (state["ema"], before["params"], state["params"])
    )
    np.testing.assert_allclose(found, (old + new) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_an_average_that_is_kept_no_longer_is_left_out(trained, tmp_path, caplog):
    caplog.set_level("INFO", "flax_transformers")

    def average(state):
        state["ema"] = jax.tree.map(np.copy, state["params"])

    config = with_state(trained, tmp_path, average)
    train_prepared(config, prepare(config.data), tmp_path)
    assert "ema is kept no longer and not read" in caplog.text
    found, expected = (
        restore_arrays(find_checkpoint(folder)) for folder in (tmp_path, trained[0] / "run")
    )
    assert_bit_equal(found, expected)


@pytest.mark.slow
def test_a_state_of_a_later_version_is_refused(trained, tmp_path):
    config = with_state(trained, tmp_path, lambda state: None, state_version=2)
    with pytest.raises(UserError, match="a state of version 2, .* reads versions up to 1"):
        train_prepared(config, prepare(config.data), tmp_path)


@pytest.mark.slow
def test_a_state_without_parameters_of_the_model_is_another_models(trained, tmp_path):
    config = with_state(trained, tmp_path, lambda state: state["params"].pop("mlm_head"))
    with pytest.raises(UserError, match="is of another model or optimizer: it lacks params/mlm"):
        train_prepared(config, prepare(config.data), tmp_path)
