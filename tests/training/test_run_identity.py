"""A run goes on with the same examples and tokenizers, wherever they lie."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from etils import epath

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.cli.main import main
from flax_transformers.config_json import to_json
from flax_transformers.data.dataset import Dataset, prepare
from flax_transformers.data.prepare.cached_stores import Tokenizers
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.restore import converted_meta
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training.config import TrainConfig, check_resumable
from flax_transformers.training.run_state import (
    RunPosition,
    check_meta,
    check_same_run,
    checkpoint_meta,
    tokenizers_of_run,
)

WORDPIECE = TokenizerConfig("wordpiece", vocab_size=70, lowercase=True)


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text.txt")
    config = tiny_config(tmp_path / "text.txt", tmp_path / "store")
    return replace(config, data=replace(config.data, tokenizer=WORDPIECE))


def saved(config: TrainConfig, tmp_path, step: int = 5) -> tuple[dict, Dataset]:
    """The meta of a checkpoint, with its tokenizer in place."""
    prepared = prepare(config.data)
    prepared.tokenizer.save(tmp_path / f"run/checkpoints/{step}/tokenizer")
    position = RunPosition(step=step, examples=80)
    return checkpoint_meta(config, prepared, position, {}, {}, 0, 0), prepared


def resume(meta: dict, config: TrainConfig, tmp_path, of_run: Tokenizers | None = None) -> Dataset:
    prepared = prepare(config.data, of_run=of_run or {}, compare="nothing")
    check_meta(meta, config, prepared, epath.Path(tmp_path / "run"))
    return prepared


def with_data(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, data=replace(config.data, **changes))


def test_a_run_goes_on_when_corpus_store_and_tokenizer_are_elsewhere(config, tmp_path):
    meta, prepared = saved(config, tmp_path)
    os.rename(tmp_path / "text.txt", tmp_path / "moved.txt")
    os.rename(tmp_path / "store", tmp_path / "moved")
    moved = with_data(
        config, source=TextSource(str(tmp_path / "moved.txt")), store=str(tmp_path / "moved")
    )
    resume(meta, moved, tmp_path)
    prepared.tokenizer.save(tmp_path / "saved")
    at = TokenizerConfig("wordpiece", path=str(tmp_path / "saved"))
    resume(meta, with_data(moved, tokenizer=at), tmp_path)
    again = with_data(moved, tokenizer=at, store=str(tmp_path / "again"))
    assert resume(meta, again, tmp_path).fingerprint == prepared.fingerprint


@pytest.mark.parametrize("store", ["given", None])
def test_a_run_whose_store_was_deleted_keeps_its_tokenizer(config, tmp_path, store):
    config = with_data(config, store=store and str(tmp_path / store))
    meta, prepared = saved(config, tmp_path)
    shutil.rmtree(prepared.directory)
    of_run = tokenizers_of_run(epath.Path(tmp_path / "run"))
    assert of_run["tokenizer"].fingerprint == prepared.tokenizer.fingerprint
    again = resume(meta, config, tmp_path, of_run)
    assert (again.fingerprint, again.directory) == (prepared.fingerprint, prepared.directory)


def test_a_store_with_another_tokenizer_is_refused_and_says_what_helps(config, tmp_path):
    meta, _ = saved(config, tmp_path)
    shutil.rmtree(tmp_path / "store")
    prepare(with_data(config, tokenizer=replace(WORDPIECE, vocab_size=71)).data)
    other = with_data(config, tokenizer=replace(WORDPIECE, vocab_size=71))
    of_run = tokenizers_of_run(epath.Path(tmp_path / "run"))
    with pytest.raises(UserError, match=r"another tokenizer .*set --data.store .* to a new folder"):
        resume(meta, other, tmp_path, of_run)
    resume(meta, with_data(config, store=str(tmp_path / "new")), tmp_path, of_run)


@pytest.mark.parametrize(
    ("position", "steps", "refused"),
    [
        (RunPosition(step=12, phase=1), (10, 20, 5), False),
        (RunPosition(step=12, phase=1), (10, 40), False),
        (RunPosition(step=12, phase=1), (11, 20), True),
        (RunPosition(step=12, phase=1), (9, 20), True),
        (RunPosition(step=12, phase=1), (30,), True),
        (RunPosition(step=10), (15, 20), False),  # trained further in its phase
        (RunPosition(step=10), (10, 40), False),
        (RunPosition(step=10), (8, 20), True),
        (RunPosition(step=30, phase=1), (8, 20), False),  # it is through
    ],
)
def test_phases_that_are_done_keep_their_steps(config, tmp_path, position, steps, refused):
    def with_phases(*steps):
        return replace(config, phases=tuple(replace(config.phases[0], steps=n) for n in steps))

    _, prepared = saved(config, tmp_path)
    meta = checkpoint_meta(with_phases(10, 20), prepared, position, {}, {}, 0, 0)
    with (
        pytest.raises(UserError, match="keep the steps of the phases that are done")
        if refused
        else contextlib.nullcontext()
    ):
        resume(meta, with_phases(*steps), tmp_path)


def test_converted_weights_are_no_run_to_resume(config, tmp_path):
    meta, run = converted_meta(config.model), epath.Path(tmp_path / "run")
    says = "run holds converted weights and no run to resume; .* --init-from .*/run"
    with pytest.raises(UserError, match=says):
        resume(meta, config, tmp_path)
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": np.zeros(1)}, meta)
    checkpoints.close()
    with pytest.raises(UserError, match=says):
        check_same_run(config, run)


def test_other_examples_are_refused(config, tmp_path):
    meta, _ = saved(config, tmp_path)
    of_run = tokenizers_of_run(epath.Path(tmp_path / "run"))
    write_corpus(tmp_path / "text.txt", documents=401)
    with pytest.raises(UserError, match="was trained on other data than the store"):
        resume(meta, with_data(config, store=str(tmp_path / "new")), tmp_path, of_run)


def test_a_checkpoint_that_noted_the_former_fingerprint_goes_on(config, tmp_path):
    meta, prepared = saved(config, tmp_path)
    (former,) = prepared.known_as
    resume({**meta, "store": former}, config, tmp_path)


def test_other_text_to_evaluate_on_does_not_make_another_run(config, tmp_path):
    write_corpus(tmp_path / "held_out.txt", documents=20)
    held_out = TextSource(str(tmp_path / "held_out.txt"))
    config = with_data(config, validation_source=held_out, tokenizer=TokenizerConfig("bytes"))
    meta, prepared = saved(config, tmp_path)
    write_corpus(tmp_path / "other.txt", documents=30)
    other = with_data(
        config,
        validation_source=TextSource(str(tmp_path / "other.txt")),
        store=str(tmp_path / "other"),
    )
    again = resume(meta, other, tmp_path)
    assert again.validation.num_documents == 30
    assert again.fingerprint == prepared.fingerprint


def test_the_tokenizer_of_a_run_is_that_of_the_newest_checkpoint_that_is_intact(config, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    assert tokenizers_of_run(workdir) == {}
    _, prepared = saved(config, tmp_path, step=5)
    saved(config, tmp_path, step=10)
    (tmp_path / "run/checkpoints/10/tokenizer/tokenizer.json").write_text("{")
    (tmp_path / "run/checkpoints/15").mkdir()
    found = tokenizers_of_run(workdir)
    assert found["tokenizer"].fingerprint == prepared.tokenizer.fingerprint
    assert list(found) == ["tokenizer"]


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"verify": False}, True),
        ({"tokenizer": TokenizerConfig("bytes", path="elsewhere")}, True),
        ({"validation_source": TextSource("other.txt")}, True),
        ({"source": TextSource("text.txt", text_field="body")}, False),
        ({"shards": 3}, False),
        ({"validation_fraction": 0.3}, False),
    ],
)
def test_what_does_not_change_the_training_examples_may_change(config, changes, free):
    def check() -> list[str]:
        return check_resumable(to_json(config), with_data(config, **changes), "here")

    config = with_data(config, source=TextSource("text.txt"))
    if free:
        assert check()
    else:
        with pytest.raises(UserError, match="here belongs to another run"):
            check()


def test_a_resumed_run_may_be_decoded_otherwise(config):
    beams = replace(config.model, generation=GenerationSettings(num_beams=4))
    changed = check_resumable(to_json(config), replace(config, model=beams), "here")
    assert changed == ["model.generation.num_beams None -> 4"]


CONFIG = """
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.testing import tiny_config
from dataclasses import replace

def get_config():
    config = tiny_config(TEXT, STORE, steps=STEPS)
    return replace(config, data=replace(config.data, tokenizer=TokenizerConfig(
        "wordpiece", vocab_size=70, lowercase=True)))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_run_whose_corpus_moved_and_whose_store_is_gone_trains_on(tmp_path, capsys):
    def run(steps: int) -> int:
        text, store = str(tmp_path / "text.txt"), str(tmp_path / "store")
        if steps > 5:
            text = str(tmp_path / "moved.txt")
        names = f"TEXT, STORE, STEPS = {text!r}, {store!r}, {steps}\n"
        (tmp_path / "config.py").write_text(names + CONFIG)
        return main(["train", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")])

    write_corpus(tmp_path / "text.txt")
    assert run(5) == 0
    os.rename(tmp_path / "text.txt", tmp_path / "moved.txt")
    shutil.rmtree(tmp_path / "store")
    assert run(8) == 0
    assert (tmp_path / "run/checkpoints/8").is_dir()
    shutil.rmtree(tmp_path / "store")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert '"step": 8' in capsys.readouterr().out
