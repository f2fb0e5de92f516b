"""The documents of each shard, for every kind of source, and how much is read for them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from flax_transformers.data.sources import files
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import CorpusReader, read_documents, tied_shards
from flax_transformers.data.sources.sharding import Sharding, runs, share
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError

COUNT = 300
TEXTS = [f"Ünïcode {n} 日本語 \U0001f600 " + "word " * (n * 7 % 40) + "end." for n in range(COUNT)]


def jsonl(rows, ends="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + ends for row in rows).encode()


def table(delimiter, rows):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows(rows)
    return text.getvalue().encode()


def write_parquet(folder):
    columns = {"text": TEXTS, "label": [str(n % 3) for n in range(COUNT)]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=40)


def squad(number):
    text = TEXTS[number]
    answers = [{"text": "end.", "answer_start": text.index("end.")}]
    asked = {"id": str(number), "question": f"What {number}?", "answers": answers}
    return {"title": f"t{number}", "paragraphs": [{"context": text, "qas": [asked]}]}


LABELLED = [{"text": text, "label": str(n % 3)} for n, text in enumerate(TEXTS)]
PAIRS = [{"source": text, "target": f"target {n}"} for n, text in enumerate(TEXTS)]
TAGGED = "\r\n\r\n".join(
    "\r\n".join(f"{i}\t{word}\t_\tTAG{i % 4}" for i, word in enumerate(text.split()[:9], 1))
    for text in TEXTS
).encode()
BLOCKS = "\r\n\r\n \r\n".join(f"{text}\r\nmore {n}" for n, text in enumerate(TEXTS)).encode()
LINES = "\n".join(TEXTS).encode()
HEADED = [("text", "label"), *((row["text"], row["label"]) for row in LABELLED)]
QUOTED = [HEADED[0], *((f'"two"\nlines, {text}', label) for text, label in HEADED[1:])]

FILES = {
    "text jsonl": {"a.jsonl": jsonl({"text": t} for t in TEXTS)},
    "text jsonl, CRLF": {"a.jsonl": jsonl(({"text": t} for t in TEXTS), "\r\n")},
    "text jsonl, gzip": {"a.jsonl.gz": gzip.compress(jsonl({"text": t} for t in TEXTS))},
    "blocks": {"a.txt": BLOCKS},
    "blocks, gzip": {"a.txt.gz": gzip.compress(BLOCKS)},
    "lines": {"a.txt": LINES},
    "file": {f"{n}.txt": text.encode() for n, text in enumerate(TEXTS[:90])},
    "many kinds": {
        "a.txt": BLOCKS,
        "b.jsonl": jsonl({"text": t} for t in TEXTS),
        "c.txt.gz": gzip.compress(BLOCKS),
        "d.txt": b"",
        "e.jsonl": b"\n\n" + jsonl([{"text": "last"}]),
    },
    "pairs jsonl": {"a.jsonl": jsonl(PAIRS)},
    "pairs tsv": {"a.tsv": "".join(f"{t}\ttarget\r\n" for t in TEXTS).encode()},
    "pairs in two files": {"a": LINES, "b": LINES.upper()},
    "labelled jsonl": {"a.jsonl": jsonl(LABELLED)},
    "labelled json": {"a.json": json.dumps(LABELLED).encode()},
    "labelled json lines": {"a.json": jsonl(LABELLED)},
    "labelled tsv": {"a.tsv": "".join(f"{t}\t{label}\n" for t, label in HEADED).encode()},
    "labelled csv": {"a.csv": table(",", QUOTED)},
    "squad": {"a.json": json.dumps({"data": [squad(n) for n in range(COUNT)]}).encode()},
    "tagged": {"a.conllu": TAGGED},
    "tagged, gzip": {"a.conllu.gz": gzip.compress(TAGGED)},
}
KINDS = [*FILES, "text parquet", "labelled parquet", "embedded"]


def source_of(kind, folder):
    """A source of the kind, and how many documents it has (None: of that kind we do not know)."""
    for name, content in FILES.get(kind, {}).items():
        (folder / name).write_bytes(content)
    if "parquet" in kind:
        write_parquet(folder)
    path = str(folder)
    if kind.startswith("pairs"):
        two = kind == "pairs in two files"
        found = PairSource(f"{path}/a", target_path=f"{path}/b") if two else PairSource(path)
    elif kind.startswith("labelled"):
        found = LabelledSource(path)
    elif kind == "squad":
        found = QuestionSource(path)
    elif kind.startswith("tagged"):
        found = TaggedSource(path)
    elif kind == "embedded":
        return TextSource(), None
    else:
        found = TextSource(
            path, documents={"lines": "line", "file": "file"}.get(kind, "blank_line")
        )
    return found, {"many kinds": 3 * COUNT + 1, "file": 90}.get(kind, COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_together_are_the_corpus_in_order(kind, tmp_path):
    source, count = source_of(kind, tmp_path)
    whole = [document for _, document in read_documents(source)]
    assert count in (None, len(whole))
    for shards in (2, 7, 64):
        found = [
            document for s in range(shards) for _, document in read_documents(source, s, shards)
        ]
        assert found == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [7, 64])
def test_a_run_of_shards_reads_what_each_of_them_alone_does(kind, shards, tmp_path):
    source, _ = source_of(kind, tmp_path)
    alone = [list(read_documents(source, shard, shards)) for shard in range(shards)]
    for first, last in ((0, shards), (1, shards - 1), (shards // 2, shards)):
        reader = CorpusReader(source, range(first, last), shards)
        found = [list(reader.documents(shard, Counts())) for shard in range(first, last)]
        assert found == alone[first:last]
    reader = CorpusReader(source, [1, shards - 2], shards)  # what is between them is passed over
    found = [list(reader.documents(shard, Counts())) for shard in (1, shards - 2)]
    assert found == [alone[1], alone[shards - 2]]


@pytest.mark.parametrize("kind", ["text jsonl", "blocks", "lines", "pairs tsv", "tagged"])
def test_shards_are_of_about_equal_size(kind, tmp_path):
    source, _ = source_of(kind, tmp_path)
    sizes = [len(list(read_documents(source, shard, 7))) for shard in range(7)]
    assert min(sizes) > 0.7 * COUNT / 7 and max(sizes) < 1.4 * COUNT / 7


@pytest.mark.parametrize(
    "kind", ["text jsonl, gzip", "pairs in two files", "labelled json", "squad"]
)
def test_a_file_that_is_read_from_its_beginning_fills_all_shards(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 64)
    source, _ = source_of(kind, tmp_path)
    sizes = [len(list(read_documents(source, shard, 7))) for shard in range(7)]
    assert min(sizes) > 0 and sum(sizes) == COUNT


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("documents", ["blank_line", "line"])
def test_a_border_may_be_at_any_byte_of_a_text(ends, documents, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(("a é" + ends + "日本" + ends + ends + " " + ends + "\U0001f600 b").encode())
    source = TextSource(str(path), documents=documents)
    whole = [document for _, document in read_documents(source)]
    size = path.stat().st_size
    for shards in (*range(2, size), size, 3 * size):
        found = [
            document for s in range(shards) for _, document in read_documents(source, s, shards)
        ]
        assert found == whole


def test_a_border_may_be_at_any_byte_of_rows_and_quoted_cells(tmp_path):
    rows = 'text,label\r\n"a ""quoted""\r\nline",x\r\né,y\r\n\r\n"日,本",z'
    (tmp_path / "a.csv").write_bytes(rows.encode())
    (tmp_path / "a.tsv").write_bytes('text\tlabel\n"a\tx\ré"\ty\n\n日\tz'.encode())
    for name, first in (("a.csv", 'a "quoted"\r\nline'), ("a.tsv", '"a')):
        source = LabelledSource(str(tmp_path / name))
        whole = [document for _, document in read_documents(source)]
        assert [d.labels for d in whole] == [("x",), ("y",), ("z",)]
        assert whole[0].text == (first,)
        for shards in range(2, 60):
            found = [d for s in range(shards) for _, d in read_documents(source, s, shards)]
            assert found == whole


def test_lines_beyond_the_limit_are_read_as_one_wherever_a_shard_begins(tmp_path, monkeypatch):
    for module in ("documents", "files", "records"):
        monkeypatch.setattr(f"flax_transformers.data.sources.{module}.LONGEST", 20)
    (tmp_path / "a.txt").write_text("word " * 20 + "\n\nb\n" + " " * 30 + "\nc\nd " + "x" * 50)
    for documents in ("blank_line", "line", "file"):
        source = TextSource(str(tmp_path), documents=documents)
        whole = [document for _, document in read_documents(source)]
        for shards in (2, 3, 7, 50):
            found = [d for s in range(shards) for _, d in read_documents(source, s, shards)]
            assert found == whole


def test_an_invalid_row_is_named_by_its_line_wherever_its_shard_begins(tmp_path):
    rows = [*jsonl({"text": t} for t in TEXTS).splitlines(keepends=True)]
    rows[250] = b"no json\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    source = TextSource(str(tmp_path / "a.jsonl"))
    assert all(list(read_documents(source, shard, 7)) for shard in (0, 1, 2, 3, 4, 6))
    with pytest.raises(UserError, match=r"a\.jsonl:251 is not valid JSON"):
        list(read_documents(source, 5, 7))
    counts = Counts()
    skipping = TextSource(str(tmp_path / "a.jsonl"), on_invalid="skip")
    for shard in range(7):
        list(read_documents(skipping, shard, 7, counts))
    assert (counts.documents, counts.invalid) == (COUNT - 1, 1)


def test_the_lines_before_a_row_are_counted_for_a_message_alone(tmp_path, monkeypatch):
    source, _ = source_of("text jsonl", tmp_path)
    monkeypatch.delattr(files.Place, "__str__")
    monkeypatch.setattr(
        files.Place, "__str__", lambda self: pytest.fail("asked for"), raising=False
    )
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 3}\n' + (tmp_path / "a.jsonl").read_bytes())
    skipping = TextSource(source.path, on_invalid="skip")
    assert len(list(read_documents(skipping))) == COUNT


class _Solid:
    """A part of a corpus that can be read from its beginning alone."""

    def __init__(self, size):
        self.size = size

    def solid(self, position):
        return 0, self.size


def borders(sizes, shards):
    sharding = Sharding([_Solid(size) for size in sizes], shards)
    starts = [sharding.start(shard) for shard in range(shards)]
    return starts, [sharding.tied(shard) for shard in range(shards)]


def test_borders_of_shards_move_to_the_ends_of_files_that_cannot_be_cut():
    assert borders([10, 30, 20, 40], 2) == ([0, 60], [False, False])
    assert borders([100, 100], 4) == ([0, 50, 100, 150], [False, True, False, True])
    assert borders([100, 110], 4) == ([0, 52, 100, 157], [False, True, False, True])
    assert borders([3, 90, 7], 2) == ([0, 50], [False, True])
    assert borders([], 3) == ([0, 0, 0], [False] * 3)
    assert borders([0, 0], 2) == ([0, 0], [False] * 2)


def test_what_is_tied_is_one_run_as_far_as_processes_allow():
    loose, tied = [False] * 6, [False, True, True, True, True, True]
    assert runs(range(6), loose, 1) == [[0, 1, 2, 3, 4, 5]]
    assert runs(range(6), loose, 2) == [[0], [1], [2], [3], [4], [5]]
    assert runs(range(6), tied, 1) == [[0, 1, 2, 3, 4, 5]]
    assert runs(range(6), tied, 2) == [[0, 1, 2], [3, 4, 5]]
    assert runs([0, 1, 4, 5], loose, 1) == [[0, 1], [4, 5]]
    assert runs([0, 1, 4, 5], tied, 1) == [[0, 1, 4, 5]]
    assert [len(run) for run in runs(range(1000), [False] * 1000, 2)] == [63] * 15 + [55]


def test_jobs_share_neighbouring_shards_and_no_file_if_that_can_be():
    assert [list(share(job, 3, [False] * 7)) for job in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    tied = [False, True, True, False, True, True, False, True, True]
    assert [list(share(job, 2, tied)) for job in range(2)] == [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    one_file = [False] + [True] * 8
    assert [len(share(job, 3, one_file)) for job in range(3)] == [3, 3, 3]


def test_a_gzip_file_ties_its_shards_and_lines_do_not(tmp_path):
    assert tied_shards(source_of("text jsonl, gzip", tmp_path)[0], 4) == [False, True, True, True]
    (tmp_path / "a.jsonl.gz").unlink()
    assert not any(tied_shards(source_of("text jsonl", tmp_path)[0], 64))


class CountingFiles:
    """Counts the bytes that are read through `Path.open`."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        monkeypatch.setattr(Path, "open", self._opener(Path.open))

    def _opener(self, original):
        def open_counted(path, *arguments, **options):
            raw = original(path, "rb", buffering=0)
            return io.BufferedReader(_Counted(raw, self), 512)

        return open_counted


class _Counted(io.RawIOBase):
    def __init__(self, raw, counter):
        self._raw, self._counter = raw, counter

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *where):
        return self._raw.seek(*where)

    def tell(self):
        return self._raw.tell()

    def readinto(self, buffer):
        count = self._raw.readinto(buffer)
        self._counter.bytes += count
        return count


ONE_READ = [kind for kind in FILES if kind not in ("file",)]


@pytest.mark.parametrize("kind", ONE_READ)
def test_a_corpus_is_read_once_for_any_number_of_shards(kind, tmp_path, monkeypatch):
    source, _ = source_of(kind, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    counter = CountingFiles(monkeypatch)
    for shards in (1, 7, 64):
        counter.bytes = 0
        dealt = runs(range(shards), tied_shards(source, shards), 1)
        for run in dealt:
            reader = CorpusReader(source, run, shards)
            for shard in run:
                list(reader.documents(shard, Counts()))
        assert len(dealt) == 1
        assert size <= counter.bytes < size + 12_000


@pytest.mark.parametrize("kind", ["text jsonl", "blocks", "lines", "pairs tsv", "tagged"])
def test_jobs_divide_the_reading(kind, tmp_path, monkeypatch):
    source, _ = source_of(kind, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    counter = CountingFiles(monkeypatch)
    for job in range(3):
        counter.bytes = 0
        run = share(job, 3, tied_shards(source, 64))
        reader = CorpusReader(source, run, 64)
        for shard in run:
            list(reader.documents(shard, Counts()))
        assert size / 3.2 < counter.bytes < size / 3 + 2000
