import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare, prepare_common, prepare_share
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import LocalFolder
from tests.data.prepare.test_text import files, write_corpus

JOB = """
import sys, time
from dataclasses import replace
from flax_transformers.data.prepare import shards
from flax_transformers.data.dataset import prepare_share
from tests.data.prepare.test_shard_jobs import corpus

if __name__ == "__main__":
    write = shards.tokenize_shard

    def slowly(*arguments):
        write(*arguments)
        time.sleep(float(sys.argv[3]))

    shards.tokenize_shard = slowly
    job, jobs = map(int, sys.argv[2].split("/"))
    prepare_share(corpus(sys.argv[1]), None, job, jobs)
"""


def corpus(folder):
    return TextData(
        source=TextSource(f"{folder}/corpus.jsonl"),
        tokenizer=TokenizerConfig("wordpiece", vocab_size=60, lowercase=True),
        filters=Filters(drop_duplicates=True),
        validation_fraction=0.2,
        store=f"{folder}/store",
        shards=4,
        prepare_processes=1,
    )


@pytest.fixture
def data(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=200)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.writelines((tmp_path / "corpus.jsonl").read_text().splitlines(True)[::7])
    return corpus(tmp_path)


def start(folder, job, rest=0.0, code=JOB):
    """A process with one job's share, which rests after each shard."""
    script = Path(folder, "job.py")
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, script, folder, job, str(rest)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        stderr=subprocess.PIPE,
    )


def made_at_once(data, tmp_path):
    """The store that one process makes with the same tokenizer, for that is not trained twice."""
    whole = replace(data, store=str(tmp_path / "whole"))
    prepare_common(whole)
    for name in files(data.store):
        if name.startswith("tokenizer/"):
            Path(whole.store, name).write_bytes(Path(data.store, name).read_bytes())
    prepare(whole)
    return files(whole.store)


@pytest.mark.multi_process
def test_jobs_at_once_one_of_them_killed_and_run_again_make_the_store_of_one_process(
    data, tmp_path
):
    prepare_common(data)
    killed = start(tmp_path, "0/2", rest=200)
    while not Path(data.store, "shards/00000.json").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.02)
    assert start(tmp_path, "1/2").wait(timeout=60) == 0  # beside the first, not behind it
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not Path(data.store, "manifest.json").exists()
    assert prepare_share(data, None, 0, 2) is not None  # and finishes what is now whole
    assert files(data.store) == made_at_once(data, tmp_path)


def test_the_job_that_ends_last_finishes_the_store_and_any_may_run_again(data):
    prepare_common(data)
    found = [prepare_share(data, None, job, 3) for job in (2, 0, 0, 1)]
    assert [prepared is None for prepared in found] == [True, True, True, False]
    again = prepare_share(data, None, 2, 3)
    assert again.fingerprint == found[-1].fingerprint
    assert again.train.num_documents + again.validation.num_documents == 200


def test_a_job_reads_the_records_of_its_own_shards_until_all_are_there(data, monkeypatch):
    prepare_common(data)
    read, records = LocalFolder.read, []

    def noted(folder, name, *part):
        if name.startswith("shards/"):
            records.append(int(name[len("shards/") : -len(".json")]))
        return read(folder, name, *part)

    monkeypatch.setattr(LocalFolder, "read", noted)
    assert prepare_share(data, None, 1, 4) is None
    assert records == [1]
    for job in (0, 2):
        assert prepare_share(data, None, job, 4) is None
    assert sorted(records) == [0, 1, 2]
    assert prepare_share(data, None, 3, 4) is not None


def test_records_of_another_corpus_do_not_finish_a_store(data):
    prepare_common(data)
    for job in range(3):
        prepare_share(data, None, job, 4)
    for number in (0, 3):
        record = json.loads(Path(data.store, "shards/00001.json").read_text())
        stale = json.dumps({**record, "made_from": "another"})
        Path(data.store, f"shards/{number:05d}.json").write_text(stale)
    assert prepare_share(data, None, 3, 4) is None
    assert prepare_share(data, None, 0, 4) is not None


def test_the_command_without_a_shard_does_what_jobs_have_left(data):
    prepare_common(data)
    prepare_share(data, None, 1, 4)
    made = Path(data.store, "shards/00001.json").stat().st_mtime_ns
    assert prepare(data).train.num_documents > 100
    assert Path(data.store, "shards/00001.json").stat().st_mtime_ns == made


def test_jobs_need_what_begin_makes(data):
    for drop in (True, False):
        with pytest.raises(UserError, match=r"not started; run .*prepare` with .* --begin first"):
            prepare_share(replace(data, filters=Filters(drop_duplicates=drop)), None, 0, 2)
        os.remove(Path(data.store, "corpus.json"))
    nothing = replace(data, tokenizer=TokenizerConfig("bytes"), filters=Filters())
    assert prepare_share(nothing, None, 0, 2) is None


@pytest.mark.parametrize(("job", "jobs"), [(2, 2), (-1, 2), (0, 5)])
def test_jobs_that_do_not_exist_are_refused(data, job, jobs):
    with pytest.raises(UserError, match=f"Shard {job}/{jobs} does not exist: .* data.shards, 4"):
        prepare_share(data, None, job, jobs)


def test_a_job_of_another_corpus_or_tokenizer_is_refused_and_its_shards_never_count(data, tmp_path):
    data = replace(data, filters=Filters())
    prepare_common(data)
    prepare_share(data, None, 0, 2)
    other = replace(data, tokenizer=replace(data.tokenizer, vocab_size=61))
    with pytest.raises(UserError, match=r"made with tokenizer.vocab_size=60; .*vocab_size=61"):
        prepare_share(other, None, 1, 2)
    write_corpus(tmp_path / "corpus.jsonl", documents=300)
    with pytest.raises(UserError, match="the same files have changed since"):
        prepare_share(data, None, 1, 2)
    os.remove(Path(data.store, "corpus.json"))  # as if two had claimed the folder at once
    prepared = prepare(data)
    assert prepared.train.num_documents + prepared.validation.num_documents == 300


def test_a_damaged_record_of_the_origin_is_refused(data):
    prepare_common(data)
    Path(data.store, "corpus.json").write_text('{"settings": 3')
    with pytest.raises(UserError, match=r"corpus.json of the unfinished store .* is damaged"):
        prepare(data)
