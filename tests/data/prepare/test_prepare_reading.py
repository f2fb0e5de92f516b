"""What preparation reads, and equal stores from jobs and processes for every format."""

import gzip
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare, prepare_common, prepare_share
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.prepare.text import training_documents
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.storage.folders import open_folder
from tests.data.prepare.test_text import files, write_corpus
from tests.data.sources.test_sharding import source_of

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts")


def bytes_read():
    """By all system calls of this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def data_of(source, store, **changes):
    settings = {"validation_fraction": 0.1, "tokenizer": TokenizerConfig("bytes"), **changes}
    return TextData(source=source, store=str(store), **settings)


def read_by(data):
    before = bytes_read()
    prepare(replace(data, prepare_processes=1))
    return bytes_read() - before


@needs_proc
@pytest.mark.parametrize("ending", ["jsonl.gz", pytest.param("jsonl", marks=pytest.mark.full)])
def test_a_hundred_shards_take_hardly_more_reading_than_one(tmp_path, ending, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_corpus(tmp_path / "corpus.jsonl", documents=6000, words=40)
    path = tmp_path / f"corpus.{ending}"
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes(), 1))
    data = data_of(TextSource(str(path)), tmp_path / "warm", shards=3)
    prepare(replace(data, prepare_processes=1))  # whatever is imported late has been read
    found = {
        shards: read_by(replace(data, store=str(tmp_path / str(shards)), shards=shards))
        for shards in (1, 100)
    }
    assert found[100] < 1.15 * found[1]


def test_passes_over_the_corpus_are_as_many_as_the_module_says(tmp_path, monkeypatch):
    rows = [{"text": f"a text {n % 90} for learning", "label": str(n % 3)} for n in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []
    reader = sources.CorpusReader
    for module in ("sources.read", "prepare.corpus"):
        monkeypatch.setattr(
            f"flax_transformers.data.{module}.CorpusReader",
            lambda *a, m=module: opened.append((m, *a[1])) or reader(*a),
        )
    data = data_of(
        LabelledSource(str(path)),
        tmp_path / "store",
        tokenizer=TokenizerConfig("wordpiece", 50, training_documents=20),
        filters=Filters(drop_duplicates=True),
        shards=5,
    )
    prepared = prepare(replace(data, prepare_processes=1))
    every = [0, 1, 2, 3, 4]
    beginning = ("sources.read", 0)
    duplicates, tokenizer, shards = (
        (module, *every) for module in ("prepare.corpus", "sources.read", "prepare.corpus")
    )
    assert opened == [beginning, duplicates, tokenizer, shards]
    assert prepared.label_names == ("0", "1", "2")
    assert prepared.train.num_documents + prepared.validation.num_documents == 90


def test_training_a_tokenizer_reads_no_further_than_it_has_to(tmp_path):
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(200))
    path.write_text(good + "no json\n")
    data = data_of(
        TextSource(str(path)),
        tmp_path / "store",
        tokenizer=TokenizerConfig("wordpiece", 25, training_documents=100),
    )
    texts = training_documents(open_folder(data.store), data.corpus)
    assert len([next(texts) for _ in range(150)]) == 150


KINDS = ("text jsonl", "text jsonl, gzip", "many kinds", "text parquet", "pairs in two files",
         "labelled csv", "squad", "tagged")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_three_jobs_make_the_store_of_one_process(kind, tmp_path):
    (tmp_path / "corpus").mkdir()
    source, count = source_of(kind, tmp_path / "corpus")
    data = data_of(source, tmp_path / "one", shards=7, filters=Filters(drop_duplicates=True))
    one = prepare(replace(data, prepare_processes=1))
    jobs = replace(data, store=str(tmp_path / "jobs"), prepare_processes=1)
    prepare_common(jobs)
    prepared = [prepare_share(jobs, None, job, 3) for job in (1, 2, 0)]
    assert prepared[:2] == [None, None]
    assert files(tmp_path / "jobs") == files(tmp_path / "one")
    assert one.train.num_documents + one.validation.num_documents <= count
    assert (
        sum(manifest_of(data)["left_out"].values())
        + one.train.num_documents
        + (one.validation.num_documents)
        == count
    )


def manifest_of(data):
    return json.loads(Path(data.store, "manifest.json").read_text())


@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["text jsonl, gzip", "many kinds"])
def test_processes_that_share_a_file_which_cannot_be_cut_make_the_same_store(kind, tmp_path):
    (tmp_path / "corpus").mkdir()
    source, _ = source_of(kind, tmp_path / "corpus")
    data = data_of(source, tmp_path / "one", shards=6)
    prepare(replace(data, prepare_processes=1))
    prepare(replace(replace(data, store=str(tmp_path / "two")), prepare_processes=2))
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_files_of_a_version_with_other_shards_are_not_used(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=50)
    source = TextSource(str(tmp_path / "corpus.jsonl"))
    data = data_of(source, tmp_path / "store", shards=3, filters=Filters(drop_duplicates=True))
    prepare_common(data)
    prepare_share(replace(data, prepare_processes=1), None, 0, 3)
    store = Path(data.store)
    record = json.loads((store / "shards/00000.json").read_text())
    record["made_from"] = record["made_from"].partition(", dealt as")[0]
    (store / "shards/00000.json").write_text(json.dumps(record))
    (store / "duplicates/by_shard").unlink()
    (store / "duplicates/found").write_bytes(b"numbers of documents in the corpus")
    (store / "train/00000.tokens").write_bytes(b"other documents")
    prepare(replace(data, prepare_processes=1))
    prepare(replace(replace(data, store=str(tmp_path / "new")), prepare_processes=1))
    (store / "duplicates/found").unlink()
    assert files(store) == files(tmp_path / "new")


def test_a_store_of_many_shards_opens_quickly_and_is_read_at_random(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=600, words=5)
    source = TextSource(str(tmp_path / "corpus.jsonl"))
    data = data_of(source, tmp_path / "store", shards=300, verify=False)
    made = prepare(replace(data, prepare_processes=1))
    began = time.process_time()
    store = open_dataset(data).train
    assert time.process_time() - began < 1  # 0.05 s where nothing else runs
    assert store.document_ends.tolist() == made.train.document_ends.tolist()
    whole = store.tokens(0, store.num_tokens)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, store.num_tokens - 50, 2000).tolist():
        np.testing.assert_array_equal(store.tokens(start, 50), whole[start : start + 50])
