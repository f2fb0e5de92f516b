"""What holds for every encoder-decoder, whatever its family."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from flax_transformers.testing import relative_difference
from tests.golden.pairs import draw_pair

SOURCE_SEGMENTS = np.repeat([1, 2, 3, 0], [5, 3, 4, 2])[None].astype(np.int32)
TARGET_SEGMENTS = np.repeat([1, 2, 3, 0], [3, 4, 2, 3])[None].astype(np.int32)
"""Three packed examples and padding, on both sides."""


def draw_packed(vocab_size):
    """Ids int32 [1, S] and [1, T] for these segments."""
    random = np.random.default_rng(0)
    return [
        random.integers(3, vocab_size, segments.shape, np.int32)
        for segments in (SOURCE_SEGMENTS, TARGET_SEGMENTS)
    ]


def assert_packed_examples_do_not_see_each_other(model, params, vocab_size):
    """Another example in the row, of source or target, changes no bit of this one."""

    @jax.jit
    def run(ids, decoder_ids):
        output = model.apply(
            {"params": params},
            ids,
            decoder_input_ids=decoder_ids,
            segment_ids=SOURCE_SEGMENTS,
            decoder_segment_ids=TARGET_SEGMENTS,
        )
        return output.encoder_last_hidden_state, output.last_hidden_state

    ids = draw_packed(vocab_size)
    before = [np.asarray(states) for states in run(*ids)]
    for side, segments in enumerate((SOURCE_SEGMENTS, TARGET_SEGMENTS)):
        for changed in (1, 2, 3):
            other = [array.copy() for array in ids]
            other[side][segments == changed] += 1 - 2 * (other[side][segments == changed] > 4)
            after = [np.asarray(states) for states in run(*other)]
            for seen, own in enumerate((SOURCE_SEGMENTS, TARGET_SEGMENTS)):
                for example in (1, 2, 3):
                    place = own == example
                    same = np.array_equal(before[seen][place], after[seen][place])
                    # The encoder does not see the target at all.
                    assert same == (example != changed or seen < side)


def assert_packed_examples_are_as_alone(model, params, vocab_size):
    """Every example has the decoder states that it has in a row of its own."""
    ids, decoder_ids = draw_packed(vocab_size)
    sides = ((ids, SOURCE_SEGMENTS), (decoder_ids, TARGET_SEGMENTS))
    inputs = []  # of both sides: ids and segments of the packed row, then of each example alone
    for packed_ids, packed_segments in sides:
        rows, segments = np.zeros((2, 4, packed_ids.shape[1]), np.int32)
        rows[0], segments[0] = packed_ids, packed_segments
        for example in (1, 2, 3):
            own = packed_ids[packed_segments == example]
            rows[example, : len(own)], segments[example, : len(own)] = own, 1
        inputs.append((rows, segments))
    (source, source_segments), (target, target_segments) = inputs
    states = jax.jit(partial(model.apply, {"params": params}))(
        source,
        decoder_input_ids=target,
        segment_ids=source_segments,
        decoder_segment_ids=target_segments,
    ).last_hidden_state
    for example in (1, 2, 3):
        found = states[0][TARGET_SEGMENTS[0] == example]
        expected = states[example][target_segments[example] == 1]
        assert relative_difference(found, expected) < 1e-5


def assert_steps_are_as_the_full_pass(model, params, vocab_size, prefill=4):
    """Four tokens at once and then one by one give the logits of a single pass, padding on either
    side of source and target; the encoder runs in the first call only."""
    pair = draw_pair("steps", vocab_size)
    full = jax.jit(partial(model.apply, {"params": params}))(**pair)
    source = {name: pair[name] for name in ("input_ids", "attention_mask")}
    ids, mask = pair["decoder_input_ids"], pair["decoder_attention_mask"]
    step = jax.jit(partial(model.apply, {"params": params}))
    # Two slots more than are needed.
    output = step(
        **source,
        decoder_input_ids=ids[:, :prefill],
        decoder_attention_mask=mask[:, :prefill],
        cache=model.empty_cache(len(ids), ids.shape[1] + 2),
    )
    logits = [output.logits]
    for place in range(prefill, ids.shape[1]):
        now = slice(place, place + 1)
        output = step(
            decoder_input_ids=ids[:, now],
            decoder_attention_mask=mask[:, now],
            cache=output.cache,
        )
        assert output.encoder_last_hidden_state is None
        logits.append(output.logits)
    found = np.concatenate(logits, axis=1)[mask == 1]
    assert relative_difference(found, np.asarray(full.logits)[mask == 1]) < 1e-5
