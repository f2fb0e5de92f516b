"""Readers yield documents or raise one UserError for damaged and random data."""

import gzip
import json
import random
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from flax_transformers.data.sources import documents as documents_module
from flax_transformers.data.sources import files as files_module
from flax_transformers.data.sources import records as records_module
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError

CASES = 50
SPICE = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\n\n", b"\r", b"\t", b'"', b"{", b"\xef\xbb\xbf"),
    *(b"null\n", b'{"text": {}}\n', b'{"text": 1e999}\n', b'{"text": "\\ud800"}\n'),
    *(b"[" * 5000, b"1" * 5000),
]


def text_file():
    return "A first line.\nAnd more — of it.\n\n \nAnother.\n".encode()


def json_rows():
    row = {"text": "row é", "source": "eins", "target": "one"}
    return "".join(json.dumps({**row, "label": i % 3}) + "\n" for i in range(5)).encode()


def table():
    sink = pyarrow.BufferOutputStream()
    texts = [f"row {i}" for i in range(50)]
    parquet.write_table(pyarrow.table({"text": texts, "source": texts, "target": texts}), sink)
    return sink.getvalue().to_pybytes()


READERS = {
    "lines": (text_file, "corpus.txt", lambda path: TextSource(path, documents="line")),
    "paragraphs": (text_file, "corpus.txt", TextSource),
    "file": (text_file, "corpus.txt", lambda path: TextSource(path, documents="file")),
    "gzip": (lambda: gzip.compress(text_file()), "corpus.txt.gz", TextSource),
    "json lines": (json_rows, "corpus.jsonl", TextSource),
    "json lines, gzip": (lambda: gzip.compress(json_rows()), "corpus.jsonl.gz", TextSource),
    "parquet": (table, "corpus.parquet", TextSource),
    "pairs in json": (json_rows, "corpus.jsonl", PairSource),
    "pairs in columns": (lambda: b"ein\tone\nzwei\ttwo\n", "corpus.tsv", PairSource),
    "pairs in parquet": (table, "corpus.parquet", PairSource),
    "pairs in two files": (
        text_file,
        "corpus.txt",
        lambda path: PairSource(path, target_path=f"{path}.other"),
    ),
    "labels": (json_rows, "corpus.jsonl", LabelledSource),
}


def spoilt(content, chance):
    """The bytes with flips, cuts, repeats and insertions; now and then nothing but noise."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(200))
    spoilt = bytearray(content)
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(spoilt) + 1)
        match chance.randrange(4):
            case 0 if place < len(spoilt):
                spoilt[place] ^= 1 << chance.randrange(8)
            case 1:
                del spoilt[place:]
            case 2:
                spoilt[place:place] = chance.choice(SPICE)
            case _:
                spoilt[place:place] = spoilt[: chance.randrange(len(spoilt) + 1)]
    return bytes(spoilt)


@pytest.mark.parametrize("name", READERS)
def test_of_any_bytes_a_reader_yields_documents_or_one_user_error(name, tmp_path):
    make, file, source_of = READERS[name]
    chance, content, read, sentences = random.Random(name), make(), 0, []
    path = tmp_path / file
    (tmp_path / f"{file}.other").write_bytes(text_file())
    for _ in range(CASES):
        path.write_bytes(spoilt(content, chance))
        policy = chance.choice(["error", "skip", "replace"])
        source = replace(source_of(str(path)), on_invalid=policy)
        try:
            for _, document in read_documents(source):
                whole = document.whole
                assert whole.encode()  # no lone surrogates
                assert not whole.replace("\0", " ").isspace()
                assert isinstance(document.text, tuple) or "\0" not in document.text
                read += 1
        except UserError as error:
            sentences.append(str(error))
    assert read > 0
    assert all(str(tmp_path) in sentence and sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "tsv", "txt.gz", "jsonl.gz"])
def test_a_file_of_nothing_has_no_documents(tmp_path, ending):
    nothing = gzip.compress(b"") if "gz" in ending else b""
    (tmp_path / f"corpus.{ending}").write_bytes(nothing)
    (tmp_path / f"more.{ending}").write_bytes(gzip.compress(b"") if "gz" in ending else b"\n")
    source = PairSource if ending == "tsv" else TextSource
    assert list(read_documents(source(str(tmp_path)))) == []


@pytest.fixture
def short(monkeypatch):
    for module in (documents_module, files_module, records_module):
        monkeypatch.setattr(module, "LONGEST", 20)


@pytest.mark.parametrize("divided", ["line", "blank_line", "file"])
def test_long_texts_are_cut_at_spaces_and_nothing_is_lost(tmp_path, short, divided):
    text = "aa bbb cc dddd ee f gggg hhh\n" + "é" * 33 + "\n \nlast one\n"
    (tmp_path / "corpus.txt").write_text(text)
    source = TextSource(str(tmp_path / "corpus.txt"), documents=divided)
    found = [document.text for _, document in read_documents(source)]
    assert max(len(part.encode()) for part in found) <= 20
    assert found[:2] == ["aa bbb cc dddd ee f ", "gggg hhh"]
    assert "".join("".join(found).split()) == "".join(text.split())


def test_long_rows_are_not_valid_and_the_rows_behind_them_are_read(tmp_path, short):
    (tmp_path / "corpus.tsv").write_text("ein\tone\n" + "x" * 70 + "\ty\nzwei\ttwo\n")
    counts = Counts()
    source = PairSource(str(tmp_path / "corpus.tsv"), on_invalid="replace")
    found = [document.text for _, document in read_documents(source, counts=counts)]
    assert found == [("ein", "one"), ("zwei", "two")]
    assert counts.invalid == 1
    with pytest.raises(UserError, match=r"corpus.tsv:2 is longer than"):
        list(read_documents(replace(source, on_invalid="error")))
