"""Pairs of texts: all formats, what is left out, and packing."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data import pair_examples
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.pair_examples import PairExamples, pack
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.prepare.origin import source_settings
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.store.token_store import SPLITS
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.objectives.sequence_to_sequence import PairSpec, SequenceToSequence

PAIRS = [("ein Hund", "a dog"), ("zwei Katzen", "two cats"), ("drei", "three")]


def read(source, shard=0, shards=1):
    counts = Counts()
    found = list(sources.read_documents(source, shard, shards, counts))
    return [(number, *document.text) for number, document in found], counts


def jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def write(kind, folder):
    """The same three pairs as files of some kind; the source that reads them."""
    lines = ["".join(f"{side}\n" for side in sides) for sides in zip(*PAIRS, strict=True)]
    if kind == "jsonl":
        rows = [{"source": a, "target": b} for a, b in PAIRS]
        return PairSource(jsonl(folder / "pairs.jsonl", rows))
    if kind == "nested jsonl":
        rows = [{"translation": {"de": a, "en": b}} for a, b in PAIRS]
        path = jsonl(folder / "pairs.json", rows)
        return PairSource(path, source_field="translation.de", target_field="translation.en")
    if kind == "tsv":
        (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
        return PairSource(str(folder / "pairs.tsv"))
    if kind == "tsv columns":
        (folder / "pairs.tsv").write_text("".join(f"7\t{b}\t0\t{a}\r\n" for a, b in PAIRS))
        return PairSource(str(folder), source_field="3", target_field="1")
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        columns = dict(zip(("de", "en"), zip(*PAIRS, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), folder / "pairs.parquet")
        return PairSource(str(folder / "pairs.parquet"), source_field="de", target_field="en")
    (folder / "x.de").write_text(lines[0])
    (folder / "x.en.gz").write_bytes(gzip.compress(lines[1].encode()))
    return PairSource(str(folder / "x.de"), target_path=str(folder / "x.en.gz"))


KINDS = ("jsonl", "nested jsonl", "tsv", "tsv columns", "parquet", "parallel")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_pairs(kind, tmp_path):
    found, counts = read(write(kind, tmp_path))
    assert found == [(i, *pair) for i, pair in enumerate(PAIRS)]
    assert (counts.documents, counts.empty, counts.invalid) == (3, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_divide_the_pairs_among_them(kind, tmp_path):
    source = write(kind, tmp_path)
    shares = [read(source, shard, 2)[0] for shard in range(2)]
    assert [(one, other) for share in shares for _, one, other in share] == PAIRS
    assert all(shares)


UNPAIRED = {
    "jsonl": (lambda p: jsonl(p / "a.jsonl", [{"source": "x"}]), "a.jsonl:1 has no field 'target'"),
    "null": (
        lambda p: jsonl(p / "a.jsonl", [{"source": None, "target": "y"}]),
        "a.jsonl:1 has no source",
    ),
    "number": (
        lambda p: jsonl(p / "a.jsonl", [{"source": 3, "target": "y"}]),
        "a int in 'source', not text",
    ),
    "list": (lambda p: jsonl(p / "a.jsonl", [["x", "y"]]), "a JSON list, not one object"),
    "surrogate": (
        lambda p: jsonl(p / "a.jsonl", [{"source": "\ud800", "target": "y"}]),
        "The text of .* is not valid UTF-8",
    ),
}


@pytest.mark.parametrize("kind", UNPAIRED)
def test_unpaired_rows_are_named_by_line_or_left_out_and_counted(kind, tmp_path):
    make, message = UNPAIRED[kind]
    path = make(tmp_path)
    with open(path, "a") as file:
        file.write('{"source": "a", "target": "b"}\n')
    with pytest.raises(UserError, match=message):
        read(PairSource(path))
    found, counts = read(PairSource(path, on_invalid="skip"))
    assert found == [(1, "a", "b")]
    assert (counts.documents, counts.invalid) == (1, 1)


def test_a_line_without_a_second_column_is_unpaired(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\nc\nd\t \n\t\n")
    with pytest.raises(UserError, match="a.tsv:2 has 1 columns, but column 1"):
        read(PairSource(str(tmp_path)))
    found, counts = read(PairSource(str(tmp_path), on_invalid="skip"))
    assert found == [(0, "a", "b")]
    assert (counts.documents, counts.empty, counts.invalid) == (1, 0, 2)


def test_parallel_files_of_different_lengths_are_refused_or_the_rest_left_out(tmp_path):
    (tmp_path / "a").write_text("1\n\n3\n4\n5\n")
    (tmp_path / "b").write_text("one\n\nthree\n")
    source = PairSource(str(tmp_path / "a"), target_path=str(tmp_path / "b"))
    with pytest.raises(UserError, match="b ends before line 4, which .*a has"):
        read(source)
    skipping = PairSource(source.path, target_path=source.target_path, on_invalid="skip")
    found, counts = read(skipping)
    assert found == [(0, "1", "one"), (2, "3", "three")]
    assert (counts.documents, counts.empty, counts.invalid) == (2, 1, 2)


@pytest.mark.parametrize("damaged", ["a.gz", "b.gz"])
def test_the_one_of_two_files_that_is_damaged_is_named(damaged, tmp_path):
    names = {name: f"{name}.gz" if damaged == f"{name}.gz" else f"{name}.txt" for name in "ab"}
    lines = b"".join(b"%d\n" % number for number in range(100_000))
    for name in names.values():
        (tmp_path / name).write_bytes(gzip.compress(lines)[:-9] if "gz" in name else lines)
    paths = [str(tmp_path / name) for name in names.values()]
    with pytest.raises(UserError, match=f"gzip file .*{damaged} is cut short"):
        read(PairSource(paths[0], target_path=paths[1]))


def test_a_byte_order_mark_is_no_part_of_the_first_pair(tmp_path):
    (tmp_path / "a.tsv").write_text("\ufeffone\tun\ntwo\tdeux\n")
    assert read(PairSource(str(tmp_path)))[0] == [(0, "one", "un"), (1, "two", "deux")]


def test_bytes_that_are_no_text_follow_the_policy(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a\xff\tb\n")
    with pytest.raises(UserError, match="a.tsv:1 is not valid UTF-8"):
        read(PairSource(str(tmp_path)))
    found, counts = read(PairSource(str(tmp_path), on_invalid="replace"))
    assert found == [(0, "a\N{REPLACEMENT CHARACTER}", "b")]
    assert (counts.documents, counts.invalid) == (1, 1)


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parallel"])
def test_whitespace_around_texts_is_kept_on_demand(kind, tmp_path):
    if kind == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", [{"source": " one ", "target": "un "}])
        source = PairSource(path)
    elif kind == "tsv":
        (tmp_path / "a.tsv").write_text(" one \tun \r\n")
        source = PairSource(str(tmp_path / "a.tsv"))
    else:
        for name, text in (("a", " one \r\n"), ("b", "un \n")):
            (tmp_path / name).write_text(text)
        source = PairSource(str(tmp_path / "a"), target_path=str(tmp_path / "b"))
    assert read(source)[0] == [(0, "one", "un")]
    assert read(dataclasses.replace(source, strip=False))[0] == [(0, " one ", "un ")]


def test_settings_of_stores_of_earlier_versions_do_not_name_whether_texts_are_stripped():
    assert "strip" not in source_settings(PairSource("a.tsv"))
    assert source_settings(PairSource("a.tsv", strip=False))["strip"] is False


def test_nul_in_a_text_does_not_end_it(tmp_path):
    (tmp_path / "a.tsv").write_text("a\0b\tc\n")
    assert read(PairSource(str(tmp_path)))[0] == [(0, "a b", "c")]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="There is no file .*nowhere"):
        read(PairSource(__file__, target_path=str(tmp_path / "nowhere")))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="ending of .*a.txt is not supported; use one of .jsonl"):
        read(PairSource(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    "change", [{"source_field": "z"}, {"on_invalid": "skip"}, {"target_path": None}]
)
def test_the_fingerprint_follows_what_decides_the_pairs(change, tmp_path):
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("a\tb\n")
    settings = {"path": str(tmp_path / "a.tsv"), "target_path": str(tmp_path / "b.tsv")}
    one, other = PairSource(**settings), PairSource(**{**settings, **change})
    assert sources.fingerprint(one) == sources.fingerprint(PairSource(**settings))
    assert sources.fingerprint(one) != sources.fingerprint(other)
    (tmp_path / "b.tsv").write_text("a\tbb\n")
    assert sources.fingerprint(one) != sources.fingerprint(PairSource(str(tmp_path / "a.tsv")))


@pytest.fixture
def prepared(tmp_path):
    """300 pairs of bytes, some of them held out."""
    rows = [{"source": "s" * (i % 17 + 1) + str(i), "target": f"{i}" * 2} for i in range(300)]
    data = TextData(
        source=PairSource(jsonl(tmp_path / "pairs.jsonl", rows)),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.1,
        shards=3,
        store=str(tmp_path / "store"),
    )
    prepared = prepare(dataclasses.replace(data, prepare_processes=1))
    return prepared, {(row["source"], row["target"]) for row in rows}


def test_a_store_of_pairs_is_made_and_checked_like_any_other(prepared):
    text, rows = prepared
    assert text.train.num_documents + text.validation.num_documents == 300
    assert text.train.num_sentences == 2 * text.train.num_documents
    text.train.verify()
    spec = SequenceToSequence(pack=False).window_spec(64)
    found = set()
    for split in ("train", "validation"):
        examples = text.examples(split, spec)
        for i in range(len(examples)):
            row = examples.read(i, np.random.default_rng(0))
            sides = (text.tokenizer.decode(row[f"{side}_tokens"]) for side in ("source", "target"))
            found.add(tuple(sides))
            assert row["source_ends"].tolist() == [len(row["source_tokens"])]
    assert found == rows


def test_packed_rows_hold_every_pair_once_and_never_too_much(prepared):
    text, _ = prepared
    spec = PairSpec(40, True, target_length=30, overhead=2)
    examples = text.examples("train", spec)
    found = []
    for i in range(len(examples)):
        row = examples.read(i, np.random.default_rng(0))
        pairs = len(row["source_ends"])
        assert pairs == len(row["target_ends"])
        assert len(row["source_tokens"]) + 2 * pairs <= 40
        assert len(row["target_tokens"]) + 2 * pairs <= 30
        for side in ("source", "target"):
            assert row[f"{side}_tokens"].dtype == row[f"{side}_ends"].dtype == np.int32
            assert row[f"{side}_ends"][-1] == len(row[f"{side}_tokens"])
        starts = zip(
            np.split(row["source_tokens"], row["source_ends"][:-1]),
            np.split(row["target_tokens"], row["target_ends"][:-1]),
            strict=True,
        )
        found += [(text.tokenizer.decode(a), text.tokenizer.decode(b)) for a, b in starts]
    alone = text.examples("train", PairSpec(64, False, target_length=64))
    assert len(found) == len(set(found)) == len(alone) == text.train.num_documents
    assert len(examples) < len(alone) / 2


def test_long_pairs_are_cut_or_left_out(prepared):
    text, _ = prepared
    cut = text.examples("train", PairSpec(11, False, target_length=5))
    skip = text.examples("train", PairSpec(11, False, target_length=5, long_pairs="skip"))
    lengths = [len(cut.read(i, None)["source_tokens"]) for i in range(len(cut))]
    assert max(lengths) == 10 and cut.skipped == 0
    assert max(len(cut.read(i, None)["target_tokens"]) for i in range(len(cut))) == 4
    assert len(skip) + skip.skipped == len(cut) and 0 < len(skip) < len(cut)
    with pytest.raises(UserError, match="None of the .* pairs of .* fits into 2 and 2"):
        text.examples("train", PairSpec(2, True, target_length=2, long_pairs="skip"))
    with pytest.raises(UserError, match="Sequences of 1 and 9 tokens have no space"):
        text.examples("train", PairSpec(1, True, target_length=9))


def test_how_many_pairs_are_longer_than_a_sequence_is_logged(prepared, caplog):
    text, _ = prepared
    whole = text.examples("train", PairSpec(500, False, target_length=500))
    assert caplog.records == []
    skip = text.examples("train", PairSpec(11, False, target_length=5, long_pairs="skip"))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{skip.skipped} of {len(whole)} pairs of {text.directory} (train) are longer than "
        "11 and 5 tokens and are left out"
    )


def test_text_without_pairs_is_refused(make_store):
    with pytest.raises(UserError, match="texts and not pairs; set data.source"):
        PairExamples(make_store([[[1, 2], [3]], [[4]]]), PairSpec(8, True, target_length=8))


def test_twice_as_many_sentences_as_documents_are_not_yet_pairs(make_store):
    store = make_store([[[1], [2], [3]], [[4]]])
    with pytest.raises(UserError, match="texts and not pairs"):
        PairExamples(store, PairSpec(8, True, target_length=8))


def test_pairs_are_text_too(prepared):
    text, _ = prepared
    assert len(text.examples("train", WindowSpec(64, cross_documents=True))) > 1


def test_a_side_without_a_token_makes_no_pair(tmp_path):
    rows = [{"source": "sea dog " * 30, "target": "dog sea " * 30}] * 3
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"source": "\u200b", "target": "sea"}])
    data = TextData(
        source=PairSource(path), tokenizer=TokenizerConfig("unigram", 270), shards=1,
        validation_fraction=0.0, store=str(tmp_path / "store"),
    )  # fmt: skip
    text = prepare(dataclasses.replace(data, prepare_processes=1))
    assert (text.train.num_documents, text.train.num_sentences) == (3, 6)


def targets_by_split(folder, rows):
    """The pairs (source, target) of the training and of the held-out split."""
    data = TextData(
        source=PairSource(jsonl(folder / "pairs.jsonl", rows)),
        tokenizer=TokenizerConfig("bytes"), validation_fraction=0.3, shards=1,
        store=str(folder / "store"),
    )  # fmt: skip
    text = prepare(dataclasses.replace(data, prepare_processes=1))
    spec = PairSpec(64, False, target_length=64)
    found = []
    for split in SPLITS:
        examples = text.examples(split, spec)
        read = (examples.read(number, None) for number in range(len(examples)))
        sides = ((one["source_tokens"], one["target_tokens"]) for one in read)
        found.append([tuple(map(text.tokenizer.decode, both)) for both in sides])
    return found


def test_pairs_with_the_same_long_target_are_held_out_together(tmp_path):
    rows = [{"source": f"{i}", "target": f"{i % 20:021}"} for i in range(200)]
    pairs = targets_by_split(tmp_path, rows)
    train, held_out = ({target for _, target in of_split} for of_split in pairs)
    assert len(train) + len(held_out) == 20 and len(held_out) > 0
    assert len(pairs[1]) == 10 * len(held_out)


def test_of_short_targets_a_sample_of_each_is_held_out(tmp_path):
    """A class of a task as text to text would otherwise be in one of the splits alone."""
    classes = ("World", "Sports", "Business", "science and research")
    rows = [{"source": f"{i % 100}", "target": classes[i % 4]} for i in range(200)]
    train, held_out = map(set, targets_by_split(tmp_path, rows))
    assert {target for _, target in train} == {target for _, target in held_out} == set(classes)
    assert not train & held_out and len(train) + len(held_out) == 100


def test_settings_of_a_store_tell_pairs_from_text(prepared, tmp_path):
    data = TextData(
        source=TextSource(str(tmp_path / "pairs.jsonl"), text_field="source"),
        tokenizer=TokenizerConfig("bytes"), validation_fraction=0.1, shards=3,
        store=str(tmp_path / "store"),
    )  # fmt: skip
    with pytest.raises(UserError, match="was made with .*source.source_field='source'"):
        prepare(data)


def test_packing_is_first_fit_on_both_sides():
    lengths = np.random.default_rng(2).integers(1, 12, (100, 2))
    pairs, ends = pack(lengths, (20, 16))
    found = [set(row.tolist()) for row in np.split(pairs, ends[:-1])]
    assert len(found) < 64  # all rows stay open: the plain rule holds
    # Multiples of 2**64 over the golden ratio, in rising order.
    order = sorted(range(100), key=lambda pair: pair * 0x9E3779B97F4A7C15 % 2**64)
    rows: list[set[int]] = []
    for pair in order:
        for row in rows:
            if (lengths[[*row, pair]].sum(axis=0) <= (20, 16)).all():
                row.add(pair)
                break
        else:
            rows.append({pair})
    assert sorted(map(sorted, found)) == sorted(map(sorted, rows))


def test_packing_searches_the_last_64_rows_whatever_the_blocks(monkeypatch):
    lengths = np.random.default_rng(3).integers(1, 30, (2000, 2))
    pairs, ends = pack(lengths, (40, 50))
    order = sorted(range(2000), key=lambda pair: pair * 0x9E3779B97F4A7C15 % 2**64)
    rows, places = [], {}  # places: the open row in each
    for pair in order:
        fitting = (
            row
            for _, row in sorted(places.items())
            if (lengths[[*row, pair]].sum(axis=0) <= (40, 50)).all()
        )
        row = next(fitting, None)
        if row is None:
            row = places[len(rows) % 64] = []
            rows.append(row)
        row.append(pair)
    assert len(rows) > 2 * 64
    assert [row.tolist() for row in np.split(pairs, ends[:-1])] == [sorted(row) for row in rows]
    monkeypatch.setattr(pair_examples, "_PACKED_AT_ONCE", 7)
    again = pack(lengths, (40, 50))
    assert np.array_equal(again[0], pairs) and np.array_equal(again[1], ends)


def test_pairs_are_packed_once_for_a_store(prepared, monkeypatch):
    text, _ = prepared
    spec = PairSpec(41, True, target_length=30)

    def read(found):
        return [found.read(i, None)["target_tokens"].tolist() for i in range(len(found))]

    expected = read(text.examples("train", spec))
    (path,) = Path(text.directory, "packings").glob("41-30-1-*")
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):  # a damaged file is made again
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert read(text.examples("train", spec)) == expected
        assert path.read_bytes() == content
    monkeypatch.delattr(pair_examples, "pack")
    kept = text.examples("train", spec)
    sent = pickle.dumps(kept)
    assert read(kept) == read(pickle.loads(sent)) == expected
    assert content[:64] not in sent


def test_a_packing_that_was_deleted_is_made_again_by_a_worker(prepared):
    text, _ = prepared
    kept = text.examples("train", PairSpec(42, True, target_length=30))
    sent = pickle.dumps(kept)
    for path in Path(text.directory, "packings").glob("42-30-*"):
        path.unlink()
    assert len(pickle.loads(sent)) == len(kept)


def test_packing_fills_rows_well():
    rng = np.random.default_rng(1)
    lengths = np.clip(
        rng.gamma(2.0, 12.0, (20_000, 1)) * rng.uniform(0.8, 1.2, (20_000, 2)), 2, 128
    )
    lengths = lengths.astype(int)
    _, ends = pack(lengths, (128, 128))
    assert lengths.sum(axis=0).max() / (128 * len(ends)) > 0.9


def test_the_stream_of_packed_rows_is_the_same_for_any_hosts_and_after_a_resume(prepared):
    text, _ = prepared
    objective = SequenceToSequence(target_length=32)
    examples = text.examples("train", objective.window_spec(48))
    settings = {"sequence_length": 48, "batch_size": 4, "seed": 3}

    def stream(rows=None, position=0, examples=examples):
        return TrainStream(
            examples, objective, text.vocabulary, rows=rows, position=position, **settings
        )

    with stream() as whole, stream([0, 1]) as one, stream([2, 3]) as two:
        batches = [next(whole) for _ in range(10)]
        for batch in batches:
            parts = next(one), next(two)
            for name, array in batch.items():
                np.testing.assert_array_equal(array, np.concatenate([p[name] for p in parts]))
    copy = pickle.loads(pickle.dumps(examples))
    with stream(position=4 * 7, examples=copy) as later:
        for name, array in next(later).items():
            np.testing.assert_array_equal(array, batches[7][name])


def test_a_tfds_builder_of_translations_gives_pairs(tmp_path):
    import tensorflow_datasets as tfds

    class Sayings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.Translation(languages=("de", "en"))  # as in the wmt builders
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (de, en) in enumerate(PAIRS):
                yield i, {"de": de, "en": en}

    tfds.disable_progress_bar()
    Sayings(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    path = f"tfds:{tmp_path}/sayings/1.0.0"
    source = PairSource(path, source_field="de", target_field="en")
    found = [row for shard in range(2) for row in read(source, shard, 2)[0]]
    assert sorted(pair for _, *pair in found) == sorted(map(list, PAIRS))
    assert sources.fingerprint(source) != sources.fingerprint(PairSource(path))
