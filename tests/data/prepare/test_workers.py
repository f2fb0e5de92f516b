"""Running work for shards in this process."""

import errno
import os
import subprocess
import sys
from multiprocessing import synchronize

import pytest

from flax_transformers.data.prepare import workers
from flax_transformers.data.prepare.workers import for_each_run
from flax_transformers.errors import UserError

THREADS = "TOKENIZERS_PARALLELISM"


@pytest.mark.parametrize("before", [None, "true"])
def test_one_process_tokenizes_on_one_core(monkeypatch, before):
    if before is None:
        monkeypatch.delenv(THREADS, raising=False)
    else:
        monkeypatch.setenv(THREADS, before)
    seen = []

    def work(run, note):
        seen.append((list(run), os.environ.get(THREADS)))

    for_each_run(work, [[0, 1], [2]], 1, done="made", total=3)
    assert seen == [([0, 1], "false"), ([2], "false")]
    assert os.environ.get(THREADS) == before
    for_each_run(work, [[0]], 2, done="made", total=1)  # there is nothing for the second to do
    assert seen[-1] == ([0], before)


def test_each_shard_of_a_run_is_reported(capsys):
    def work(run, note):
        for _ in run:
            note(10, 70)
            note(shards=1)

    for_each_run(work, [[0, 1], [4]], 1, done="made", total=5)
    assert capsys.readouterr().err.splitlines() == [
        "made shard 3 of 5: 10 documents, 70 tokens",
        "made shard 4 of 5: 20 documents, 140 tokens",
        "made shard 5 of 5: 30 documents, 210 tokens",
    ]


def test_without_shared_memory_the_remedy_is_named(monkeypatch):
    def refused(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(synchronize.SemLock, "__init__", refused)
    with pytest.raises(UserError, match="mount /dev/shm, or set data.prepare_processes to 1"):
        for_each_run(print, [[0], [1]], 2, done="made", total=2)


def test_documents_that_are_done_are_progress_to_the_watchdog(monkeypatch):
    """Repeating the same counts, as while a worker is stopped, is none."""
    seen = []
    monkeypatch.setattr(workers.watchdog, "progress", lambda: seen.append(1))
    with workers._Reporter("tokenized", 2, 0, "documents") as reporter:
        reporter.set(0, 0, 0)
        assert seen == []
        reporter.set(3, 10, 0)
        reporter.set(3, 10, 0)
        reporter.note(documents=1)
    assert len(seen) == 2


def test_data_configs_and_preparation_import_no_jax():
    modules = ("config", "mixture", "images.dataset", "prepare.shards", "prepare.duplicates")
    imports = ", ".join(f"flax_transformers.data.{name}" for name in modules)
    code = f"import sys, {imports}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
