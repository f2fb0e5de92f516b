import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare, prepare_common
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.prepare import shards as shards_module
from flax_transformers.data.prepare import text as prepare_module
from flax_transformers.data.sources.documents import Document
from flax_transformers.data.sources.records import Part, TextFile
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.data.tokenizers.sentences import split_sentences
from flax_transformers.errors import UserError

WORDS = ["a", "model", "reads", "and", "learns.", "The", "words", "of", "Text", "again;", "end!"]


def write_corpus(path, documents=60, seed=0, words=40):
    """A jsonl file of random sentences, one document a line; returns the texts."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, words)) + f" {number}." for number in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture
def data(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return TextData(
        source=TextSource(str(tmp_path / "corpus.jsonl")),
        tokenizer=TokenizerConfig("bytes", vocab_size=60),
        validation_fraction=0.2,
        store=str(tmp_path / "store"),
        shards=3,
    )


def files(directory):
    """Every file of a store but the lock, by name."""
    root = Path(directory)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def documents(prepared, store):
    """The texts of a split, in the order of the store."""
    ends = store.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    return [
        prepared.tokenizer.decode(store.tokens(int(start), int(end - start)))
        for start, end in zip(starts, ends, strict=True)
    ]


def test_the_store_holds_every_document_once_in_one_of_the_splits(data, tmp_path):
    texts = write_corpus(tmp_path / "corpus.jsonl", documents=200)
    prepared = prepare(data)
    train, validation = (documents(prepared, s) for s in (prepared.train, prepared.validation))
    assert sorted(train + validation) == sorted(texts)
    assert 20 < len(validation) < 60  # 20 % of 200


def test_sentences_end_where_the_splitter_says(data):
    prepared = prepare(data)
    store = prepared.train
    expected = np.cumsum(
        [
            len(prepared.tokenizer.encode_batch([sentence])[0])
            for text in documents(prepared, store)
            for sentence in split_sentences(text)
        ]
    )
    assert store.sentence_ends.tolist() == expected.tolist()


def test_exact_duplicates_stay_on_one_side_of_the_split(data, tmp_path):
    texts = write_corpus(tmp_path / "corpus.jsonl", documents=40)
    lines = [json.dumps({"text": text}) + "\n" for text in texts * 3]
    np.random.default_rng(0).shuffle(lines)
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    prepared = prepare(data)
    train, validation = (documents(prepared, s) for s in (prepared.train, prepared.validation))
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 120


def test_the_split_does_not_depend_on_order_or_shards(data, tmp_path):
    one = prepare(data)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    other = prepare(replace(data, shards=5, store=str(tmp_path / "other")))
    assert sorted(documents(one, one.validation)) == sorted(documents(other, other.validation))


def test_a_validation_source_is_used_whole_and_nothing_is_held_out(data, tmp_path):
    texts = write_corpus(tmp_path / "held_out.jsonl", documents=7, seed=1)
    data = replace(data, validation_source=TextSource(str(tmp_path / "held_out.jsonl")))
    prepared = prepare(data)
    assert sorted(documents(prepared, prepared.validation)) == sorted(texts)
    assert prepared.train.num_documents == 60


def test_a_file_that_is_trained_on_and_held_out_gives_a_warning(data, tmp_path, caplog):
    file = next(path for _, path in data.source.files())
    held_out = TextSource(str(file.parent / "." / file.name))
    prepare(replace(data, validation_source=held_out))
    assert f"{file.name} is read for source and for validation_source" in caplog.text
    caplog.clear()
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"train": [{"text": "one"}], "test": [{"text": "two"}]}))
    source = TextSource(str(both))
    divided = replace(data, source=source, validation_source=replace(source, split="test"))
    assert prepare(divided, tmp_path / "divided").validation.num_documents == 1
    assert "is read for source" not in caplog.text
    same = replace(divided, validation_source=source)
    for job in (prepare, prepare_common):
        caplog.clear()
        job(same, tmp_path / job.__name__)
        assert "both.json is read for source and for validation_source" in caplog.text


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}\n', '{"data": [{"text": "a"}]}'])
def test_a_json_file_without_splits_is_both_of_them(text, data, tmp_path, caplog):
    (tmp_path / "rows.json").write_text(text)
    source = TextSource(str(tmp_path / "rows.json"))
    data = replace(data, source=source, validation_source=replace(source, split="test"))
    prepare(data, tmp_path / "same")
    assert "rows.json is read for source and for validation_source" in caplog.text


def test_a_fraction_of_zero_holds_out_nothing(data):
    prepared = prepare(replace(data, validation_fraction=0.0))
    assert prepared.validation is None
    assert prepared.train.num_documents == 60


def test_the_tokenizer_sees_training_documents_only(data, monkeypatch):
    seen = []
    train = prepare_module.train_tokenizer
    monkeypatch.setattr(
        prepare_module, "train_tokenizer", lambda c, texts: seen.extend(texts) or train(c, ())
    )
    prepared = prepare(data)
    assert sorted(seen) == sorted(documents(prepared, prepared.train))


def test_unigram_counts_are_those_of_the_tokens(data):
    store = prepare(data).train
    expected = np.bincount(store.tokens(0, store.num_tokens), minlength=store.vocab_size)
    assert store.unigram_counts.tolist() == expected.tolist()


def test_a_wordpiece_tokenizer_is_saved_inside_and_loads_again(data):
    config = TokenizerConfig("wordpiece", vocab_size=60, lowercase=True)
    prepared = prepare(replace(data, tokenizer=config))
    again = open_dataset(replace(data, tokenizer=config))
    assert again.tokenizer.fingerprint == prepared.tokenizer.fingerprint == prepared.train.tokenizer
    assert documents(again, again.train)[0].islower()


def test_preparing_again_changes_no_file_and_does_no_work(data, monkeypatch):
    prepare(data)
    before = {name: os.stat(Path(data.store, name)).st_mtime_ns for name in files(data.store)}
    monkeypatch.delattr(prepare_module, "write_shards")
    prepare(data)
    after = {name: os.stat(Path(data.store, name)).st_mtime_ns for name in files(data.store)}
    assert before == after


@pytest.mark.multi_process
def test_two_processes_write_the_same_bytes_as_one(data, tmp_path):
    prepare(replace(data, prepare_processes=1), tmp_path / "one")
    prepare(replace(data, prepare_processes=2), tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    assert len(one) == 3 * 7 + 6  # shards; corpus.json, tokenizer, unigrams, manifest.json


def test_a_store_in_a_bucket_has_the_bytes_of_a_local_one(data, tmp_path):
    bucket = prepare(data, f"file://{tmp_path}/bucket")
    prepare(data)
    assert files(tmp_path / "bucket") == files(data.store)
    opened = open_dataset(replace(data, store=f"file://{tmp_path}/bucket"))
    assert documents(opened, opened.train) == documents(bucket, bucket.train)


KILLED = """
import os, signal, sys
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig

def run(corpus, store, kind, last):
    rename, done = os.replace, 0

    def rename_or_die(temporary, path):
        nonlocal done
        if str(path).startswith(store):
            done += 1
            if done > last:
                os.kill(os.getpid(), signal.SIGKILL)
        rename(temporary, path)

    os.replace = rename_or_die
    prepare(
        TextData(
            source=TextSource(corpus),
            tokenizer=TokenizerConfig(kind, 60),
            validation_fraction=0.2,
            store=store,
            shards=3,
            prepare_processes=1,
        )
    )

for line in sys.stdin:
    corpus, store, kind, last = line.split()
    child = os.fork()
    if child == 0:
        run(corpus, store, kind, int(last))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_killed():
    """A function that prepares in another process, which is killed instead of giving its name to
    one more file than ``last``. One process imports what all of them need, and forks them."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:

        def run(data, last):
            print(data.source.path, data.store, data.tokenizer.kind, last, file=parent.stdin)
            parent.stdin.flush()
            return int(parent.stdout.readline())

        yield run
        parent.stdin.close()


# 0: nothing, 1: the corpus, 2: the tokenizer, then 7 files a shard, unigrams, the manifest last.
@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 1, 2, 6, 8, 9, 22, 24, 25])
def test_after_being_killed_the_store_is_that_of_an_uninterrupted_run(
    data, tmp_path, run_killed, last
):
    assert run_killed(data, last) == -signal.SIGKILL
    assert "manifest.json" not in files(data.store)
    prepare(replace(data, prepare_processes=1))
    prepare(replace(data, prepare_processes=1), tmp_path / "uninterrupted")
    assert files(data.store) == files(tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2, 3])  # the corpus, then the tokenizer's three files
def test_a_tokenizer_that_was_not_saved_whole_is_trained_again(data, run_killed, last):
    data = replace(data, tokenizer=TokenizerConfig("wordpiece", vocab_size=60))
    assert run_killed(data, last) == -signal.SIGKILL
    prepared = prepare(data)
    assert prepared.tokenizer.fingerprint == prepared.train.tokenizer
    assert prepared.train.num_documents + prepared.validation.num_documents == 60


@pytest.mark.slow
def test_the_shards_finished_before_the_kill_are_not_written_again(data, run_killed, monkeypatch):
    assert run_killed(data, 2 + 7 + 4) == -signal.SIGKILL
    made = []
    tokenize = shards_module.tokenize_shard
    monkeypatch.setattr(
        shards_module, "tokenize_shard", lambda *a: made.append(a[1]) or tokenize(*a)
    )
    prepare(replace(data, prepare_processes=1))
    assert made == [1, 2]


@pytest.mark.slow
def test_what_a_killed_run_left_unfinished_is_cleared_away_before_the_work_resumes(
    data, run_killed, monkeypatch
):
    def left():
        return [name for name in files(data.store) if ".tmp-" in name]

    run_killed(data, 6)
    assert left()
    seen = []
    write = prepare_module.write_shards
    monkeypatch.setattr(prepare_module, "write_shards", lambda *a: seen.append(left()) or write(*a))
    prepare(data)
    assert seen == [[]]


KILLED_WITH_CHILDREN = """
import sys
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig

if __name__ == "__main__":
    prepare(
        TextData(
            source=TextSource(sys.argv[1]),
            tokenizer=TokenizerConfig("bytes", 60),
            validation_fraction=0.2,
            store=sys.argv[2],
            shards=12,
            prepare_processes=2,
        )
    )
"""


@pytest.mark.multi_process
def test_a_parallel_run_killed_in_the_middle_resumes_to_the_same_bytes(data, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=3000, words=100)
    data = replace(data, shards=12)
    script = tmp_path / "prepare_in_two.py"
    script.write_text(KILLED_WITH_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, script, data.source.path, data.store],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(Path(data.store).glob("shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert "manifest.json" not in files(data.store)
    prepare(replace(data, prepare_processes=2))
    prepare(replace(data, prepare_processes=1), tmp_path / "uninterrupted")
    assert files(data.store) == files(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_finished_shard_that_is_damaged_is_found_and_written_again(
    data, tmp_path, run_killed, capsys
):
    assert run_killed(data, 4 + 3 * 7) == -signal.SIGKILL  # all but the manifest
    path = Path(data.store, "train/00001.tokens")
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 4
    path.write_bytes(bytes(damaged))
    prepare(replace(data, prepare_processes=1))
    prepare(replace(data, prepare_processes=1), tmp_path / "uninterrupted")
    assert files(data.store) == files(tmp_path / "uninterrupted")
    assert "train/00001.tokens" in capsys.readouterr().err


def test_shards_of_another_tokenizer_are_written_again(data, monkeypatch):
    prepare(data)
    store = Path(data.store)
    (store / "manifest.json").unlink()
    record = json.loads((store / "shards/00001.json").read_text())
    (store / "shards/00001.json").write_text(json.dumps({**record, "made_from": "another"}))
    made = []
    tokenize = shards_module.tokenize_shard
    monkeypatch.setattr(
        shards_module, "tokenize_shard", lambda *a: made.append(a[1]) or tokenize(*a)
    )
    prepare(data)
    assert made == [1]


def test_other_settings_are_refused_naming_both(data):
    prepare(data)
    other = replace(data, shards=4, source=replace(data.source, text_field="body"))
    asks = "made with shards=3, source.text_field='text'; .* asks for shards=4, .*='body'"
    with pytest.raises(UserError, match=asks):
        open_dataset(other)
    with pytest.raises(UserError, match="another store directory"):
        prepare(replace(data, validation_fraction=0.3))


@pytest.mark.slow
def test_an_unfinished_store_of_other_settings_is_refused_too(data, run_killed):
    run_killed(data, 5)
    with pytest.raises(UserError, match=r"validation_fraction=0.2; .* validation_fraction=0.3"):
        prepare(replace(data, validation_fraction=0.3))


def test_a_changed_corpus_is_refused_naming_both(data, tmp_path):
    made = prepare(data).train.corpus["content"][:12]
    write_corpus(tmp_path / "corpus.jsonl", seed=1, documents=61)
    with pytest.raises(UserError, match=rf"made with corpus {made} .* files have changed since"):
        prepare(data)


def test_opening_can_warn_that_the_corpus_changed(data, tmp_path, caplog):
    """As the first of several processes does; the store is used as it is."""
    made = prepare(data)
    write_corpus(tmp_path / "corpus.jsonl", seed=1, documents=61)
    assert open_dataset(data).fingerprint == made.fingerprint
    assert "have changed since" not in caplog.text
    assert open_dataset(data, compare="warning").fingerprint == made.fingerprint
    assert "have changed since" in caplog.text


def test_another_tokenizer_file_is_refused(data, tmp_path):
    config = TokenizerConfig("wordpiece", vocab_size=60)
    one = prepare(replace(data, tokenizer=config), tmp_path / "a").tokenizer
    write_corpus(tmp_path / "corpus.jsonl", documents=90, words=41)
    other = prepare(replace(data, tokenizer=replace(config, vocab_size=61)), tmp_path / "b")
    one.save(tmp_path / "tokenizer")
    data = replace(data, tokenizer=replace(config, path=str(tmp_path / "tokenizer")))
    prepare(data)
    other.tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(
        UserError, match=f"{one.fingerprint[:12]}, .* has {other.tokenizer.fingerprint[:12]}"
    ):
        prepare(data)


def test_a_finished_store_is_used_without_its_corpus(data):
    prepare(data)
    os.remove(data.source.path)
    assert prepare(data).train.num_documents > 0
    assert open_dataset(data).train.num_documents > 0


def test_opening_what_was_never_prepared_says_to_prepare(data):
    with pytest.raises(UserError, match="run `flax-transformers prepare`"):
        open_dataset(data)


def test_the_default_directory_follows_content_and_settings(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = replace(data, store=None)
    first = data.preparation().folder.path
    assert first.startswith(str(tmp_path / "cache/flax_transformers/stores/"))
    assert replace(data, workers=3, prepare_processes=1).preparation().folder.path == first
    assert replace(data, shards=4).preparation().folder.path != first
    assert prepare(data).directory == open_dataset(data).directory == first
    write_corpus(tmp_path / "corpus.jsonl", documents=61)
    assert data.preparation().folder.path != first


def test_an_empty_corpus_is_refused_before_anything_is_written(data):
    Path(data.source.path).write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(UserError, match=r"corpus .*/corpus.jsonl is empty"):
        prepare(data)
    assert not os.path.exists(data.store)


def test_a_fraction_that_holds_out_no_document_is_refused(data):
    with pytest.raises(UserError, match="holds out none of the 60 documents"):
        prepare(replace(data, validation_fraction=1e-6))


def test_a_fraction_that_holds_out_every_document_is_refused(data):
    with pytest.raises(UserError, match="holds out all 60 documents"):
        prepare(replace(data, validation_fraction=1 - 1e-6))


def test_a_large_corpus_is_checked_once_it_is_tokenized(data, monkeypatch):
    monkeypatch.setattr(prepare_module, "_LITTLE_TEXT", 100)
    with pytest.raises(UserError, match="holds out none of the 60 documents"):
        prepare(replace(replace(data, validation_fraction=1e-6), prepare_processes=1))


def test_documents_left_out_are_counted_for_the_user(data, capsys):
    with Path(data.source.path).open("a") as file:
        file.write('{"text": ""}\n{"text": "\\n"}\nno json\n')
    prepare(replace(data, source=replace(data.source, on_invalid="skip")))
    assert "left out: 2 empty documents, 1 invalid ones" in capsys.readouterr().err


def test_progress_is_one_line_a_shard_where_stderr_is_no_terminal(data, capsys):
    prepare(data)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        f"tokenized shard {number} of 3" for number in (1, 2, 3)
    ]
    assert lines[3].startswith("Prepared ")
    assert len(lines) == 4


def test_a_directory_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Could not write in .*/file/store: Not a directory"):
        prepare(data, tmp_path / "file/store")


@pytest.mark.multi_process
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_named_and_leaves_a_store_that_can_be_resumed(data, tmp_path, processes):
    write_corpus(tmp_path / "corpus.jsonl", documents=600)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match=r"Could not write in .*/store: File too large"):
            prepare(replace(data, prepare_processes=processes))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [name for name in files(data.store) if ".tmp-" in name]
    assert prepare(data).train.num_documents > 0


@pytest.mark.multi_process
def test_an_error_in_a_worker_process_reaches_the_caller(data):
    with Path(data.source.path).open("a") as file:
        file.write("no json\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl:61"):
        prepare(replace(data, prepare_processes=2))


HOLDS_THE_LOCK = """
import fcntl, pathlib, sys, time
with open(sys.argv[1], "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print(flush=True)
    time.sleep(1)
    pathlib.Path(sys.argv[2]).touch()
"""


@pytest.mark.slow
def test_a_second_writer_waits_for_the_first(data, tmp_path):
    os.makedirs(data.store)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, f"{data.store}/.lock", tmp_path / "let_go"],
        stdout=subprocess.PIPE,
    )
    with first:
        first.stdout.readline()
        prepare(data)
        assert (tmp_path / "let_go").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("shards", 0),
        ("prepare_processes", 0),
        ("workers", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        TextData(**{field: value})


@pytest.mark.parametrize("path", ["corpus", "link", "corpus/**/*.txt"])
def test_a_store_in_the_folder_of_its_corpus_is_refused_before_anything_is_written(
    path, data, tmp_path
):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("".join(f"Text {n}.\n\n" for n in range(40)))
    (tmp_path / "link").symlink_to("corpus")
    data = replace(data, source=TextSource(f"{tmp_path}/{path}"))
    mixture = MixedText(
        components=(Component(name="one", source=data.source),), tokenizer=data.tokenizer
    )
    for store in ("corpus", "corpus/store", "link/a/store"):
        for one in (data, mixture):
            with pytest.raises(UserError, match=r"its files would be read as text; choose a store"):
                prepare(one, tmp_path / store)
    assert files(tmp_path / "corpus").keys() == {"a.txt"}
    assert prepare(data, tmp_path / "corpus_store").directory
    assert prepare(data, tmp_path / "corpus" / ".cache" / "store").directory  # is not read


class NoteSource(TextSource):
    """Reads files of an ending that no file of a store has."""

    endings = (".note",)

    def parts(self):
        for _, path in self.files():
            yield Part(TextFile(path, "line"), lambda decoder, raw, _: Document(raw.decode()))


@pytest.mark.parametrize(
    ("source", "path"), [(NoteSource, "corpus"), (TextSource, "corpus/**/*.jsonl")]
)
def test_a_store_whose_files_are_not_read_may_be_in_the_folder_of_its_corpus(
    source, path, data, tmp_path
):
    (tmp_path / "corpus").mkdir()
    rows = "".join(f'{{"text": "Text {n}."}}\n' for n in range(40))
    for ending in ("note", "jsonl"):
        (tmp_path / "corpus" / f"a.{ending}").write_text(rows)
    data = replace(data, source=source(f"{tmp_path}/{path}"))
    for _ in range(2):
        assert prepare(data, tmp_path / "corpus" / "store").train.num_documents > 20


def test_a_store_beside_the_files_of_its_corpus_is_used(data, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Text {n}.\n\n" for n in range(40)))
    for path in ("a.txt", "*.txt"):
        own = replace(data, source=TextSource(f"{tmp_path}/{path}"))
        assert prepare(own, tmp_path / "of_a").directory
