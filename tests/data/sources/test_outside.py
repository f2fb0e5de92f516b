"""Files as other programs write them: read right, or refused with what to do."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.read import check_first_records, read_documents
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError


def read(source):
    check_first_records(source)
    counts = Counts()
    return [(d.text, *d.labels) for _, d in read_documents(source, counts=counts)], counts


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "rows", "cells"),
    [
        ("a.csv", "text,label\ngood,x\nHello, world,y\n", 3),
        ("a.tsv", "text\tlabel\ngood\tx\nHello\tworld\ty\n", 3),
    ],
)
def test_a_row_with_more_cells_than_names_is_invalid(name, rows, cells, tmp_path):
    path = write(tmp_path, name, rows)
    with pytest.raises(UserError, match=rf":3 has {cells} cells, but the first row has 2"):
        read(LabelledSource(path))
    found, counts = read(LabelledSource(path, on_invalid="skip"))
    assert (found, counts.invalid) == ([(("good",), "x")], 1)
    named = [rows.replace("label\n", "label,\n"), rows.replace("x\n", "x,,\n")]
    for more in named if name == "a.csv" else ():  # further empty cells, as spreadsheets write them
        write(tmp_path, name, more.replace("Hello, world", "Hello"))
        assert read(LabelledSource(path))[0] == [(("good",), "x"), (("Hello",), "y")]


def test_a_row_with_more_cells_than_the_first_is_invalid_without_names_too(tmp_path):
    path = write(tmp_path, "a.csv", "good,x\nHello, world,y\n")
    with pytest.raises(UserError, match=r":2 has 3 cells, but the first row has 2"):
        read(LabelledSource(path, text_field="0", label_field="1"))


@pytest.mark.parametrize(
    "rows",
    ['"never closed\nb\n', '"he said "so" to me"\nb\n', '"a\\"b"\nc\n'],
    ids=["never closed", "not doubled", "escaped"],
)
def test_wrong_quotes_do_not_join_rows(rows, tmp_path):
    path = write(tmp_path, "a.csv", f"text\ngood\n{rows}")
    with pytest.raises(UserError, match=r"a\.csv:3 is not a row of a table .* written twice"):
        read(TextSource(path))


def test_a_name_that_two_columns_have_is_refused(tmp_path):
    path = write(tmp_path, "a.csv", "text,text,label\na,b,x\n")
    with pytest.raises(UserError, match=r"several columns 'text'; rename all but one"):
        read(LabelledSource(path))


@pytest.mark.parametrize("policy", ["error", "replace"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_utf_16_is_refused_and_its_remedy_named(name, encoding, policy, tmp_path):
    content = {"a.csv": "text\nHello\n", "a.jsonl": '{"text": "Hello"}\n'}.get(name, "Hello, you")
    path = write(tmp_path, name, content.encode(encoding))
    with pytest.raises(UserError, match="iconv -f UTF-16 -t UTF-8"):
        read(TextSource(path, on_invalid=policy))


def test_the_remedy_for_latin_1_is_to_convert_it(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nh\u00e9llo,x\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not valid UTF-8 at byte 1\); convert it, as with iconv"):
        read(LabelledSource(path))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ],
)  # fmt: skip
def test_a_compressed_file_that_lacks_its_ending_is_named(ending, compress, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        path = write(tmp_path, name, compress(b'{"text": "one"}\n' * 9))
        with pytest.raises(UserError, match=rf"add \{ending} to its name"):
            read(TextSource(path, on_invalid="replace"))
        found, _ = read(TextSource(write(tmp_path, name + ending, compress(b'{"text": "one"}\n'))))
        assert len(found) == 1


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_without_a_byte_is_damaged(ending, tmp_path):
    with pytest.raises(UserError, match="is cut short or damaged"):
        read(TextSource(write(tmp_path, f"a.txt{ending}", b"")))


def test_the_mark_of_every_file_that_was_concatenated_is_left_out(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\n\n\xef\xbb\xbftwo\n")
    assert read(TextSource(path))[0] == [("one",), ("two",)]


def test_questions_may_begin_with_a_byte_order_mark(tmp_path):
    asked = {"id": 1, "question": "When?", "answers": [{"text": "1870", "answer_start": 7}]}
    article = {"title": "t", "paragraphs": [{"context": "It was 1870.", "qas": [asked]}]}
    content = json.dumps({"data": [article]}).encode()
    path = write(tmp_path, "a.json", b"\xef\xbb\xbf" + content)
    assert read(QuestionSource(path))[0] == [(("When?", "It was 1870."),)]


@pytest.mark.parametrize("value", ["1e300", "-1e39", "1e400", "NaN"])
def test_a_number_that_float32_does_not_hold_is_no_label(value, tmp_path):
    path = write(
        tmp_path, "a.jsonl", f'{{"text": "x", "label": 1}}\n{{"text": "y", "label": {value}}}\n'
    )
    with pytest.raises(UserError, match=r":2 has no label: .* is not a number of 32 bits"):
        read(LabelledSource(path, label="number"))


@pytest.mark.parametrize("word", ["New York B-LOC", "York"], ids=["a blank", "no tag"])
def test_words_of_a_sentence_have_as_many_columns(word, tmp_path):
    path = write(tmp_path, "a.txt", f"EU B-ORG\n{word}\n\nIt O\n")
    with pytest.raises(UserError, match=r"a\.txt:2 has [13] columns, but the word before has 2"):
        read(TaggedSource(path, word_column=0, tag_column=-1))
    found, counts = read(TaggedSource(path, word_column=0, tag_column=-1, on_invalid="skip"))
    assert (found, counts.invalid) == ([(("It",), "O")], 1)
