"""How a text is damaged for the encoder, and that the decoder is asked for all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.denoising import Denoising, poisson_span_lengths
from tests.objectives.corruption import assert_shifted, example, labels_of, terms_of, used, without

# As in the published BART: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.
BOS, PAD, EOS, MASK = 0, 1, 2, 999
VOCAB = Vocabulary(
    size=1000, pad_id=PAD, unk_id=3, bos_id=BOS, cls_id=BOS, eos_id=EOS, sep_id=EOS, mask_id=MASK,
    special_ids=(0, 1, 2, 3, MASK),
)  # fmt: skip
LENGTH = 64
NOTHING = {"infill_share": 0.0, "permute_sentences": False}


def prepare(tokens, rng=0, sentence_ends=(), length=LENGTH, vocab=VOCAB, **settings):
    rng = np.random.default_rng(rng) if isinstance(rng, int) else rng
    raw = example(tokens, [len(tokens)], sentence_ends)
    return Denoising(**settings).prepare(raw, rng, vocab, length)


def body(row):
    """What stands between the beginning and the end."""
    ids = used(row, "input_ids")
    assert ids[0] == BOS and ids[-1] == EOS
    return ids[1:-1]


def test_the_target_is_the_source_for_any_noise():
    rng = np.random.default_rng(1)
    for _ in range(500):
        count = int(rng.integers(1, 63))
        source = rng.integers(4, 999, count)
        before = source.copy()
        ends = np.unique(np.append(rng.integers(1, count + 1, 3), count))
        settings = {
            "infill_share": rng.choice([0.0, 0.3, 0.9]), "mask_share": rng.choice([0.0, 0.2]),
            "delete_share": rng.choice([0.0, 0.5]), "rotate": bool(rng.integers(2)),
        }  # fmt: skip
        row = prepare(source, rng, ends, **settings)
        assert labels_of(row) == [BOS, *before, EOS]
        assert_shifted(row, EOS)
        assert set(body(row)) <= {*before.tolist(), MASK}


def test_examples_have_fixed_shapes_and_dtypes():
    for count in (1, 2, 5, 62):
        row = prepare(range(10, 10 + count), count, mask_share=0.3)
        assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
            "input_ids": ((64,), "int32"),
            "attention_mask": ((64,), "int32"),
            "decoder_input_ids": ((64,), "int32"),
            "decoder_attention_mask": ((64,), "int32"),
            "labels": ((64,), "int32"),
            "weights": ((64,), "float32"),
        }


def test_windows_are_of_one_document_and_shorter_by_both_ends():
    spec = Denoising().window_spec(LENGTH)
    assert (spec.length, spec.cross_documents) == (62, False)
    assert Denoising().predictions(LENGTH) == LENGTH


def test_the_defaults_are_those_of_the_large_model():
    objective = Denoising()
    assert (objective.infill_share, objective.mean_span) == (0.3, 3.0)
    assert objective.permute_sentences
    assert (objective.mask_share, objective.delete_share, objective.rotate) == (0.0, 0.0, False)


def test_infilling_takes_out_exactly_its_share_of_the_tokens_and_keeps_the_order_of_the_rest():
    rng = np.random.default_rng(2)
    for count in (10, 33, 62):
        for _ in range(200):
            kept = [i for i in body(prepare(range(10, 10 + count), rng)) if i != MASK]
            assert len(kept) == count - round(0.3 * count)
            assert kept == sorted(kept)


def test_the_first_span_of_a_long_text_is_poisson():
    rng, draws = np.random.default_rng(3), 20_000
    found = np.bincount([poisson_span_lengths(60, 3.0, rng)[0] for _ in range(draws)], minlength=10)
    probability = [math.exp(-3.0) * 3.0**k / math.factorial(k) for k in range(9)]
    expected = draws * np.array([*probability, 1.0 - sum(probability)])
    observed = np.array([*found[:9], found[9:].sum()])
    chi_square = np.sum((observed - expected) ** 2 / expected)
    assert chi_square < 27.9  # 0.999 of 9 degrees of freedom


def test_lengths_of_spans_add_up_to_the_replaced_tokens():
    rng = np.random.default_rng(4)
    for total in (0, 1, 2, 30, 300):
        for mean in (0.1, 3.0, 50.0):
            lengths = poisson_span_lengths(total, mean, rng)
            assert lengths.sum() == total
            assert (lengths >= 0).all()
            assert total == 0 or lengths[-1] > 0


def test_the_number_of_masks_follows_from_the_mean_length():
    rng, draws = np.random.default_rng(5), 400
    masks = [body(prepare(range(4, 504), rng, length=512)).count(MASK) for _ in range(draws)]
    # 150 tokens in spans of mean 3: 50 and a little more, as the last one is cut.
    assert abs(np.mean(masks) - 50.5) < 1.0
    # Var of a renewal count: total * variance / mean ** 3.
    assert abs(np.std(masks) - math.sqrt(150 * 3 / 27)) < 0.6


def test_one_span_in_twenty_has_no_token_and_inserts_a_mask():
    rng, spans, empty = np.random.default_rng(6), 0, 0
    for _ in range(300):
        lengths = poisson_span_lengths(150, 3.0, rng)
        spans += len(lengths)
        empty += np.count_nonzero(lengths == 0)
    share = math.exp(-3.0)
    assert abs(empty - spans * share) < 4 * math.sqrt(spans * share * (1 - share))


def test_a_span_without_a_token_leaves_the_text_whole():
    rng, inserted = np.random.default_rng(7), 0
    for _ in range(300):
        row = body(prepare(range(10, 20), rng, infill_share=0.2))
        assert len(row) <= 10
        between = zip(row, row[1:], row[2:], strict=False)
        inserted += any(b == MASK and c == a + 1 for a, b, c in between)
    assert inserted > 5


def test_each_span_is_replaced_by_one_mask():
    rng = np.random.default_rng(8)
    for _ in range(300):
        row = body(prepare(range(10, 50), rng, infill_share=0.1, mean_span=20.0))
        if row.count(MASK) == 1:
            place = row.index(MASK)
            assert row == [*range(10, 10 + place), MASK, *range(14 + place, 50)]


@pytest.mark.slow
def test_tokens_away_from_the_ends_are_taken_out_equally_often():
    rng, draws, length = np.random.default_rng(9), 6000, 62
    missing = np.zeros(length)
    for _ in range(draws):
        kept = set(body(prepare(range(10, 10 + length), rng)))
        missing += [i not in kept for i in range(10, 10 + length)]
    share = missing / draws
    assert np.all(np.abs(share[12:-12] - share[12:-12].mean()) < 4 * math.sqrt(0.21 / draws))
    # A span that would begin before the text or end behind it is not there to be drawn.
    assert share[0] < share[12] and share[-1] < share[-12]


def test_sentences_come_in_every_order_equally_often():
    rng, draws, found = np.random.default_rng(10), 6000, {}
    source, ends = [10, 11, 12, 20, 30, 31], [3, 4, 6]
    for _ in range(draws):
        order = tuple(body(prepare(source, rng, ends, infill_share=0.0)))
        found[order] = found.get(order, 0) + 1
    a, b, c = (10, 11, 12), (20,), (30, 31)
    assert set(found) == {
        a + b + c, a + c + b, b + a + c, b + c + a, c + a + b, c + b + a
    }  # fmt: skip
    chi_square = sum((n - draws / 6) ** 2 / (draws / 6) for n in found.values())
    assert chi_square < 20.5  # 0.999 of 5 degrees of freedom


def test_a_part_of_a_sentence_at_the_end_of_a_window_counts_as_one():
    rows = {tuple(body(prepare([10, 11, 20, 21], r, [2], infill_share=0.0))) for r in range(20)}
    assert rows == {(10, 11, 20, 21), (20, 21, 10, 11)}


def test_masking_replaces_exactly_its_share_in_place():
    rng, found = np.random.default_rng(11), np.zeros(40)
    for _ in range(2000):
        row = np.array(body(prepare(range(10, 50), rng, **NOTHING, mask_share=0.15)))
        masked = row == MASK
        assert masked.sum() == 6
        assert (row == np.arange(10, 50))[~masked].all()
        found += masked
    expected = 2000 * 0.15
    chi_square = np.sum((found - expected) ** 2) / (expected * 0.85)
    assert chi_square < 73.4  # 0.999 of 40 degrees of freedom


def test_deletion_leaves_out_exactly_its_share_and_keeps_the_order():
    row = body(prepare(range(10, 50), **NOTHING, delete_share=0.25))
    assert len(row) == 30
    assert row == sorted(row) and set(row) < set(range(10, 50))


def test_rotation_begins_at_every_token_equally_often():
    rng, found = np.random.default_rng(12), np.zeros(10)
    for _ in range(3000):
        row = body(prepare(range(10, 20), rng, **NOTHING, rotate=True))
        first = row[0] - 10
        assert row == [*range(10 + first, 20), *range(10, 10 + first)]
        found[first] += 1
    assert np.sum((found - 300) ** 2 / 300) < 27.9  # 0.999 of 9 degrees of freedom


def test_packed_documents_are_corrupted_separately():
    rng, objective = np.random.default_rng(13), Denoising(cross_documents=True)
    assert objective.window_spec(LENGTH).cross_documents
    lengths, orders = (10, 1, 20), set()
    tokens, ends = np.arange(10, 41), np.cumsum(lengths)
    for _ in range(200):
        raw = example(tokens, ends, [4, 10, 11, 31])
        row = objective.prepare(raw, rng, VOCAB, LENGTH)
        assert labels_of(row) == [BOS, *range(10, 20), EOS, 20, EOS, *range(21, 41), EOS]
        documents = "".join(f"{i} " for i in used(row, "input_ids")[1:-1]).split(f" {EOS} ")
        found = [[int(i) for i in document.split()] for document in documents]
        for document, first, count in zip(found, (10, 20, 21), lengths, strict=True):
            kept = [i for i in document if i != MASK]
            assert set(kept) <= set(range(first, first + count))
            assert len(kept) == count - round(0.3 * count)
        orders.add(found[0][0] < 14)
    assert orders == {True, False}  # the sentences of the first document change places


def test_without_noise_the_text_stays():
    assert body(prepare(range(10, 30), **NOTHING)) == list(range(10, 30))


def test_the_first_input_of_the_decoder_is_eos_or_the_configured_id():
    assert used(prepare([10, 11]), "decoder_input_ids") == [EOS, BOS, 10, 11]
    assert used(prepare([10, 11], decoder_start_id=7), "decoder_input_ids")[0] == 7


def test_tokenizers_without_a_beginning_do_without():
    row = prepare([10, 11], vocab=without(VOCAB, "bos_id", "cls_id"), **NOTHING)
    assert used(row, "input_ids") == labels_of(row) == [10, 11, EOS]


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(UserError, match="the tokenizer has no \\[MASK\\]"):
        prepare([10, 11], vocab=without(VOCAB, "mask_id"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"infill_share": 1.0}, "infill_share is 1.0"),
        ({"mask_share": -0.1}, "mask_share is -0.1"),
        ({"delete_share": float("nan")}, "delete_share is nan"),
        ({"mean_span": 0.0}, "mean_span is 0.0"),
        ({"mean_span": float("inf")}, "mean_span is inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Denoising(**settings)


def test_terms_count_positions_with_a_weight():
    batch = {
        "input_ids": np.zeros((2, 4), np.int32),
        "decoder_input_ids": np.array([[0, 5, 6], [0, 0, 0]], np.int32),
        "labels": np.array([[5, 5, 0], [0, 0, 0]], np.int32),
        "weights": np.array([[1, 1, 0], [0, 0, 0]], np.float32),
    }
    losses, metrics = terms_of(Denoising(), batch)
    loss = pytest.approx(2 * np.log(np.exp(4.0) + 11) - 4.0, rel=1e-6)
    assert losses == {"denoising": (loss, 2.0, 1.0)}
    assert metrics == {"loss": (loss, 2.0), "accuracy": (1.0, 2.0)}
