"""Workdirs: paths, locks and atomic writes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from flax_transformers.cli.main import main
from flax_transformers.errors import UserError
from flax_transformers.evaluation.pictures import write_png
from flax_transformers.storage.workdir import (
    check_file,
    check_writable,
    open_workdir,
    workdir_lock,
    write_side_file,
    write_text,
)

HOLD = """
import sys, time
from etils import epath
from flax_transformers.storage.workdir import workdir_lock
with workdir_lock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(open_workdir("run")) == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("runs/a[1]", "has one of the characters"),
        ("~nosuchuser/run", "names an unknown user"),
        ("nosuchscheme://bucket/run", "cannot be reached"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(path, reason):
    with pytest.raises(UserError, match=reason):
        open_workdir(path)


def test_a_bucket_without_its_client_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'flax-transformers\[buckets\]'"):
        open_workdir("gs://bucket/run")


@pytest.mark.slow
def test_a_second_training_in_a_workdir_is_refused_until_the_first_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains in"), workdir_lock(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()
    with workdir_lock(tmp_path):
        pass


def test_a_command_in_a_workdir_in_use_is_refused_before_its_data_are_prepared(tmp_path, capsys):
    workdir, store = tmp_path / "run", tmp_path / "store"
    with workdir_lock(epath.Path(workdir)):
        code = main(["train", "bert_tiny", "--workdir", str(workdir), "--data.store", str(store)])
    assert code == 2 and "another process trains in" in capsys.readouterr().err
    assert not store.exists()


def test_a_file_is_replaced_whole(tmp_path):
    path = open_workdir(tmp_path) / "deep" / "config.json"
    write_text(path, "old and longer")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_two_processes_may_write_a_file_at_once(tmp_path, monkeypatch):
    path, replace = epath.Path(tmp_path / "sweep.json"), os.replace

    def while_another_process_writes(*names):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        write_text(path, "the same")
        replace(*names)

    monkeypatch.setattr(os, "replace", while_another_process_writes)
    write_text(path, "the same")
    assert path.read_text() == "the same"
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


def test_a_device_and_a_link_stay_what_they_are(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(epath.Path(pipe), "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to("file")
    write_text(epath.Path(link), "text")
    assert link.is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_side_file_replaces_a_folder_of_its_name(tmp_path, caplog):
    path = epath.Path(tmp_path / "samples" / "step_00000400.txt")
    (path / "inner").mkdir(parents=True)
    write_side_file(path, "text")
    assert path.read_text() == "text"
    assert (path.with_name("step_00000400.txt.unusable-0") / "inner").is_dir()
    assert "step_00000400.txt is not a file: set aside" in caplog.text


def test_a_plot_replaces_a_folder_of_its_name(tmp_path):
    path = epath.Path(tmp_path / "step_00000400.png")
    path.mkdir()
    write_png(path, np.zeros((2, 2, 3), np.uint8))
    assert path.is_file()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config.json cannot be written"):
        write_text(open_workdir(tmp_path) / "file" / "config.json", "text")


def test_a_workdir_that_cannot_be_a_folder_is_refused_and_a_new_one_is_not_made(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"^--workdir {file} is a file; name a folder$"):
        open_workdir(file)
    with pytest.raises(UserError, match=f"run is below {file}, which is a file; name a folder"):
        open_workdir(file / "run")
    with pytest.raises(UserError, match="^/proc/nope cannot be written"):
        check_writable(open_workdir("/proc/nope"))
    check_writable(open_workdir(tmp_path / "new" / "run"))
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_refused_and_none_is_left(tmp_path):
    for path, message in ((tmp_path, "is a folder"), ("/proc/nope/file", "cannot be written")):
        with pytest.raises(UserError, match=message):
            check_file(epath.Path(path))
    check_file(epath.Path(tmp_path) / "new" / "file.jsonl")
    check_file(epath.Path("/dev/null"))
    assert not list(tmp_path.iterdir())
