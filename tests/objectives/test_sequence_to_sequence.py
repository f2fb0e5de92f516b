"""Rows of packed pairs: what the encoder reads, what the decoder reads and has to say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from tests.objectives.corruption import example, terms_of, without

PAD, EOS, BOS = 0, 1, 4
VOCAB = Vocabulary(size=60, pad_id=PAD, eos_id=EOS, bos_id=BOS, special_ids=(PAD, EOS, BOS))


def pairs(*texts):
    sides = list(zip(*texts, strict=True))
    row = {}
    for name, side in zip(("source", "target"), sides, strict=True):
        row[f"{name}_tokens"] = np.concatenate([np.array(t, np.int32) for t in side])
        row[f"{name}_ends"] = np.cumsum([len(t) for t in side], dtype=np.int32)
    return row


TWO = pairs(([10, 11, 12], [20, 21]), ([13], [22, 23, 24]))


def prepare(raw=TWO, length=9, vocab=VOCAB, **settings):
    return SequenceToSequence(**settings).prepare(raw, np.random.default_rng(0), vocab, length)


def test_pairs_stand_one_after_the_other_in_segments_of_their_own():
    row = {name: array.tolist() for name, array in prepare().items()}
    assert row == {
        "input_ids": [10, 11, 12, 1, 13, 1, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 0, 0, 0],
        "decoder_input_ids": [0, 20, 21, 0, 22, 23, 24, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 2, 2, 0, 0],
        "labels": [20, 21, 1, 22, 23, 24, 1, 0, 0],
        "weights": [1, 1, 1, 1, 1, 1, 1, 0, 0],
    }


def test_barts_pairs_have_a_beginning_and_the_decoder_starts_with_the_end():
    row = prepare(length=11, begin=True, start="end")
    assert row["input_ids"].tolist() == [4, 10, 11, 12, 1, 4, 13, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert row["labels"].tolist() == [4, 20, 21, 1, 4, 22, 23, 24, 1, 0, 0]
    assert row["decoder_input_ids"].tolist() == [1, 4, 20, 21, 1, 4, 22, 23, 24, 0, 0]


def test_the_decoder_can_start_with_any_id():
    row = prepare(decoder_start_id=7)
    assert row["decoder_input_ids"].tolist() == [7, 20, 21, 7, 22, 23, 24, 0, 0]


def test_targets_have_the_special_ids_of_their_own_vocabulary():
    target = Vocabulary(size=30, pad_id=0, eos_id=8, bos_id=9)
    vocab = dataclasses.replace(VOCAB, target=target)
    row = prepare(length=11, vocab=vocab, begin=True, start="end")
    assert row["input_ids"].tolist() == [4, 10, 11, 12, 1, 4, 13, 1, 0, 0, 0]
    assert row["labels"].tolist() == [9, 20, 21, 8, 9, 22, 23, 24, 8, 0, 0]
    assert row["decoder_input_ids"].tolist() == [8, 9, 20, 21, 8, 9, 22, 23, 24, 0, 0]


def test_examples_have_fixed_shapes_and_dtypes():
    for raw in (TWO, pairs(([10], [20])), pairs(([10] * 8, [20] * 6))):
        row = prepare(raw, target_length=7)
        assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
            "input_ids": ((9,), "int32"),
            "segment_ids": ((9,), "int32"),
            "decoder_input_ids": ((7,), "int32"),
            "decoder_segment_ids": ((7,), "int32"),
            "labels": ((7,), "int32"),
            "weights": ((7,), "float32"),
        }


def test_a_full_sequence_has_no_padding():
    row = prepare(pairs(([10] * 4, [20] * 3), ([11] * 3, [21] * 2)), target_length=7)
    assert row["segment_ids"].all() and row["weights"].all()


def test_windows_are_shorter_by_the_special_tokens():
    spec = SequenceToSequence().window_spec(128)
    assert (spec.length, spec.target_length, spec.overhead) == (128, 128, 1)
    assert spec.cross_documents
    objective = SequenceToSequence(target_length=64, begin=True, pack=False, long_pairs="skip")
    spec = objective.window_spec(128)
    assert (spec.length, spec.target_length, spec.overhead) == (128, 64, 2)
    assert (spec.cross_documents, spec.long_pairs) == (False, "skip")
    assert objective.predictions(128) == 64


def test_packed_pairs_are_recovered_from_the_example():
    rng = np.random.default_rng(1)
    for _ in range(200):
        count = int(rng.integers(1, 5))
        texts = [
            (rng.integers(5, 60, rng.integers(1, 9)).tolist(),
             rng.integers(5, 60, rng.integers(1, 9)).tolist())
            for _ in range(count)
        ]  # fmt: skip
        begin = bool(rng.integers(2))
        row = prepare(pairs(*texts), 48, begin=begin)
        for number, text in enumerate(texts, 1):
            head = [BOS] if begin else []
            there, where = row["input_ids"], row["segment_ids"] == number
            assert there[where].tolist() == [*head, *text[0], EOS]
            where = row["decoder_segment_ids"] == number
            labels = row["labels"][where].tolist()
            assert labels == [*head, *text[1], EOS]
            assert row["decoder_input_ids"][where].tolist() == [PAD, *labels[:-1]]


def test_text_without_pairs_is_refused():
    with pytest.raises(UserError, match="needs pairs of texts; set data.source to a PairSource"):
        prepare(example([3, 4, 5]))


def test_a_tokenizer_without_a_beginning_is_refused_where_one_is_asked_for():
    vocab = without(VOCAB, "bos_id")
    prepare(vocab=vocab)
    with pytest.raises(UserError, match="no token that begins a sequence"):
        prepare(vocab=vocab, begin=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"start": "bos"}, "start is 'bos'; it must be 'pad' or 'end'"),
        ({"long_pairs": "drop"}, "long_pairs is 'drop'"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        SequenceToSequence(**settings)


def test_the_trained_loss_is_smoothed_and_the_logged_one_is_not():
    batch = {
        "input_ids": np.zeros((2, 4), np.int32),
        "decoder_input_ids": np.array([[0, 5, 6], [0, 0, 0]], np.int32),
        "labels": np.array([[5, 5, 0], [0, 0, 0]], np.int32),
        "weights": np.array([[1, 1, 0], [0, 0, 0]], np.float32),
    }
    losses, metrics = terms_of(SequenceToSequence(), batch)
    log_z = np.log(np.exp(4.0) + 11)
    plain, uniform = 2 * log_z - 4.0, 2 * (log_z - 4.0 / 12)
    assert metrics == {"loss": (pytest.approx(plain, rel=1e-6), 2.0), "accuracy": (1.0, 2.0)}
    trained = pytest.approx(0.9 * plain + 0.1 * uniform, rel=1e-6)
    assert losses == {"sequence_to_sequence": (trained, 2.0, 1.0)}


def test_people_see_both_sides_and_their_pairs():
    encoder, decoder = SequenceToSequence().example_views(prepare())
    assert encoder.ids.tolist() == [10, 11, 12, 1, 13, 1]
    assert encoder.segments.tolist() == [1, 1, 1, 1, 2, 2]
    assert decoder.ids.tolist() == [0, 20, 21, 1, 0, 22, 23, 24, 1]
    assert decoder.labels.tolist() == [-1, 20, 21, 1, -1, 22, 23, 24, 1]
    assert decoder.segments.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_settings_survive_a_change_of_one():
    assert dataclasses.replace(SequenceToSequence(), pack=False).label_smoothing == 0.1
