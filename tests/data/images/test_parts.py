"""Image stores prepared by several jobs have the bytes of one prepared by one process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import PIL.Image
import pytest

from flax_transformers.data.dataset import prepare, prepare_common, prepare_share
from flax_transformers.data.images import parts as image_parts
from flax_transformers.data.images.store import SKIPPED
from flax_transformers.data.prepare import runner
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import LocalFolder
from flax_transformers.storage.locks import shared_lock
from tests.data.images.test_dataset import data, pixels, png, write_folder, write_idx
from tests.data.prepare.test_shard_jobs import start
from tests.data.prepare.test_text import files

JOB = """
import sys, time
from flax_transformers.data.images import parts as image_parts
from flax_transformers.data.dataset import prepare_share
from tests.data.images.test_parts import parts_of

if __name__ == "__main__":
    check = image_parts.check_part

    def slowly(*arguments):
        check(*arguments)
        time.sleep(float(sys.argv[3]))

    image_parts.check_part, image_parts._LEAST = slowly, 2
    job, jobs = map(int, sys.argv[2].split("/"))
    prepare_share(parts_of(sys.argv[1]), None, job, jobs)
"""


def parts_of(folder, **settings):
    return data(
        Path(folder, "pets"), store=f"{folder}/store", shards=5, prepare_processes=1, **settings
    )


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Two dozen images, some damaged or in modes that cameras and scanners write."""
    monkeypatch.setattr(image_parts, "_LEAST", 2)
    root = write_folder(tmp_path / "pets", count=8)
    for name, content in (("a", b""), ("b", b"hello"), ("c", png(0)[:-30]), ("d", png(3))):
        (root / "train/cat" / f"{name}.png").write_bytes(content)
    image = PIL.Image.fromarray(pixels(40))
    image.convert("CMYK").save(root / "train/dog/ink.jpg")
    image.convert("RGBA").save(root / "val/dog/glass.png")
    image.convert("I;16").save(root / "val/cat/deep.png")
    return parts_of(tmp_path)


def whole(pets, tmp_path):
    """The files that one process makes at once."""
    store = tmp_path / "whole"
    prepare(dataclasses.replace(pets, store=str(store), shards=1))
    return made(store)


def made(store):
    """Of a finished store, but for the note of what its parts were made from."""
    return {name: content for name, content in files(str(store)).items() if name != "corpus.json"}


def test_the_job_that_ends_last_finishes_the_store_and_any_may_run_again(pets, tmp_path):
    prepare_common(pets)
    found = [prepare_share(pets, None, job, 3) for job in (2, 0, 0, 1)]
    assert [prepared is None for prepared in found] == [True, True, True, False]
    assert prepare_share(pets, None, 2, 3).fingerprint == found[-1].fingerprint
    assert len(Path(pets.store, SKIPPED).read_text().splitlines()) == 3
    assert made(pets.store) == whole(pets, tmp_path)
    assert not any(name.startswith("parts/") for name in files(pets.store))


def test_a_share_of_the_images_is_held_out_alike_however_they_are_divided(pets, tmp_path):
    divided = dataclasses.replace(pets, validation_fraction=0.3)
    prepared = [prepare_share(divided, None, job, 2) for job in (0, 1)][-1]
    assert len(prepared.train) + len(prepared.validation) == 18  # with "d", of train alone
    assert made(divided.store) == whole(divided, tmp_path)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.multi_process
def test_a_job_that_is_killed_beside_another_and_run_again_makes_the_same(pets, tmp_path):
    killed = start(tmp_path, "0/2", rest=200, code=JOB)
    while not Path(pets.store, "parts/00000.json").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.02)
    assert start(tmp_path, "1/2", code=JOB).wait(timeout=60) == 0  # beside the first, not behind it
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not Path(pets.store, "manifest.json").exists()
    assert prepare_share(pets, None, 0, 2) is not None  # and finishes what is now whole
    assert made(pets.store) == whole(pets, tmp_path)


def test_one_process_resumes_with_the_existing_parts(pets):
    prepare_share(pets, None, 1, 4)
    record = Path(pets.store, "parts/00001.json")
    before, seen = record.stat().st_mtime_ns, []
    delete = LocalFolder.delete

    def noted(folder, name):
        seen.append((name, os.stat(os.path.join(folder.path, name)).st_mtime_ns))
        delete(folder, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFolder, "delete", noted)
        prepare(pets)
    assert ("parts/00001.json", before) in seen


def test_a_part_that_does_not_match_its_digest_is_written_again(pets, tmp_path, capsys):
    for name in ("parts/00000.items", "parts/00002.npz"):
        prepare_share(pets, None, 0, 2)
        file = Path(pets.store, name)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    prepare(pets)
    said = capsys.readouterr().err
    assert "Checking part 1 again" in said and "Checking part 3 again" in said
    assert made(pets.store) == whole(pets, tmp_path)


def test_jobs_with_other_images_or_numbers_are_refused(pets, tmp_path):
    prepare_common(pets)
    with pytest.raises(UserError, match="Shard 5/6 does not exist: .* data.shards, 5"):
        prepare_share(pets, None, 5, 6)
    with pytest.raises(UserError, match="made with shards=5; this run asks for shards=4"):
        prepare_share(dataclasses.replace(pets, shards=4), None, 1, 4)
    (tmp_path / "pets/train/cat/new.png").write_bytes(png(77))
    with pytest.raises(UserError, match="the same files have changed since"):
        prepare_share(pets, None, 1, 2)


def test_more_jobs_than_there_are_parts_have_nothing_to_do(tmp_path):
    few = data(write_idx(tmp_path / "mnist"), store=str(tmp_path / "store"))
    assert prepare_share(few, None, 7, 8) is None
    assert prepare_share(few, None, 1, 8) is None  # one part of training images, one of test
    assert len(prepare_share(few, None, 0, 8).train) == 40


def test_a_damaged_file_of_a_finished_store_is_named(tmp_path):
    prepared = prepare(data(write_idx(tmp_path / "mnist"), store=str(tmp_path / "store")))
    prepared.verify()
    file = tmp_path / "store/validation/labels"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    with pytest.raises(UserError, match="validation/labels of the image store .* sha256"):
        prepared.verify()


def test_a_job_that_waited_while_another_finished_finds_it_finished(pets, monkeypatch):
    prepare_share(pets, None, 0, 2)

    @contextlib.contextmanager
    def behind_the_others(folder):
        with monkeypatch.context() as others:
            others.setattr(runner, "shared_lock", shared_lock)
            prepare_share(pets, None, 1, 2)
        # There is nothing left to write.
        monkeypatch.setattr("flax_transformers.data.images.parts.write_parts", None)
        with shared_lock(folder):
            yield

    monkeypatch.setattr(runner, "shared_lock", behind_the_others)
    found = prepare_share(pets, None, 0, 2)
    assert found is not None and len(found.train) + len(found.validation) > 10
    assert not any(name.startswith("parts/") for name in files(pets.store))


def test_parts_that_a_kill_left_beside_a_finished_store_are_removed(pets, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFolder, "delete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(pets)
    assert Path(pets.store, "manifest.json").exists()
    assert Path(pets.store, "parts/00000.items").exists()
    prepare(pets)
    assert made(pets.store) == whole(pets, tmp_path)


def interrupted(folder, name):
    raise KeyboardInterrupt
