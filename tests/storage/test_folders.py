"""Local files of stores: the limit of open files, and atomic writes."""

import os
import resource

import pytest

from flax_transformers.storage import folders
from flax_transformers.storage.folders import LocalFolder, open_folder


@pytest.fixture
def folder(tmp_path):
    for number in range(600):
        (tmp_path / str(number)).write_bytes(b"%03d" % number)
    return LocalFolder(str(tmp_path))


def test_more_files_are_read_at_random_than_a_process_may_have_open(folder):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
    try:
        files = [folder.open(str(number)) for number in range(600)]
        for _ in range(2):
            assert [file.read(0, 3) for file in files] == [b"%03d" % i for i in range(600)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_that_was_replaced_is_not_read_as_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_OPEN_FILES", 1)
    file = folder.open("0")
    folder.open("1")
    (tmp_path / "new").write_bytes(b"new")
    os.replace(tmp_path / "new", tmp_path / "0")
    with pytest.raises(OSError, match="replaced by another file"):
        file.read(0, 3)


def test_writes_that_are_not_lasting_are_synced_together(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(folders.os, "fsync", lambda descriptor: synced.append("file"))
    monkeypatch.setattr(folders, "_sync_file_system", lambda descriptor: synced.append("all"))
    folder.write("a", b"a", lasting=False)
    assert synced == [] and folder.read("a") == b"a"
    folder.sync()
    folder.write("b", b"b")
    assert synced == ["all", "file", "file"]  # the file and its folder


def test_a_file_that_exists_is_left_as_it_is_unless_it_is_to_be_replaced(tmp_path, monkeypatch):
    folder = LocalFolder(str(tmp_path))
    folder.write("a/b", b"first", replace=False)
    folder.write("a/b", b"second", replace=False)
    assert folder.read("a/b") == b"first" and folder.names("a/") == ["a/b"]

    def refuse(*names):
        raise PermissionError

    monkeypatch.setattr(folders.os, "link", refuse)  # a file system without hard links
    folder.write("a/c", b"third", replace=False)
    assert folder.read("a/c") == b"third" and folder.names("a/") == ["a/b", "a/c"]


def test_a_folder_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/stores/text").path == str(tmp_path / "stores" / "text")
