"""Pairs with a tokenizer for each side: their stores, and errors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare, prepare_common, prepare_share
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence

NUMBERS = (
    ("Eins", "one"), ("Zwei", "two"), ("Drei", "three"), ("Vier", "four"), ("Sechs", "six"),
    ("Sieben", "seven"), ("Acht", "eight"), ("Neun", "nine"), ("Zehn", "ten"),
)  # fmt: skip
PAIRS = [
    (f"{a} Hunde und {c} mal", f"Good dog and {b} {d}") for a, b in NUMBERS for c, d in NUMBERS
]
UNIGRAM = TokenizerConfig("unigram", vocab_size=289)
BYTES = TokenizerConfig("bytes")


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    return PairSource(str(file))


def data_of(source, tokenizer=UNIGRAM, target=BYTES, **changes):
    return TextData(
        source=source,
        tokenizer=tokenizer,
        target_tokenizer=target,
        validation_fraction=0.2,
        shards=2,
        prepare_processes=1,
        **changes,
    )


def pairs_in(prepared):
    """The pairs of both splits, one a row, each side decoded by its own tokenizer."""
    spec = SequenceToSequence(pack=False).window_spec(64)
    decode = prepared.tokenizer.decode, prepared.target_tokenizer.decode
    for split in ("train", "validation"):
        examples = prepared.examples(split, spec)
        for number in range(len(examples)):
            row = examples.read(number, np.random.default_rng(0))
            yield decode[0](row["source_tokens"]), decode[1](row["target_tokens"])


def letters_of(tokenizer):
    """What its pieces are written with, but for those that stand for a byte or for nothing."""
    pieces = tokenizer.pieces(range(tokenizer.vocabulary.size))
    return {letter for piece in pieces if piece[0] not in "<[" for letter in piece}


def test_each_side_goes_through_its_own_tokenizer_and_is_decoded(pairs, tmp_path):
    prepared = prepare(data_of(pairs), tmp_path / "store")
    assert sorted(pairs_in(prepared)) == sorted(PAIRS)
    assert (prepared.tokenizer.kind, prepared.target_tokenizer.kind) == ("unigram", "bytes")
    letters = letters_of(prepared.tokenizer)
    assert "H" in letters and "G" not in letters  # it has seen sources alone
    vocabulary = prepared.vocabulary
    assert (vocabulary.size, vocabulary.target.size, prepared.train.vocab_size) == (289, 262, 289)
    assert vocabulary.of_targets == prepared.target_tokenizer.vocabulary
    assert "unigram with a vocabulary of 289, bytes of 262 for targets" in prepared.summary


def test_a_tokenizer_of_targets_is_trained_on_these_and_the_store_fits_its_ids(pairs, tmp_path):
    swapped = prepare(data_of(pairs, BYTES, UNIGRAM), tmp_path / "store")
    assert sorted(pairs_in(swapped)) == sorted(PAIRS)
    letters = letters_of(swapped.target_tokenizer)
    assert "G" in letters and "H" not in letters
    vocabulary = swapped.vocabulary
    assert (vocabulary.size, vocabulary.target.size, swapped.train.vocab_size) == (262, 289, 289)


def test_no_vocabulary_is_reduced_while_the_text_of_either_side_may_need_it(pairs, tmp_path):
    def sizes(*rows):
        vocabulary = prepared.fitted(rows[0], -1, rows[1]).vocabulary
        return vocabulary.size, vocabulary.target.size

    prepared = prepare(data_of(pairs), tmp_path / "store")
    assert sizes(100, 262) == sizes(289, 100) == sizes(300, 300) == (289, 262)
    prepared = prepare(data_of(pairs, BYTES, BYTES), tmp_path / "bytes")
    used = 1 + int(np.flatnonzero(prepared.train.unigram_counts)[-1])
    assert used < 262 and sizes(used, used) == (used, used)  # neither side has a larger id
    assert sizes(used, used - 1) == (used, 262)


def test_jobs_wait_for_both_tokenizers_and_make_the_store_of_one_process(pairs, tmp_path):
    data = data_of(pairs, BYTES, UNIGRAM)
    with pytest.raises(UserError, match="not started"):
        prepare_share(data, tmp_path / "jobs", 0, 2)
    prepare_common(data, tmp_path / "jobs")
    assert prepare_share(data, tmp_path / "jobs", 0, 2) is None
    prepared = prepare_share(data, tmp_path / "jobs", 1, 2)
    assert prepared is not None
    assert prepared.fingerprint == prepare(data, tmp_path / "store").fingerprint


def test_a_store_is_not_taken_for_one_with_other_tokenizers(pairs, tmp_path):
    store = tmp_path / "store"
    prepared = prepare(data_of(pairs), store)
    for target in (None, TokenizerConfig("unigram", vocab_size=288)):
        with pytest.raises(UserError, match=r"made with target_tokenizer\..*choose another store"):
            prepare(data_of(pairs, target=target), store)
    other = prepare(data_of(pairs, BYTES, UNIGRAM), tmp_path / "other").target_tokenizer
    at = TokenizerConfig("unigram", path=str(tmp_path / "given"))
    other.save(tmp_path / "given")
    prepare(data_of(pairs, target=at), tmp_path / "loaded")
    prepared.tokenizer.save(tmp_path / "given")  # another one at the same path
    with pytest.raises(UserError, match=f"{other.fingerprint[:12]}, but .*given has"):
        prepare(data_of(pairs, target=at), tmp_path / "loaded")


def test_data_without_targets_takes_no_target_tokenizer(pairs, tmp_path):
    with pytest.raises(UserError, match="target_tokenizer is for pairs"):
        data_of(TextSource("text.txt"))
    with pytest.raises(UserError, match="target_tokenizer is for pairs"):
        data_of(pairs, validation_source=TextSource("text.txt"))
    prepared = prepare(data_of(pairs), tmp_path / "store")
    with pytest.raises(UserError, match="only the objective SequenceToSequence"):
        prepared.examples("train", MaskedLM().window_spec(32))


def test_a_store_with_one_tokenizer_is_byte_for_byte_what_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pairs.tsv"
    numbers = (n for n in range(20) if n != 15)  # which was held out
    file.write_text("".join(f"ein Hund {n}\ta dog {n}\n" for n in numbers))
    data = data_of(PairSource("pairs.tsv"), BYTES, None)
    prepare(replace(data, shards=1, validation_fraction=0.0), "store")
    tokens = hashlib.sha256((tmp_path / "store/train/00000.tokens").read_bytes()).hexdigest()
    assert tokens.startswith("55df3bc398adb445")  # as before there could be two
    assert "target" not in json.loads((tmp_path / "store" / "corpus.json").read_text())["settings"]
    assert not (tmp_path / "store" / "target_tokenizer").exists()
