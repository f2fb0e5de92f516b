from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.read import fingerprint, read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError


def texts(path: Path | str, counts: Counts | None = None, **fields: str) -> list[str]:
    source = TextSource(path=str(path), **fields)
    return [document.text for _, document in read_documents(source, counts=counts)]


def write_parquet(path: Path, columns: dict[str, list], rows_per_group: int = 2) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\r\nstill one\n\n \ntwo\n\n\nthree")
    return path


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("blank_line", ["one\nstill one", "two", "three"]),
        ("line", ["one", "still one", "two", "three"]),
        ("file", ["one\nstill one\n\n \ntwo\n\n\nthree"]),
    ],
)
def test_a_txt_file_divides_as_documents_says(notes, documents, expected):
    assert texts(notes, documents=documents) == expected


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "you"}\n')
    assert texts(tmp_path) == ["hello", "you"]


def test_empty_documents_are_skipped_counted_and_keep_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["a", "", " \n", None, "b"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    counts = Counts()
    found = list(read_documents(TextSource(str(path)), counts=counts))
    assert found == [(0, Document("a")), (4, Document("b"))]
    assert counts == Counts(documents=2, empty=3, invalid=0)


def test_nul_characters_become_spaces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0b\n\n\0\0")
    counts = Counts()
    assert texts(path, counts) == ["a b"]
    assert counts.empty == 1


def test_gzipped_files_read_as_plain_ones(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'\n{"text": "four"}'))
    assert texts(tmp_path) == ["one", "two", "three", "four"]


def test_parquet_gives_its_text_column_row_by_row(tmp_path):
    rows = [f"row {i}" for i in range(700)]
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(700)), "body": rows}, 100)
    assert texts(path, text_field="body") == rows


def test_parquet_dictionaries_binaries_and_nulls_are_text_too(tmp_path):
    column = pyarrow.array(["a", "b", None, "a"]).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", {"text": column, "raw": [b"w", b"x", b"y", b"z"]})
    counts = Counts()
    assert texts(path, counts) == ["a", "b", "a"]
    assert counts.empty == 1
    assert texts(path, text_field="raw") == ["w", "x", "y", "z"]


def test_a_folder_is_read_in_order_below_hidden_and_unknown_files(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden/x.txt", "b/readme.md", "b/.y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]


def test_a_glob_takes_what_it_matches(tmp_path):
    for name in ("b2.txt", "b1.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "b*.txt") == ["b1.txt", "b2.txt"]


@pytest.mark.parametrize("documents", ["blank_line", "line", "file"])
def test_shards_hold_the_documents_in_the_order_of_the_corpus(tmp_path, documents):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"a{i}\n\nb{i}\n\nc{i}\n")
    (tmp_path / "x.jsonl").write_text('{"text": "j"}\n{"text": ""}\n{"text": "k"}\n')
    source = TextSource(str(tmp_path), documents=documents)
    counts = Counts()
    whole = list(read_documents(source, counts=counts))
    parts = [Counts() for _ in range(3)]
    shares = [list(read_documents(source, i, 3, parts[i])) for i in range(3)]
    assert all(shares)
    assert [text for _, text in itertools.chain(*shares)] == [text for _, text in whole]
    assert sum(part.documents for part in parts) == counts.documents == len(whole)
    assert sum(part.empty for part in parts) == counts.empty


def test_a_shard_outside_the_count_is_refused(notes):
    with pytest.raises(UserError, match="Shard 3 of 3"):
        list(read_documents(TextSource(str(notes)), 3, 3))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Three documents, the second with a byte that is not UTF-8 at offset 10."""
    path = tmp_path / "broken.txt"
    path.write_bytes(b"good\n\na\n\tb\xffd\n\nfine\n")
    return path


def test_invalid_utf8_stops_with_file_and_byte_offset(broken):
    with pytest.raises(UserError, match=r"broken\.txt is not valid UTF-8 at byte 10; .*on_invalid"):
        texts(broken)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("skip", ["good", "fine"]), ("replace", ["good", "a\n\tb\N{REPLACEMENT CHARACTER}d", "fine"])],
)
def test_invalid_utf8_is_skipped_or_replaced_and_counted(broken, policy, expected):
    counts = Counts()
    assert texts(broken, counts, on_invalid=policy) == expected
    assert counts == Counts(documents=len(expected), empty=0, invalid=1)


def test_invalid_utf8_in_parquet_names_the_row(tmp_path):
    binary = pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    path = write_parquet(tmp_path / "a.parquet", {"text": column})
    with pytest.raises(UserError, match=r"Row 1 of .*a\.parquet is not valid UTF-8 at byte 0"):
        texts(path)
    assert texts(path, on_invalid="skip") == ["ok"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:2 is not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:2 is not valid JSON"),
        ('["x"]', r"a\.jsonl:2 holds a JSON list"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:2 has no field 'text', it has 'body', 'id'"),
        ('{"text": 7}', r"a\.jsonl:2 has a int in 'text'"),
        (r'{"text": "a\ud800b"}', r"The text of .*a\.jsonl:2 is not valid UTF-8"),
    ],
)
def test_bad_json_rows_are_named_by_line_or_skipped_and_counted(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + row + '\n{"text": "three"}\n')
    with pytest.raises(UserError, match=message):
        texts(path)
    counts = Counts()
    assert texts(path, counts, on_invalid="skip") == ["one", "three"]
    assert counts.invalid == 1


def test_a_lone_surrogate_is_replaced_when_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b \ud83d\ude00"}')
    (text,) = texts(path, on_invalid="replace")
    assert text.encode().decode() == text
    assert text.startswith("a\N{REPLACEMENT CHARACTER}")
    assert text.endswith("b \N{GRINNING FACE}")


def test_a_missing_parquet_column_names_those_there(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(UserError, match="no column 'text', it has 'body', 'n'"):
        texts(path)
    with pytest.raises(UserError, match=r"'n' of .* is of type int64, not text"):
        texts(path, text_field="n")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", r"There is no file or folder .*absent\.txt"),
        ("*.jsonl", "No file matches the pattern"),
        ("empty", "has no text files"),
        ("notes.md", r"ending of .*notes\.md is not supported; use one of \.txt"),
    ],
)
def test_paths_without_text_raise_a_user_error(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=message):
        texts(tmp_path / path)


def test_a_bucket_path_raises_a_user_error():
    with pytest.raises(UserError, match="copy it first"):
        texts("gs://bucket/text")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("documents", ["line", "file"])
def test_a_truncated_gzip_raises_a_user_error(tmp_path, name, documents):
    whole = gzip.compress("".join(f'{{"text": "{i * i}"}}\n' for i in range(5000)).encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"gzip file .* is cut short"):
        texts(tmp_path / name, documents=documents)


def test_a_file_that_is_no_gzip_raises_a_user_error(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"gzip file .* damaged"):
        texts(tmp_path / "a.txt.gz")


def test_a_truncated_parquet_raises_a_user_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"row {i}" for i in range(1000)]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"parquet file .* is cut short or damaged"):
        texts(path)


def test_one_long_line_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 3_000_000)
    (text,) = texts(path)
    assert len(text) == 15_000_000


def test_reading_streams_within_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot json at all\n')
    documents = read_documents(TextSource(str(path)))
    assert next(documents) == (0, Document("one"))


def test_the_fingerprint_follows_files_and_document_rules(notes):
    source = TextSource(str(notes))
    before = fingerprint(source)
    assert fingerprint(source) == before
    assert fingerprint(TextSource(str(notes), documents="line")) != before
    status = notes.stat()
    os.utime(notes, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint(source) == before
    notes.write_bytes(notes.read_bytes()[::-1])
    os.utime(notes, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(source) != before


def test_the_fingerprint_of_a_folder_does_not_depend_on_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    before = fingerprint(TextSource(str(tmp_path / "a")))
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(TextSource(str(tmp_path / "b"))) == before


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with `jottings/1.0.0`, prepared here: 9 training and 3 test examples."""
    import tensorflow_datasets as tfds

    class Jottings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(9), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"jotting {i} é", "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Jottings(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def test_tfds_text_is_read_from_a_prepared_folder(tfds_folder):
    path = f"tfds:{tfds_folder}/jottings/1.0.0"
    assert sorted(texts(path)) == [f"jotting {i} é" for i in range(9)]
    assert len(texts(path, split="test")) == 3
    assert len(texts(path, split="train[:4]")) == 4


def test_tfds_text_is_found_by_name_without_its_builder(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder))
    by_folder = texts(f"tfds:{tfds_folder}/jottings/1.0.0")
    assert texts("tfds:jottings") == texts("tfds:jottings:1.0.0") == by_folder
    with pytest.raises(UserError, match=r"tfds:jottings:2\.0\.0 is not prepared here"):
        texts("tfds:jottings:2.0.0")


def test_tfds_examples_are_divided_into_shards_by_their_numbers(tfds_folder):
    source = TextSource(f"tfds:{tfds_folder}/jottings/1.0.0")
    shares = [list(read_documents(source, i, 2)) for i in range(2)]
    assert [number for number, _ in shares[1]] == [0, 1, 2, 3, 4]
    whole = [document for _, document in read_documents(source)]
    assert [document for share in shares for _, document in share] == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; its splits are 'test', 'train'|'train', 'test'"),
        ({"text_field": "body"}, "no feature 'body', it has .*'text'"),
        ({"text_field": "n"}, "feature 'n' of .* is a .*int.*, not text"),
    ],
)
def test_tfds_mistakes_raise_a_user_error(tfds_folder, fields, message):
    with pytest.raises(UserError, match=message):
        texts(f"tfds:{tfds_folder}/jottings/1.0.0", **fields)


@pytest.mark.parametrize("name", ["wikipedia/20230601.en", "/no/such/folder", "no_such_data"])
def test_tfds_data_that_is_not_prepared_says_how_to_prepare_it(name):
    with pytest.raises(UserError, match=r"not prepared here .*`tfds build .*array_record`"):
        texts(f"tfds:{name}")


def test_tfds_fingerprints_tell_splits_apart(tfds_folder):
    path = f"tfds:{tfds_folder}/jottings/1.0.0"
    train = fingerprint(TextSource(path))
    assert fingerprint(TextSource(path)) == train
    assert fingerprint(TextSource(path, split="test")) != train
