"""Which pairs of segments next-sentence prediction makes, and what it makes of the answers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data import dataset
from flax_transformers.data.config import TextData
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.testing import GivenLogits

VOCAB = Vocabulary(
    size=1000, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4)
)
LENGTH = 64
MAX_TOKENS = LENGTH - 3


def sentences(rng, length, longest=20):
    """Ends of random sentences that together take at most ``length`` tokens."""
    ends = np.cumsum(rng.integers(3, longest, 40))
    return ends[ends <= length].astype(np.int32)


def random_example(rng, last=0.5):
    """A window with ids from 100 and another with ids from 500, each counting up.

    With chance ``last`` it is the last of a document, and then of any length.
    """
    own, other = sentences(rng, MAX_TOKENS), sentences(rng, MAX_TOKENS)
    document_ends = own[:0]
    if rng.random() < last:
        own = own[: rng.integers(1, len(own) + 1)]
        document_ends = own[-1:]
    return {
        "tokens": np.arange(100, 100 + own[-1], dtype=np.int32),
        "document_ends": document_ends,
        "sentence_ends": own,
        "other_tokens": np.arange(500, 500 + other[-1], dtype=np.int32),
        "other_sentence_ends": other,
    }


def prepare(raw, rng, **settings):
    return NextSentence(**settings).prepare(raw, rng, VOCAB, LENGTH)


def parts(row):
    """A and B with labels put back, checked to be framed as BERT does; B is None without a pair."""
    ids = row["input_ids"].copy()
    real = row["masked_weights"] > 0
    ids[row["masked_positions"][real]] = row["masked_labels"][real]
    used = int(row["attention_mask"].sum())
    assert (row["attention_mask"] == (np.arange(LENGTH) < used)).all()
    assert ids[0] == VOCAB.cls_id and ids[used - 1] == VOCAB.sep_id
    assert (ids[used:] == VOCAB.pad_id).all() and not row["token_type_ids"][used:].any()
    separators = np.flatnonzero(ids[:used] == VOCAB.sep_id)
    assert len(separators) == 1 + int(row["next_sentence_weights"])
    first = int(separators[0])
    assert (row["token_type_ids"][:used] == (np.arange(used) > first)).all()
    return ids[1:first], ids[first + 1 : used - 1] if len(separators) == 2 else None


def many(count=600, seed=1, last=0.5, **settings):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        raw = random_example(rng, last)
        yield raw, prepare(raw, rng, **settings)


def test_examples_have_fixed_shapes_and_dtypes():
    shapes = {
        "input_ids": ((64,), "int32"),
        "attention_mask": ((64,), "int32"),
        "masked_positions": ((9,), "int32"),  # round(0.15 * 61)
        "masked_labels": ((9,), "int32"),
        "masked_weights": ((9,), "float32"),
        "token_type_ids": ((64,), "int32"),
        "next_sentence_labels": ((), "int32"),
        "next_sentence_weights": ((), "float32"),
    }
    for _, row in many(30):
        assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == shapes


@pytest.mark.parametrize("single", [False, True])
def test_a_true_pair_is_the_window_divided_at_a_sentence_end(single):
    cuts = set()
    for raw, row in many(single_sentences=single):
        if row["next_sentence_weights"] and not row["next_sentence_labels"]:
            a, b = parts(row)
            assert [*a, *b] == raw["tokens"].tolist()
            cuts.add(int(np.flatnonzero(raw["sentence_ends"] == len(a))[0]))
    assert cuts >= {0, 1, 2}


@pytest.mark.parametrize("single", [False, True])
def test_a_wrong_pair_is_whole_sentences_of_the_window_and_of_the_other(single):
    for raw, row in many(single_sentences=single):
        if row["next_sentence_weights"] and row["next_sentence_labels"]:
            a, b = parts(row)
            assert a.tolist() == raw["tokens"][: len(a)].tolist()
            assert len(a) in raw["sentence_ends"][:-1]
            starts = [0, *raw["other_sentence_ends"]]
            begin, end = b[0] - 500, b[-1] - 500 + 1
            assert begin in starts and end in starts[1:]
            assert b.tolist() == list(range(500 + begin, 500 + end))
            if single:
                assert starts.index(end) == starts.index(begin) + 1


def test_half_of_the_pairs_are_true():
    labels = [row["next_sentence_labels"] for _, row in many(2500) if row["next_sentence_weights"]]
    assert len(labels) > 1800
    assert abs(np.mean(labels) - 0.5) < 4 * np.sqrt(0.25 / len(labels))


def accuracy_of_a_threshold(values, labels):
    """The best that a rule "wrong if above (or below) so much" gets right."""
    order = np.argsort(values, kind="stable")
    values, labels = values[order], labels[order]
    border = np.append(values[1:] != values[:-1], True)  # equal values are on one side
    wrong = np.cumsum(labels)
    right = (np.arange(1, len(labels) + 1) - wrong + wrong[-1] - wrong)[border] / len(labels)
    return max(right.max(), 1 - right.min())


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_lengths_hardly_tell_true_pairs_from_wrong_ones(last):
    pairs = [
        (*map(len, parts(row)), int(row["next_sentence_labels"]))
        for _, row in many(2500, last=last)
        if row["next_sentence_weights"]
    ]
    a, b, label = np.array(pairs).T
    for values in (a, b, a + b):
        assert accuracy_of_a_threshold(values, label) < 0.56


def test_a_window_of_one_sentence_is_one_segment_with_weight_only_for_masks():
    rng = np.random.default_rng(2)
    for ends in ([], [40]):
        raw = random_example(rng) | {
            "tokens": np.arange(100, 140, dtype=np.int32),
            "sentence_ends": np.array(ends, np.int32),
        }
        for _ in range(20):
            row = prepare(raw, rng)
            a, b = parts(row)
            assert (a.tolist(), b) == (raw["tokens"].tolist(), None)
            assert row["next_sentence_weights"] == row["next_sentence_labels"] == 0
            assert row["masked_weights"].sum() == 6


def test_without_a_fitting_sentence_of_the_other_window_there_is_no_pair():
    rng = np.random.default_rng(3)
    raw = random_example(rng) | {
        "tokens": np.arange(100, 160, dtype=np.int32),
        "sentence_ends": np.array([50], np.int32),
        "other_tokens": np.arange(500, 561, dtype=np.int32),
        "other_sentence_ends": np.array([61], np.int32),
    }
    for _ in range(20):
        assert parts(prepare(raw, rng))[1] is None


def test_the_exact_share_of_the_ordinary_tokens_is_chosen_in_both_segments():
    in_b = 0
    for _, row in many():
        ordinary = int(row["attention_mask"].sum()) - 2 - int(row["next_sentence_weights"])
        count = int(row["masked_weights"].sum())
        assert count == max(1, round(0.15 * ordinary))
        assert not set(row["masked_labels"][:count].tolist()) & set(VOCAB.special_ids)
        in_b += row["token_type_ids"][row["masked_positions"][:count]].sum()
    assert in_b > 100


def test_robertas_pair_formats_are_settings():
    segments, single = NextSentence().window_spec(128), NextSentence(single_sentences=True)
    assert (segments.length, segments.cross_documents, segments.other) == (125, False, True)
    assert (segments.sentences, single.window_spec(128).sentences) == (None, 2)
    assert NextSentence(static_epochs=10).window_spec(128).static_epochs == 10


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
def test_pairs_from_a_store_tell_documents_apart(tmp_path, single):
    rng = np.random.default_rng(4)
    documents = [
        " ".join(
            " ".join([f"word{number:03d}"] * rng.integers(1, 4)).capitalize() + "."
            for _ in range(rng.integers(1, 20))
        )
        for number in range(80)
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(documents) + "\n")
    data = TextData(
        source=TextSource(str(tmp_path / "text.txt")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0,
        store=str(tmp_path / "store"),
        prepare_processes=1,
    )
    prepared = dataset.prepare(data)
    objective = NextSentence(single_sentences=single)
    examples = TextExamples(prepared.train, objective.window_spec(128))
    labels = []
    for number in [*range(len(examples))] * 8:
        row = objective.prepare(examples.read(number, rng), rng, prepared.vocabulary, 128)
        ids = row["input_ids"].copy()
        real = row["masked_weights"] > 0
        ids[row["masked_positions"][real]] = row["masked_labels"][real]
        a, b = (
            set(
                re.findall(
                    "ord([0-9]{3})", prepared.tokenizer.decode(ids[row["token_type_ids"] == k])
                )
            )
            for k in (0, 1)
        )
        assert len(a) == 1
        if row["next_sentence_weights"]:
            assert len(b) == 1 and (a != b) == bool(row["next_sentence_labels"])
            labels.append(row["next_sentence_labels"])
    assert len(labels) > 500
    assert abs(np.mean(labels) - 0.5) < 4 * np.sqrt(0.25 / len(labels))


@dataclasses.dataclass
class Spy:
    """A model that says "follows" by 2 nats, whatever it is asked, and all words are alike."""

    heads: list = dataclasses.field(default_factory=list)

    def functions(self):
        return ModelFunctions(self.hidden_states, self.unembedding, self.head)

    def hidden_states(self, params, batch, rngs):
        return HiddenStates(jnp.zeros((*batch["input_ids"].shape, 1)))

    def unembedding(self, params, hidden):
        return GivenLogits(jnp.zeros((*hidden.shape[:2], 10)))

    def head(self, name, params, rngs, hidden):
        self.heads.append((name, hidden.shape))
        return jnp.tile(jnp.array([[2.0, 0.0]]), (len(hidden), 1))


def terms_of(batch, spy, **settings):
    def terms(batch):
        found = NextSentence(**settings).terms(spy.functions(), {}, batch, {})
        return found.losses, found.metrics

    return jax.device_get(jax.jit(terms)(batch))


BATCH = {
    "input_ids": np.zeros((4, 8), np.int32),
    "masked_positions": np.zeros((4, 2), np.int32),
    "masked_labels": np.zeros((4, 2), np.int32),
    "masked_weights": np.array([[1, 1], [1, 0], [1, 1], [0, 0]], np.float32),
    "next_sentence_labels": np.array([0, 1, 0, 0], np.int32),
    "next_sentence_weights": np.array([1, 1, 0, 0], np.float32),  # the last row only fills up
}


def test_both_losses_have_weights_of_their_own():
    spy = Spy()
    losses, metrics = terms_of(BATCH, spy, next_sentence_weight=0.5)
    assert spy.heads == [("next_sentence", (4, 8, 1))]
    right, wrong = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))
    pairs = (pytest.approx(right + wrong, rel=1e-6), 2.0)
    words = (pytest.approx(5 * np.log(10), rel=1e-6), 5.0)
    assert losses == {"masked_lm": (*words, 1.0), "next_sentence": (*pairs, 0.5)}
    assert metrics == {
        "loss": words,
        "accuracy": (0.0, 5.0),
        "next_sentence_loss": pairs,
        "next_sentence_accuracy": (1.0, 2.0),
    }


def test_an_example_of_zeros_has_no_weight():
    rows = {name: values[:3] for name, values in BATCH.items()}
    assert terms_of(BATCH, Spy()) == terms_of(rows, Spy())


def test_the_example_view_has_both_segments_and_whether_b_follows():
    notes = {}
    for _, row in many(60):
        (shown,) = NextSentence().example_views(row)
        notes[shown.note] = (row["next_sentence_labels"][()], set(shown.segments.tolist()))
    assert notes["B follows A"] == (0, {0, 1})
    assert notes["B is from elsewhere"] == (1, {0, 1})


def test_a_tokenizer_without_the_tokens_it_takes_is_refused():
    vocab = dataclasses.replace(VOCAB, sep_id=None)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"no \[CLS\] and \[SEP\]"):
        NextSentence().prepare(random_example(rng), rng, vocab, LENGTH)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="objective.next_sentence_weight is -1"):
        NextSentence(next_sentence_weight=-1)
