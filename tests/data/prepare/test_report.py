"""What preparation left out or changed is counted, printed, and kept in the store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare
from flax_transformers.data.prepare.report import REPORT, TextFindings, added_up, report_lines
from flax_transformers.data.sources import records
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import not_read, read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.storage.folders import open_folder

LATIN = "the quick brown fox jumps over a lazy dog, and then it sat down there. "


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """The path of a WordPiece tokenizer that knows the letters of English alone."""
    folder = tmp_path_factory.mktemp("latin")
    config = TokenizerConfig(kind="wordpiece", vocab_size=700, lowercase=True)
    texts = [LATIN * 20, *(f"{a}{b}" for a in LATIN for b in LATIN if f"{a}{b}".isalpha())]
    train_tokenizer(config, texts).save(folder)
    return str(folder)


def data_of(folder: Path, texts: list[str], tokenizer: TokenizerConfig, **settings) -> TextData:
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "a.txt").write_text("\n\n".join(texts))
    return TextData(
        source=TextSource(str(folder / "corpus")),
        tokenizer=tokenizer,
        store=str(folder / "store"),
        validation_fraction=0.0,
        **{"shards": 2} | settings,
    )


def said(data: TextData) -> list[str]:
    assert data.store is not None
    return report_lines(open_folder(data.store))


def test_a_corpus_that_is_read_completely_has_no_report(latin, tmp_path, capsys):
    data = data_of(tmp_path, [LATIN] * 9, TokenizerConfig(path=latin))
    prepare(data)
    assert said(data) == []
    assert "Report" not in capsys.readouterr().err


def test_unknown_tokens_above_a_percent_are_a_warning_that_names_the_characters(
    latin, tmp_path, capsys
):
    texts = [f"the fox 中 sat {'☃ ☃' if n < 3 else ''} down" for n in range(10)]
    data = data_of(tmp_path, texts, TokenizerConfig(path=latin))
    prepared = prepare(data)
    unknown = prepared.vocabulary.unk_id
    assert prepared.train.unigram_counts[unknown] == 16
    line = (
        f"WARNING: Unknown tokens: 16 of {prepared.train.num_tokens} "
        f"({16 / prepared.train.num_tokens:.2%}); characters that the tokenizer lacks: "
        "'中' U+4E2D 10 times, '☃' U+2603 6 times; use a tokenizer that was trained on such text"
    )
    assert said(data) == [line]
    err = capsys.readouterr().err
    assert err.endswith(f"Report of the store in {data.store}:\n  {line}\n")
    prepare(data)  # said again when it is opened
    assert capsys.readouterr().err == f"Report of the store in {data.store}:\n  {line}\n"
    open_dataset(data)  # by one of several processes
    assert capsys.readouterr().err == ""


def test_few_unknown_tokens_are_reported_without_a_warning(latin, tmp_path):
    data = data_of(tmp_path, [LATIN] * 50 + ["a ☃"], TokenizerConfig(path=latin))
    tokens = prepare(data).train.num_tokens
    assert said(data) == [
        f"Unknown tokens: 1 of {tokens:,} ({1 / tokens:.2%}); characters that the tokenizer lacks: "
        "'☃' U+2603 1 times"
    ]


def test_characters_that_normalization_drops_or_changes_are_counted(latin, tmp_path):
    text = "the fo\u200bx \x01 sat d\u00f6wn\u200b, th\u00e9re th\u00e9re. THE FOX"
    data = data_of(tmp_path, [text] * 3, TokenizerConfig(path=latin))
    prepare(data)
    characters = 3 * len(text)
    assert said(data) == [
        f"Characters dropped by the tokenizer: 9 of {characters}, most often U+200B 6 times, "
        "U+0001 3 times",
        f"Characters changed by the tokenizer: 9 of {characters}, most often "
        "'é' U+00E9 to 'e' 6 times, 'ö' U+00F6 to 'o' 3 times",
    ]


def test_what_sentencepiece_normalises_is_counted():
    tokenizer = train_tokenizer(TokenizerConfig(kind="unigram", vocab_size=293), [LATIN] * 20)
    findings = TextFindings(tokenizer)
    text = "the \ufb01sh sat\u00ad \u2460"
    findings.add([text], tokenizer.encode_batch([text]))
    record = findings.record()
    assert record["unknown"] == 0  # unknown characters are bytes
    assert record["changed"] == {"\ufb01 fi": 1, "\u2460 1": 1}
    assert (record["changed_total"], record["dropped_total"]) == (2, 0)


def test_bytes_lose_nothing(tmp_path):
    data = data_of(tmp_path, ["é中☃\u200b\x01 ﬁ A"] * 5, TokenizerConfig(kind="bytes"))
    prepare(data)
    assert said(data) == []


def test_counts_add_up_to_the_same_for_any_number_of_shards(latin, tmp_path):
    found = []
    for shards in (1, 4):
        folder = tmp_path / str(shards)
        folder.mkdir()
        data = data_of(
            folder, ["the fox 中 é ☃ down"] * 40, TokenizerConfig(path=latin), shards=shards
        )
        prepare(data)
        found.append((folder / "store" / REPORT).read_bytes())
    assert found[0] == found[1]


def test_the_sides_of_pairs_are_counted_by_their_own_tokenizers(latin, tmp_path):
    (tmp_path / "a.tsv").write_text("the fox 中\tdog ☃ ☃\n" * 5)
    data = TextData(
        source=PairSource(str(tmp_path / "a.tsv")),
        tokenizer=TokenizerConfig(path=latin),
        target_tokenizer=TokenizerConfig(kind="bytes"),
        store=str(tmp_path / "store"),
        validation_fraction=0.0,
        shards=1,
    )
    prepare(data)
    (line,) = said(data)
    assert line.startswith("WARNING: Unknown tokens: 5 of 15 (33.33%); ")
    assert "'中' U+4E2D 5 times;" in line


def test_unread_files_are_reported_with_a_warning_if_they_are_most(latin, tmp_path):
    data = data_of(tmp_path, [LATIN] * 9, TokenizerConfig(path=latin))
    for name in ("b.doc", "c.doc", "d.tar"):
        (tmp_path / "corpus" / name).write_text("x" * 100)
    os.symlink(".", tmp_path / "corpus" / "loop")
    prepare(data)
    assert said(data) == ["Not read: 2 .doc, 1 .tar, 1 repeated linked folder"]
    size = (tmp_path / "corpus" / "a.txt").stat().st_size
    assert not_read(data.source) == (
        size,
        {".doc": (2, 200), ".tar": (1, 100), "repeated linked folder": (1, 0)},
    )
    (tmp_path / "corpus" / "d.tar").write_text("x" * (3 * size))
    other = TextData(**{**vars(data), "store": str(tmp_path / "other")})
    prepare(other)
    share = (3 * size + 200) / (4 * size + 200)
    assert said(other) == [
        "WARNING: Not read: 2 .doc, 1 .tar, 1 repeated linked folder; these are "
        f"{share:.0%} of the bytes of the corpus"
    ]


def test_texts_that_are_cut_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 30)
    (tmp_path / "a.txt").write_text("short\n\n" + "one line of it\n" * 6 + "\nshort")
    counts = Counts()
    found = [d.text for _, d in read_documents(TextSource(str(tmp_path)), counts=counts)]
    assert len(found) == 5  # the six lines are three documents of two
    assert counts == Counts(documents=5, cut=2)
    assert "cut" not in counts.left_out()


def test_many_invalid_documents_are_a_warning(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n' * 8 + "{}\n" * 2)
    data = TextData(
        source=TextSource(str(tmp_path / "a.jsonl"), on_invalid="skip"),
        tokenizer=TokenizerConfig(kind="bytes"),
        store=str(tmp_path / "store"),
        validation_fraction=0.0,
        shards=1,
    )
    prepare(data)
    (line,) = said(data)
    assert line.startswith("WARNING: 2 documents were invalid, and 8 are in the store")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": 1}', b'{"format": 9}'])
def test_a_report_that_is_absent_or_damaged_stops_nothing(content, tmp_path, capsys):
    data = data_of(tmp_path, ["the fox"] * 3, TokenizerConfig(kind="bytes"))
    prepare(data)
    report = tmp_path / "store" / REPORT
    assert json.loads(report.read_bytes())["documents"] == 3
    report.unlink() if content is None else report.write_bytes(content)
    capsys.readouterr()
    prepare(data)
    assert capsys.readouterr().err == ""


def test_records_add_up():
    assert added_up([{"a": 1, "b": {"x": 2}}, {"b": {"x": 3, "y": 4}}, {}]) == {
        "a": 1,
        "b": {"x": 5, "y": 4},
    }
