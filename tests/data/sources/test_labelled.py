"""Labelled texts: all formats, classes and numbers, and what is left out."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.labelled import LabelledSpec

ROWS = [("good film", "quite", "up"), ("bad, bad film", "no", "down"), ("so so", "well", "up")]
NAMES = ("text", "other", "label")


def read(source):
    counts = Counts()
    found = [document for _, document in sources.read_documents(source, counts=counts)]
    return [(document.text, document.labels) for document in found], counts


def source_of(kind, folder, rows=ROWS, **settings):
    """The same rows as a file of some kind; the source that reads them."""
    fields = {"second_field": "other"}
    if kind == "jsonl":
        text = "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows)
        path = folder / "rows.jsonl"
        path.write_text(text)
    elif kind == "json by split":
        path = folder / "rows.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"test": [], "train": rows}).encode()))
        fields = {"text_field": "0", "second_field": "1", "label_field": "2"}
    elif kind == "csv":
        path = folder / "rows.csv"
        quoted = ["text,other,label", *(f'"{a}",{b},{c}' for a, b, c in rows)]
        path.write_text("\r\n".join(quoted))
    elif kind == "tsv without names":
        path = folder / "rows.tsv"
        path.write_text("".join(f"{c}\t{a}\t{b}\n" for a, b, c in rows))
        fields = {"text_field": "1", "second_field": "2", "label_field": "0"}
    else:
        import pyarrow
        from pyarrow import parquet

        path = folder / "rows.parquet"
        columns = dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
    return LabelledSource(str(path), **fields | settings)


@pytest.mark.parametrize("kind", ["jsonl", "json by split", "csv", "tsv without names", "parquet"])
def test_every_format_gives_the_same_texts_and_labels(kind, tmp_path):
    found, counts = read(source_of(kind, tmp_path))
    assert found == [((a, b), (c,)) for a, b, c in ROWS]
    assert (counts.documents, counts.empty, counts.invalid) == (3, 0, 0)


def test_labels_are_names_whole_numbers_or_numbers(tmp_path):
    rows = [("a", "b", 3), ("c", "d", 1)]
    assert [labels for _, labels in read(source_of("parquet", tmp_path, rows))[0]] == [
        ("3",),
        ("1",),
    ]
    rows = [("a", "b", 3.0), ("c", "d", 1.0)]  # as tables write them where a label is missing
    assert [labels for _, labels in read(source_of("parquet", tmp_path, rows))[0]] == [
        ("3",),
        ("1",),
    ]
    rows = [("a", "b", 2.5), ("c", "d", "-1e-2")]
    found = read(source_of("jsonl", tmp_path, rows, label="number"))[0]
    assert [labels for _, labels in found] == [(2.5,), (-0.01,)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"}', "rows.jsonl:2 has no field 'label'"),
        ('{"text": "a", "label": null}', "rows.jsonl:2 has no label"),
        ('{"text": "a", "label": " "}', "rows.jsonl:2 has no label"),
        ('{"text": "a", "label": NaN}', "rows.jsonl:2 has no label"),
        ('{"label": "x"}', "rows.jsonl:2 has no field 'text'"),
        ("[1, 2]", "rows.jsonl:2 holds a JSON list"),
        ('{"text": "\\ud800", "label": "x"}', "rows.jsonl:2 is not valid UTF-8"),
    ],
)
def test_a_row_that_is_not_valid_is_named_or_skipped_and_counted(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '{"text": "b", "label": "x"}'
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match="fix it, or set on_invalid") as error:
        read(LabelledSource(str(path)))
    assert said in str(error.value)
    found, counts = read(LabelledSource(str(path), on_invalid="skip"))
    assert (len(found), counts.invalid) == (2, 1)


def test_empty_texts_are_left_out_and_nul_becomes_a_space(tmp_path):
    rows = [{"text": " ", "label": "x"}, {"text": "a\0b", "label": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found, counts = read(LabelledSource(str(tmp_path)))
    assert (found, counts.empty) == ([(("a b",), ("x",))], 1)


def test_a_table_may_hold_long_texts(tmp_path):
    rows = [("long " * 40_000, "other", "x")]
    assert read(source_of("csv", tmp_path, rows))[0][0][0][0] == rows[0][0].strip()


def test_a_split_that_is_not_there_is_named(tmp_path):
    source = source_of("json by split", tmp_path, split="dev")
    with pytest.raises(UserError, match="no split 'dev', it has 'test', 'train'"):
        read(source)


def prepared(folder, rows, held=ROWS[:1], **settings):
    source = source_of("jsonl", folder, rows, **settings)
    (folder / "held").mkdir()
    held = source_of("jsonl", folder / "held", held, **settings)
    tokenizer = TokenizerConfig("bytes")
    data = TextData(source=source, validation_source=held, tokenizer=tokenizer, shards=2)
    return prepare(data, folder / "store")


def test_classes_are_those_of_the_training_texts_in_order(tmp_path):
    store = prepared(tmp_path, ROWS)
    assert store.label_names == ("down", "up")
    found = [store.train.labels(document).tolist() for document in range(3)]
    assert found == [[1], [0], [1]]


def test_how_many_texts_are_longer_than_a_sequence_is_logged(tmp_path, caplog):
    store = prepared(tmp_path, ROWS)
    store.examples("train", LabelledSpec(18, False))
    assert caplog.records == []
    store.examples("train", LabelledSpec(10, False))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"2 of 3 documents of {store.directory} (train) have more tokens than a sequence, 10, and "
        "are cut; the longest has 15"
    )


def test_integer_labels_are_sorted_by_value(tmp_path):
    rows = [("a", "b", n) for n in (10, 9, -1)]
    source = source_of("jsonl", tmp_path, rows)
    data = TextData(source=source, validation_fraction=0, tokenizer=TokenizerConfig("bytes"))
    assert prepare(data, tmp_path / "store").label_names == ("-1", "9", "10")


def test_a_class_that_training_never_had_is_named_or_left_out(tmp_path):
    with pytest.raises(UserError, match="a document of class 'up' .'good film quite'., which"):
        prepared(tmp_path, ROWS[1:2])
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="a document of class 'up'"):
        prepared(tmp_path / "again", ROWS, label_names=("down", "sideways"))


def test_a_held_out_text_of_an_unknown_class_can_be_skipped(tmp_path):
    store = prepared(tmp_path, ROWS[1:2], ROWS, on_invalid="skip")
    assert store.validation.num_documents == 1
    assert store.label_names == ("down",)
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="is empty, or nothing of it is left"):
        prepared(tmp_path / "again", ROWS[1:2], on_invalid="skip")


def test_other_stores_have_no_files_for_labels(tmp_path):
    source = source_of("jsonl", tmp_path, [(a, b, 1.5) for a, b, _ in ROWS], label="number")
    data = TextData(source=source, validation_fraction=0, tokenizer=TokenizerConfig("bytes"))
    store = prepare(data, tmp_path / "numbers")
    assert store.train.label_kind == "numbers"
    np.testing.assert_array_equal(store.train.labels(2), np.array([1.5], np.float32))
    (tmp_path / "a.txt").write_text("some text")
    data = TextData(
        source=TextSource(str(tmp_path / "a.txt")),
        validation_fraction=0,
        tokenizer=TokenizerConfig("bytes"),
        shards=1,
    )
    plain = prepare(data, tmp_path / "plain")
    assert plain.train.label_kind is None
    endings = {path.suffix for path in (tmp_path / "plain" / "train").iterdir()}
    assert endings == {".tokens", ".documents", ".sentences", ""}  # and the file unigrams
