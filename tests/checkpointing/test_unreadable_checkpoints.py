"""Storage that fails for a while changes nothing, and folders are not what their names say."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from flax_transformers.checkpointing import manager, step_directories
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints, find_checkpoint
from flax_transformers.errors import UserError
from flax_transformers.storage import checksums
from tests.checkpointing.checkpointing import (
    abstract_state,
    files_of,
    fingerprint,
    flip_bit,
    make_mesh,
    make_state,
    names_in,
    restore_newest,
    write_steps,
)

FAILURES = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT]


def failing(original: Any, part: str, number: int) -> Any:
    """``original``, but for paths that have ``part`` in them, at the start of a name."""

    def call(path: Any, *args: Any, **options: Any) -> Any:
        if f"/{part}" in os.fspath(path):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return original(path, *args, **options)

    return call


def assert_refused_and_unchanged(folder: Path, reason: str) -> None:
    for action in (restore_newest, find_checkpoint):
        with pytest.raises(UserError, match=rf"7 cannot be read \({reason}: .*nothing was changed"):
            action(folder)
    assert names_in(folder) == ["5", "7"]


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("part", ["7/state/manifest.ocdbt", "7/meta/metadata"])
def test_a_file_that_cannot_be_read_for_a_while_sets_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, number: int
) -> None:
    saved = write_steps(tmp_path, 5, 7)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_hash_file", failing(checksums._hash_file, part, number))
        assert_refused_and_unchanged(tmp_path, os.strerror(number))
    assert fingerprint(restore_newest(tmp_path).state) == saved[7]


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("part", ["7/", "7/DIGESTS.json", "7/meta"])
def test_a_folder_that_cannot_be_looked_into_does_not_look_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, number: int
) -> None:
    """``Path.exists`` and ``is_dir`` say no there."""
    saved = write_steps(tmp_path, 5, 7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(os.stat, part, number))
        assert_refused_and_unchanged(tmp_path, os.strerror(number))
    assert fingerprint(restore_newest(tmp_path).state) == saved[7]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, 7)
    (tmp_path / "7").chmod(0)
    try:
        assert_refused_and_unchanged(tmp_path, "Permission denied")
    finally:
        (tmp_path / "7").chmod(0o755)


def test_arrays_that_pass_their_check_and_then_cannot_be_read_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process of the job has no access: one process checks for all."""
    write_steps(tmp_path, 5, 7)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("PERMISSION_DENIED: Error opening file [OS error 13: Permission denied]")

    monkeypatch.setattr(manager, "_read_arrays", refuse)
    with pytest.raises(UserError, match=r"7 cannot be read \(Permission denied\); nothing was"):
        restore_newest(tmp_path)
    assert names_in(tmp_path) == ["5", "7"]


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path / "checkpoints", 5)
    monkeypatch.setattr(os, "stat", failing(os.stat, "checkpoints", errno.EIO))
    with pytest.raises(UserError, match="cannot be read"):
        step_directories.choose_newest(epath.Path(tmp_path / "checkpoints"), 8)


def test_a_failure_of_a_buckets_client_is_one_sentence_too() -> None:
    folder = epath.Path("gs://bucket/run/checkpoints/7")
    with pytest.raises(UserError, match=r"7 cannot be read \(503 try again: gs://bucket"):  # noqa: SIM117
        with step_directories.reading_step(folder):
            raise RuntimeError("503 try again\nand a long page")


def save(directory: Path, *steps: int, **config: Any) -> None:
    saving = Checkpoints(directory, CheckpointConfig(**config))
    abstract = abstract_state(make_mesh(1, 1, 1))
    for step in steps:
        assert saving.save(step, make_state(abstract, step), {"position": {"step": step}})
    saving.close()


def test_a_copied_folder_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 40, 50)
    shutil.copytree(tmp_path / "50", tmp_path / "999")
    assert restore_newest(tmp_path).step == 50
    assert find_checkpoint(tmp_path).step == 50
    assert f"{tmp_path}/999 is not used: it holds step 50" in caplog.text
    assert names_in(tmp_path) == ["40", "50", "999"]


def test_a_copied_folder_pushes_no_other_out_and_makes_way_for_the_step_itself(
    tmp_path: Path,
) -> None:
    save(tmp_path, 50)
    shutil.copytree(tmp_path / "50", tmp_path / "999")
    save(tmp_path, 51, 52, 53, keep_latest=2)
    assert names_in(tmp_path) == ["52", "53", "999"]
    save(tmp_path, 999, keep_latest=2)
    assert names_in(tmp_path) == ["53", "999", "foreign-999-0"]
    assert restore_newest(tmp_path).step == 999


def test_where_only_copies_are_left_there_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 50)
    (tmp_path / "50").rename(tmp_path / "7")
    assert restore_newest(tmp_path) is None
    with pytest.raises(UserError, match="there is no checkpoint in"):
        find_checkpoint(tmp_path)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Steps 5 and 6, of which 5 lies elsewhere and is linked; where it lies."""
    save(tmp_path / "run", 5, 6)
    (tmp_path / "run" / "5").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "5").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_of_a_step_that_is_a_link_only_the_link_is_removed(linked: Path, tmp_path: Path) -> None:
    files = files_of(linked)
    save(tmp_path / "run", 7, keep_latest=3)
    assert names_in(tmp_path / "run") == ["5", "6", "7"]
    save(tmp_path / "run", 8, 9, keep_latest=3)
    assert names_in(tmp_path / "run") == ["7", "8", "9"]
    assert files_of(linked) == files and checksums.verify(epath.Path(linked)) == []


def test_a_damaged_step_that_is_a_link_is_set_aside_as_one(linked: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "6")
    flip_bit(linked / "meta" / "metadata")
    with pytest.raises(UserError, match="invalid-5-0 set aside"):
        restore_newest(tmp_path / "run")
    assert (tmp_path / "run" / "invalid-5-0").is_symlink() and linked.is_dir()


def test_a_folder_that_ends_while_it_is_listed_has_no_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(step_directories, "exists", lambda path: True)
    assert step_directories.finished_steps(epath.Path(tmp_path / "checkpoints")) == []
