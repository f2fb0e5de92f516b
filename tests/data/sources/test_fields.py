"""Fields of records, by one rule for every format and source."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from flax_transformers.data.sources.documents import Counts, Decoder, Invalid
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import check_first_records, read_documents
from flax_transformers.data.sources.row_files import text_in, value_in
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError
from flax_transformers.post_training.conversations import ConversationSource

ROWS = [
    {"one": "first text, “quoted”", "two": "zweiter", "label": 0},
    {"one": None, "two": None, "label": 1},
    {"one": " \n", "two": "", "label": 1},
    {"one": "line\nline", "two": 'a "b"', "label": 2},
]
FIELDS = {"text_field": "one", "second_field": "two", "label_field": "label"}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_list(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows))


def write_indented(path: Path, rows: list[dict]) -> None:
    path.write_text("\ufeff" + json.dumps(rows, indent=2))


def write_object(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps({"version": "1", "tags": ["a"], "data": rows}))


def write_splits(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps({"test": [], "train": rows}, indent=1))


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


FORMATS = {
    "a.jsonl": write_lines,
    "b.ndjson": write_lines,
    "c.json": write_lines,
    "list.json": write_list,
    "indented.json": write_indented,
    "object.json": write_object,
    "splits.json": write_splits,
    "d.csv": write_csv,
    "e.parquet": write_parquet,
}
SOURCES = {
    "text": lambda path: TextSource(path, text_field="one"),
    "pairs": lambda path: PairSource(path, source_field="one", target_field="two"),
    "labelled": lambda path: LabelledSource(path, **FIELDS),
}
EXPECTED = {
    "text": ["first text, “quoted”", "line\nline"],
    "pairs": [("first text, “quoted”", "zweiter"), ("line\nline", 'a "b"')],
    "labelled": [
        (("first text, “quoted”", "zweiter"), ("0",)),
        (("line\nline", 'a "b"'), ("2",)),
    ],
}


def read(source, shards=1):
    counts = Counts()
    found = [d for n in range(shards) for _, d in read_documents(source, n, shards, counts)]
    return [(d.text, d.labels) if d.labels else d.text for d in found], counts


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_records_give_the_same_documents_in_every_format(kind, name, tmp_path):
    FORMATS[name](tmp_path / name, ROWS)
    found, counts = read(SOURCES[kind](str(tmp_path)))
    assert found == EXPECTED[kind]
    assert (counts.documents, counts.empty, counts.invalid) == (2, 2, 0)
    assert read(SOURCES[kind](str(tmp_path)), 3) == (found, counts)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_tsv_file_with_names_is_read_by_them(kind, tmp_path):
    (tmp_path / "a.tsv").write_text("label\ttwo\tone\n0\tzweiter\tfirst text, “quoted”\n")
    assert read(SOURCES[kind](str(tmp_path)))[0] == EXPECTED[kind][:1]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_table_without_names_is_read_by_its_columns(kind, ending, tmp_path):
    (tmp_path / f"a{ending}").write_text({".csv": "1,du,you\n", ".tsv": "1\tdu\tyou\n"}[ending])
    source = {
        "text": TextSource(str(tmp_path), text_field="2"),
        "pairs": PairSource(str(tmp_path), source_field="2", target_field="1"),
        "labelled": LabelledSource(
            str(tmp_path), text_field="2", second_field="1", label_field="0"
        ),
    }[kind]
    expected = {"text": "you", "pairs": ("you", "du"), "labelled": (("you", "du"), ("1",))}
    assert read(source)[0] == [expected[kind]]


NESTED = [
    {"id": 1, "tr": {"de": "eins", "en": "one", "n": 1}},
    {"id": 2, "tr": None},
    {"id": 3, "tr": {"de": None, "en": None, "n": 3}},
    {"id": 4, "tr": {"de": "vier", "en": "four", "n": 4}},
]
NESTED_FORMATS = [name for name in FORMATS if name != "d.csv"]


@pytest.mark.parametrize("name", NESTED_FORMATS)
def test_a_dot_selects_a_field_of_an_object(name, tmp_path):
    FORMATS[name](tmp_path / name, NESTED)
    path = str(tmp_path)
    assert read(TextSource(path, text_field="tr.en"))[0] == ["one", "four"]
    pairs = PairSource(path, source_field="tr.de", target_field="tr.en")
    assert read(pairs)[0] == [("eins", "one"), ("vier", "four")]
    labelled = LabelledSource(path, text_field="tr.de", label_field="tr.n", on_invalid="skip")
    assert read(labelled)[0] == [(("eins",), ("1",)), (("vier",), ("4",))]


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_with_a_dot_goes_before_an_object(name, tmp_path):
    FORMATS[name](tmp_path / name, [{"a.b": "whole name", "a": "other"}])
    assert read(TextSource(str(tmp_path), text_field="a.b"))[0] == ["whole name"]


@pytest.mark.parametrize("name", NESTED_FORMATS)
def test_lists_of_texts_are_lines_and_nulls_are_none(name, tmp_path):
    rows = [
        {"text": ["one", "two"], "turns": [{"say": "hi", "who": 1}, {"say": "you", "who": 2}]},
        {"text": ["three", None, "four"], "turns": [{"say": "bye", "who": 1}]},
        {"text": [], "turns": []},
    ]
    FORMATS[name](tmp_path / name, rows)
    found, counts = read(TextSource(str(tmp_path)))
    assert (found, counts.empty) == (["one\ntwo", "three\nfour"], 1)
    assert read(TextSource(str(tmp_path), text_field="turns.say"))[0] == ["hi\nyou", "bye"]


ARROW = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "binary_view": pyarrow.binary_view(),
    "fixed_size_binary": pyarrow.binary(3),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", ARROW)
def test_every_arrow_type_of_text_is_text(kind, tmp_path):
    texts = [None, "añ", "you"]
    binary = "binary" in kind
    values = [text.encode() if binary and text else text for text in texts]
    column = pyarrow.array(values, ARROW[kind])
    table = pyarrow.table({"text": column, "label": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(TextSource(str(tmp_path)))[0] == ["añ", "you"]
    found, _ = read(LabelledSource(str(tmp_path), on_invalid="skip"))
    assert found == [(("añ",), ("añ",)), (("you",), ("you",))]


LISTS = {
    "list": pyarrow.list_(pyarrow.string()),
    "large_list": pyarrow.large_list(pyarrow.large_string()),
    "fixed_size_list": pyarrow.list_(pyarrow.string(), 2),
    "of dictionaries": pyarrow.list_(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
}


@pytest.mark.parametrize("kind", LISTS)
def test_every_arrow_list_of_texts_is_text(kind, tmp_path):
    column = pyarrow.array([["a", "b"], None, ["c", None]], LISTS[kind])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    found, counts = read(TextSource(str(tmp_path)))
    assert (found, counts.empty) == (["a\nb", "c"], 1)


def test_other_columns_of_parquet_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", NESTED)
    with pytest.raises(UserError, match=r"no column 'tr\.fr', it has 'tr\.de', 'tr\.en', 'tr\.n'"):
        read(TextSource(str(tmp_path), text_field="tr.fr"))
    with pytest.raises(UserError, match=r"column 'tr' of .* is of type struct<.*, not text"):
        read(TextSource(str(tmp_path), text_field="tr"))
    with pytest.raises(UserError, match=r"column 'tr\.n' of .* is of type int64, not text"):
        read(TextSource(str(tmp_path), text_field="tr.n"))


BAD = b'{"text": "a\xffb"}\n'
BAD_BYTES = {
    "a.jsonl": BAD,
    "b.json": b"[" + BAD + b"]",
    "c.csv": b"text\na\xffb\n",
    "d.tsv": b"text\na\xffb\n",
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_not_utf8_follow_the_policy_in_every_format(name, tmp_path):
    (tmp_path / name).write_bytes(BAD_BYTES[name])
    with pytest.raises(UserError, match="not valid UTF-8"):
        read(TextSource(str(tmp_path)))
    found, counts = read(TextSource(str(tmp_path), on_invalid="replace"))
    assert (found, counts.invalid) == (["a\N{REPLACEMENT CHARACTER}b"], 1)
    assert read(TextSource(str(tmp_path), on_invalid="skip"))[1].invalid == 1


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (3.0, "3"), ("x", "x"), (True, "true"), (2.5, "2.5")]
)
def test_labels_are_the_same_in_json_and_parquet(value, expected, tmp_path):
    for name in ("a.jsonl", "list.json", "e.parquet"):
        FORMATS[name](tmp_path / name, [{"text": "x", "label": value}])
        assert read(LabelledSource(str(tmp_path / name)))[0] == [(("x",), (expected,))]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_field_that_no_record_has_is_a_wrong_name(name, policy, tmp_path):
    FORMATS[name](tmp_path / name, ROWS)
    with pytest.raises(UserError, match="'body', it has 'one', 'two', 'label'"):
        check_first_records(TextSource(str(tmp_path), text_field="body", on_invalid=policy))


def test_the_first_file_of_every_ending_is_checked(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    write_lines(tmp_path / "b.json", [{"content": "x"}] * 3)
    with pytest.raises(UserError, match=r"first 3 records of .*b\.json:1 has no field 'text'"):
        check_first_records(TextSource(str(tmp_path), on_invalid="skip"))


def test_records_without_settings_for_their_fields_are_to_be_corrected_themselves(tmp_path):
    write_lines(tmp_path / "chats.jsonl", [{"messages": [{"content": "no role"}]}])
    with pytest.raises(UserError, match=r"\); correct the records, or give another path"):
        check_first_records(ConversationSource(str(tmp_path)))


def test_a_field_that_one_record_lacks_follows_the_policy(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "y"}, {"text": "z"}])
    check_first_records(TextSource(str(tmp_path)))
    with pytest.raises(UserError, match=r"a\.jsonl:2 has no field 'text', it has 'body'"):
        read(TextSource(str(tmp_path)))
    found, counts = read(TextSource(str(tmp_path), on_invalid="skip"))
    assert (found, counts.invalid) == (["x", "z"], 1)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_whose_names_lack_the_field_is_refused_even_without_rows(name, tmp_path):
    (tmp_path / name).write_text("body\n")
    with pytest.raises(UserError, match=r"table .*a\.[ct]sv has no column 'text', it has 'body'"):
        read(TextSource(str(tmp_path), on_invalid="skip"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dev": [{"text": "x"}]}', "has no split 'train', it has 'dev'"),
        ('{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "no split 'train', it has 'a', 'b'"),
        ('{"train":\n"x"}', "holds a JSON str, not a list of rows"),
        ('[{"text": "x"},', "neither one JSON value nor one on each line"),
        ('[{"text": "x"}, 3]', r"Row 1 of .*a\.json holds a JSON int, not an object"),
    ],
)
def test_json_that_holds_no_rows_raises_a_user_error(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(TextSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": ["a", "b"]}', ["a\nb"]),
        ('{"text": ["a"]}\n{"text": ["b"]}\n', ["a", "b"]),
        ('{"text": "cut\n{"text": "b"}\n', ["b"]),
        ('\n\n{"text": "a"}\n', ["a"]),
        ('{"meta": [{"x": 1}]}\n{"text": "b"}\n', ["b"]),
        ("", []),
        ("[]", []),
        ('{"data": []}', []),
    ],
)
def test_lines_of_json_are_told_from_one_value(content, expected, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert read(TextSource(str(tmp_path), on_invalid="skip"))[0] == expected


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "e.parquet"])
def test_compressed_files_read_as_plain_ones(name, ending, tmp_path):
    FORMATS[name](tmp_path / name, ROWS)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / f"{name}{ending}").write_bytes(COMPRESS[ending](content))
    for kind, make in SOURCES.items():
        assert read(make(str(tmp_path)))[0] == EXPECTED[kind]


def test_fields_of_any_record():
    row = {"a": {"b": [1, 2]}, "c": [{"d": "x"}, {"d": "y"}], "n": None, "bytes": b"\xc3\xa9"}
    assert value_in(row, "a.b", "here") == [1, 2]
    assert value_in(row, "c.d", "here") == ["x", "y"]
    assert value_in(row, "n.any", "here") is None
    assert value_in(["x", "y"], "1", "here") == "y"
    decoder = Decoder(replace=False)
    assert text_in(decoder, row, "bytes", "here") == "é"
    assert text_in(decoder, row, "n", "here") == ""
    for field, problem in {
        "a.x": "has no field 'a.x', it has 'a', 'c', 'n', 'bytes'",
        "c.x": "has no field 'c.x'",
        "bytes.x": "has no field 'bytes.x'",
        "a.b": "has a list of int in 'a.b', not text",
        "a": "has a dict in 'a', not text",
    }.items():
        with pytest.raises(Invalid, match=f"^here {problem}"):
            text_in(decoder, row, field, "here")
