"""Runs, stores and configs of older versions: `tests/fixtures/make_saved_runs.py`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from flax_transformers import runtime
from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.main import main
from flax_transformers.config_json import FORMAT, from_json, to_json
from flax_transformers.data.dataset import open_dataset
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.pretrained import load_pretrained
from flax_transformers.restore import saved_config
from flax_transformers.testing import relative_difference
from flax_transformers.training.check_run import check_config, check_run
from flax_transformers.training.loop import train_prepared
from flax_transformers.training.run_state import check_meta, with_compute_of_run
from tests.fixtures.make_saved_runs import STEPS, digest_of_state

pytestmark = pytest.mark.usefixtures("one_device", "compiled_once")

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUNS = ("encoder", "decoder", "encoder_decoder", "classifier", "images")
TYPES = {  # of a run's config
    "format_1": "flax_transformers.training.config.TrainConfig",
    "format_2": "train_config",
    "version_0_2_0": "train_config",
}
GENERATORS = {"format_1": "threefry", "format_2": "threefry", "version_0_2_0": "auto"}
"""Of dropout masks, in the saved configs of a version; "auto" is the hash."""
EACH = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="session", params=TYPES)
def unpacked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(FIXTURES / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for corpus in ("text.txt", "other.txt", "pairs.tsv", "labelled.jsonl"):
        (folder / corpus).unlink()
    return request.param, folder


@pytest.fixture
def old(unpacked, tmp_path):
    """The files of one archive, without the corpora, not where they were written."""
    return shutil.copytree(unpacked[1], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def generator(unpacked):
    """The dropout generator in the saved configs of that version."""
    return GENERATORS[unpacked[0]]


def config_of(old, name):
    """The run's config with its store where it is now (and its images, which the store is of)."""
    config = from_json(json.loads((old / name / "config.json").read_text()))
    data = dataclasses.replace(config.data, store=str(old / name / "store"))
    if name == "images":
        source = dataclasses.replace(data.source, path=str(old / "digits"))
        data = dataclasses.replace(data, source=source)
    return dataclasses.replace(config, data=data)


def expected(old, name):
    return json.loads((old / "expected.json").read_text())[name]


def test_configs_of_recipes_read_back_and_are_written_in_the_new_format(unpacked):
    version, folder = unpacked
    recipes = json.loads((folder / "recipes.json").read_text())
    assert len(recipes) > 15
    for recipe in recipes:
        assert recipe["type"] == TYPES[version]
        config = from_json(recipe)
        written = to_json(config)
        assert (written["type"], written["format"]) == ("train_config", FORMAT)
        assert from_json(json.loads(json.dumps(written))) == config


@EACH
def test_the_state_is_restored_bit_for_bit(old, name):
    workdir = old / name / "run"
    assert digest_of_state(workdir) == expected(old, name)["state"]
    found = find_checkpoint(workdir)
    assert found.step == STEPS
    assert saved_config(found).phases == config_of(old, name).phases


@EACH
def test_the_store_opens_where_it_was_moved_to_and_is_intact(old, name):
    config = config_of(old, name)
    prepared = open_dataset(config.data)
    prepared.verify()
    workdir = old / name / "run"
    meta = find_checkpoint(workdir).meta
    check_meta(meta, runtime.with_label_names(config, prepared), prepared, epath.Path(workdir))


@EACH
def test_the_run_passes_the_checks_of_a_resume_and_of_an_evaluation(old, name):
    config = config_of(old, name)
    check_config(config)
    check_run(config, open_dataset(config.data), new=False)


def test_ids_of_text_ends_that_a_run_began_with_are_only_warned_of(old, caplog):
    config = config_of(old, "decoder")
    prepared = open_dataset(config.data)
    with pytest.raises(UserError, match=r"model.eos_ids is \(50256,\).*set --model.eos-ids 1$"):
        check_run(config, prepared)
    check_run(config, prepared, new=False)
    assert "model.eos_ids is (50256,)" in caplog.text


@EACH
def test_dropout_masks_stay_those_of_that_version_unless_the_config_says_otherwise(
    old, name, generator
):
    config, workdir = config_of(old, name), epath.Path(old / name / "run")
    assert saved_config(find_checkpoint(old / name / "run")).compute.dropout_generator == generator
    for asked, found in (("auto", generator), ("hash", "hash"), ("threefry", "threefry")):
        compute = dataclasses.replace(config.compute, dropout_generator=asked)
        today = dataclasses.replace(config, compute=compute)
        resumed = with_compute_of_run(today, workdir)
        assert resumed.compute.dropout_generator == found
        assert with_compute_of_run(today, epath.Path(old / "new")) == today


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unpacked", "name"),
    [
        # An encoder of each version, and of the newest a decoder.
        pytest.param(
            version,
            name,
            marks=[pytest.mark.full]
            * (name != "encoder" and (version, name) != ("version_0_2_0", "decoder")),
        )
        for version in TYPES
        for name in RUNS
    ],
    indirect=["unpacked"],
    scope="session",
)
def test_the_run_resumes_with_the_losses_of_that_version(old, name, generator):
    config = config_of(old, name)
    config = dataclasses.replace(  # as in a recipe of today
        config, compute=dataclasses.replace(config.compute, dropout_generator="auto")
    )
    longer = dataclasses.replace(config.phases[0], steps=2 * STEPS)
    config = dataclasses.replace(config, phases=(longer,))
    prepared = open_dataset(config.data)
    config = runtime.with_label_names(config, prepared)
    workdir = old / name / "run"
    assert train_prepared(config, prepared, workdir).step == 2 * STEPS
    assert saved_config(find_checkpoint(workdir)).compute.dropout_generator == generator
    losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
    assert relative_difference(losses[STEPS:], expected(old, name)["losses"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name != "encoder_decoder")) for name in RUNS],
)
def test_the_model_is_loaded_and_converted(old, name, tmp_path):
    model, params = load_pretrained(old / name / "run")
    assert type(model.config) is type(config_of(old, name).model)
    assert main(["convert", str(old / name / "run"), str(tmp_path / "out")]) == 0
    _, again = load_pretrained(tmp_path / "out")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        written = np.where(theirs == 0, 0, ours)  # what pads the vocabulary is not written
        np.testing.assert_array_equal(written, theirs)
