"""Rows to predict from, in every kind of file."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from flax_transformers.data.inputs import Inputs
from flax_transformers.errors import UserError


def write(path, text):
    path.write_text(text)
    return str(path)


def texts(rows):
    return [row.document.text for row in rows]


def test_two_fields_of_any_table_are_the_sides_of_a_row(tmp_path):
    rows = [("One, two", "b"), ("c d", "e")]
    lines = "".join(json.dumps({"q": a, "r": f" {b} "}) + "\n" for a, b in rows)
    jsonl = write(tmp_path / "a.jsonl", lines)
    csv = write(tmp_path / "a.csv", 'r,q\nb,"One, two"\ne,c d\n')
    for path in (jsonl, csv):
        assert texts(Inputs(path, ("q", "r")).rows()) == rows


def test_a_line_of_a_txt_file_is_a_text(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n two \r\n")
    assert texts(Inputs(path).rows()) == [("one",), ("two",)]


def test_words_have_places_in_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "Ab, c\u00e9!"}\n{"text": ["Ab", "c-d"]}\n')
    first, second = Inputs(path, words=True).rows()
    assert first.words == [("Ab", 0, 2), (",", 2, 3), ("c\u00e9", 4, 6), ("!", 6, 7)]
    assert second.words == [("Ab", 0, 2), ("c-d", 3, 6)]
    assert first.document.text == ("Ab", ",", "c\u00e9", "!") and first.document.words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),
        ("ที่ บ้าน", ["ที่", "บ้าน"]),
        ("می\u200cروم؟", ["می\u200cروم", "؟"]),
        ("cafe\u0301s, e\u20dd!", ["cafe\u0301s", ",", "e\u20dd", "!"]),
        ("क\u094d\u200dष ❤\ufe0f ok", ["क\u094d\u200dष", "❤\ufe0f", "ok"]),
    ],
)
def test_a_word_keeps_its_combining_marks_and_joiners(tmp_path, text, expected):
    (row,) = Inputs(write(tmp_path / "a.txt", f"{text}\n"), words=True).rows()
    assert [word for word, _, _ in row.words] == expected
    assert [text[start:end] for _, start, end in row.words] == expected


def test_sentences_in_columns_need_no_tags(tmp_path):
    path = write(tmp_path / "a.conllu", "# text\n1\tOne\n2\ttwo\n\n1\tthree\n")
    assert texts(Inputs(path, words=True).rows()) == [("One", "two"), ("three",)]


def test_words_in_columns_may_be_no_names_of_tags(tmp_path):
    words = ("می\u200cروم", "10\u00a0000", "क\u094d\u200dष")
    for name in ("a.conllu", "a.iob2", "a.conll"):
        path = write(tmp_path / name, "".join(f"1\t{word}\n" for word in words))
        assert texts(Inputs(path, words=True).rows()) == [words]


def test_contexts_of_questions_keep_their_ends(tmp_path):
    paragraph = {"context": " So. ", "qas": [{"id": "1", "question": "How?", "answers": []}]}
    squad = {"data": [{"title": "t", "paragraphs": [paragraph]}]}
    one = write(tmp_path / "a.json", json.dumps(squad))
    other = write(tmp_path / "b.jsonl", json.dumps({"question": "How?", "context": " So. "}))
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(squad).encode()))
    for path in (one, other, str(packed)):
        found = Inputs(path, ("question", "context"), questions=True).rows()
        assert texts(found) == [("How?", " So. ")]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.jsonl", '{"a": "x", "b": ""}\n', ("a", "b"), "a.jsonl:1 has an empty text; fix it"),
        ("a.jsonl", '{"a": 3}\n', ("a",), "a.jsonl:1 has a int in 'a', not text"),
        ("a.csv", "b\nx\n", ("a",), "has no column 'a'"),
        ("a.txt", "\n", ("a",), "a.txt:1 has no text"),
        ("b.txt", "", ("a",), "b.txt holds no rows"),
        ("a.pdf", "x", ("a",), "a.pdf is of no kind that is read"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(name, content, fields, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        Inputs(path, fields).rows()


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Inputs(str(tmp_path / "none.txt")).rows()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or a device"):
        Inputs(str(tmp_path / "pipe.txt")).rows()
