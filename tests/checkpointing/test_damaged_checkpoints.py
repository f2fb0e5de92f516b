"""A step that does not pass its check is set aside, and the one before is used."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    Checkpoints,
    find_checkpoint,
)
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


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_sets_the_step_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = write_steps(tmp_path, 5, 7)
    names = files_of(tmp_path / "7")
    assert {"DIGESTS.json", "_CHECKPOINT_METADATA", "commit_success.txt"} < set(names)
    for name in names:
        flip_bit(tmp_path / "7" / name)
        caplog.clear()
        restored = restore_newest(tmp_path)
        assert (restored.step, fingerprint(restored.state)) == (5, saved[5]), name
        assert names_in(tmp_path) == ["5", "invalid-7-0"], name
        assert f"{tmp_path}/7 is damaged ({name}" in caplog.text
        assert "set aside as invalid-7-0" in caplog.text
        (tmp_path / "invalid-7-0").rename(tmp_path / "7")
        flip_bit(tmp_path / "7" / name)
    assert fingerprint(restore_newest(tmp_path).state) == saved[7]


@pytest.mark.slow
def test_every_bit_of_the_digests_themselves_is_covered(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    raw = (tmp_path / "1" / "DIGESTS.json").read_bytes()

    def passes(bit: int) -> bool:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            checksums._decode(bytes(flipped))
        except ValueError:
            return False
        return True

    assert [bit for bit in range(8 * len(raw)) if passes(bit)] == []


def drop(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.txt").unlink()


def add(folder: Path) -> None:
    (folder / "state" / "d" / "stray").write_bytes(b"")


def truncate(folder: Path) -> None:
    path = folder / "state" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder: Path) -> None:
    subprocess.run(["rm", "-r", folder], check=True)
    folder.mkdir()


def lose_digests_and_arrays(folder: Path) -> None:
    (folder / "DIGESTS.json").unlink()
    (folder / "state" / "manifest.ocdbt").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop, "tokenizer/vocab.txt is missing"),
        (add, "state/d/stray does not belong to it"),
        (truncate, "state/manifest.ocdbt has changed"),
        (empty, "state/_METADATA is missing"),
        (lose_digests_and_arrays, "state/manifest.ocdbt is missing"),
    ],
)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, named: str
) -> None:
    saved = write_steps(tmp_path, 5, 7)
    damage(tmp_path / "7")
    restored = restore_newest(tmp_path)
    assert (restored.step, fingerprint(restored.state)) == (5, saved[5])
    assert named in caplog.text
    assert names_in(tmp_path) == ["5", "invalid-7-0"]


def test_hidden_files_of_other_programs_do_not_damage_a_step(tmp_path: Path) -> None:
    write_steps(tmp_path, 7)
    (tmp_path / "7/state/.AppleDouble").mkdir()
    for name in (".DS_Store", "meta/._metadata", "state/.AppleDouble/d"):
        (tmp_path / "7" / name).write_bytes(b"")
    assert find_checkpoint(tmp_path).step == 7
    assert restore_newest(tmp_path).step == 7


def test_a_step_is_hashed_once_in_a_process_unless_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, 7)
    hashed, verify = [], checksums.verify
    monkeypatch.setattr(checksums, "verify", lambda one: hashed.append(one) or verify(one))
    for _ in range(2):
        assert find_checkpoint(tmp_path).step == 7
    assert restore_newest(tmp_path).step == 7
    assert len(hashed) == 1
    flip_bit(tmp_path / "7" / "tokenizer" / "vocab.txt")
    with pytest.raises(UserError, match=r"tokenizer/vocab\.txt has changed"):
        find_checkpoint(tmp_path / "7")
    assert len(hashed) == 2


@pytest.mark.slow
def test_a_step_set_aside_can_be_written_again_and_be_set_aside_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 3)
    for _ in range(2):
        write_steps(tmp_path, 7)
        flip_bit(tmp_path / "7" / "meta" / "metadata")
        assert restore_newest(tmp_path).step == 3
    assert names_in(tmp_path) == ["3", "invalid-7-0", "invalid-7-1"]


def test_where_all_are_damaged_there_is_no_fresh_start(tmp_path: Path) -> None:
    write_steps(tmp_path, 7)
    flip_bit(tmp_path / "7" / "meta" / "metadata")
    for _ in range(2):
        with pytest.raises(UserError, match=r"passes verification \(invalid-7-0 set aside\)"):
            restore_newest(tmp_path)


def test_a_run_that_went_back_writes_the_later_steps_again(tmp_path: Path) -> None:
    abstract = abstract_state(make_mesh(1, 1, 1))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (5, 7):
        checkpoints.save(step, make_state(abstract, step), {})
    checkpoints.wait()
    flip_bit(tmp_path / "7" / "meta" / "metadata")
    assert checkpoints.restore_newest(abstract).step == 5
    assert checkpoints.save(7, make_state(abstract, 7), {})
    checkpoints.close()
    assert names_in(tmp_path) == ["5", "7", "invalid-7-0"]


def test_no_more_are_set_aside_than_allowed(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, 6, 7)
    for step in ("6", "7"):
        flip_bit(tmp_path / step / "meta" / "metadata")
    with pytest.raises(UserError, match=r"6 is damaged .* besides invalid-7-0.*invalid_to_keep"):
        restore_newest(tmp_path, invalid_to_keep=1)
    assert names_in(tmp_path) == ["5", "6", "invalid-7-0"]


def test_a_step_without_digests_is_not_used_when_another_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = write_steps(tmp_path, 5, 7)
    (tmp_path / "7" / "DIGESTS.json").unlink()
    restored = restore_newest(tmp_path)
    assert (restored.step, fingerprint(restored.state)) == (5, saved[5])
    assert "set aside as unverified-7-0" in caplog.text
    assert names_in(tmp_path) == ["5", "unverified-7-0"]


def test_the_newest_step_without_digests_is_used_if_none_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = write_steps(tmp_path, 5, 7, 9)
    for step in ("5", "7"):
        (tmp_path / step / "DIGESTS.json").unlink()
    flip_bit(tmp_path / "9" / "DIGESTS.json")
    restored = restore_newest(tmp_path)
    assert (restored.step, fingerprint(restored.state)) == (7, saved[7])
    assert "using 7 unverified" in caplog.text
    assert names_in(tmp_path) == ["5", "7", "invalid-9-0"]


def test_a_step_without_digests_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 7)
    (tmp_path / "7" / "DIGESTS.json").unlink()
    (tmp_path / "7" / "state" / "manifest.ocdbt").write_bytes(b"not a manifest")
    with pytest.raises(UserError, match=rf"{tmp_path}/7 has no checksums .* cannot be read"):
        restore_newest(tmp_path)
