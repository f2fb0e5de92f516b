"""What generation settings do to logits, on rows of a few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.generation import logits as logits_module
from flax_transformers.generation.logits import History, processed
from flax_transformers.models.generation_settings import GenerationSettings

forbid_repeated_ngrams = jax.jit(logits_module.forbid_repeated_ngrams, static_argnums=2)
forbid_words = jax.jit(logits_module.forbid_words, static_argnums=2)
penalize_repetition = jax.jit(logits_module.penalize_repetition)
VOCAB, PADDED = 8, 10
NO_END = jnp.zeros(VOCAB, bool)


def history(*rows, new_tokens=2, written=()):
    """That of rows of different lengths, padded on the left, with tokens written after each."""
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + list(row) for row in rows], np.int32)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    made = History.of(jnp.asarray(ids), jnp.asarray(mask), new_tokens)
    for tokens in written:
        made = made.append(jnp.asarray(tokens, jnp.int32))
    return made


def flat(rows=1, size=VOCAB):
    return jnp.zeros((rows, size))


def forbidden(logits):
    """The ids with logit -inf, by row."""
    return [np.flatnonzero(np.isneginf(row)).tolist() for row in np.asarray(logits)]


def apply(made, *, eos=(7,), max_new_tokens=9, logits=None, **settings):
    return processed(
        flat(len(made.ids_BL), PADDED) if logits is None else logits,
        made,
        GenerationSettings(**settings),
        eos=jnp.asarray(eos, jnp.int32),
        vocab_size=VOCAB,
        max_new_tokens=max_new_tokens,
    )


def test_padding_on_either_side_is_no_part_of_the_history():
    ids = jnp.array([[5, 6, 0, 0], [0, 0, 5, 6]])
    made = History.of(ids, (ids > 0).astype(jnp.int32), 1)
    np.testing.assert_array_equal(made.ids_BL, [[0, 0, 5, 6, 0]] * 2)
    assert made.first_B.tolist() == [2, 2] and made.length_B.tolist() == [2, 2]
    np.testing.assert_array_equal(made.append(jnp.array([3, 4])).last(2), [[6, 3], [6, 4]])


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = jnp.array([[3.0, 3.0, -1.0, -1.0, 0.0, 6.0, 0.0, 0.0]])
    found = penalize_repetition(logits, history([1, 2, 5]), 1.5)
    np.testing.assert_allclose(found, [[3.0, 2.0, -1.5, -1.0, 0.0, 4.0, 0.0, 0.0]])


def test_padding_is_not_penalized():
    found = penalize_repetition(jnp.ones((2, VOCAB)), history([0, 1, 2], [3]), 2.0)
    np.testing.assert_allclose(found[0], [0.5, 0.5, 0.5, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found[1], [1, 1, 1, 0.5, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("row", "size", "expected"),
    [
        ([1, 2, 3, 1, 2], 3, [3]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, [3, 4]),
        ([1, 2, 3], 3, []),
        ([4, 5, 4], 2, [5]),
        ([4, 4], 2, [4]),
        ([6, 1], 1, [1, 6]),
        ([6], 3, []),
        ([6], 2, []),
    ],
)
def test_no_ngram_is_written_twice(row, size, expected):
    # Beside a longer row, so that there is padding before it.
    made = history(row, [7] * 10)
    assert forbidden(forbid_repeated_ngrams(flat(2), made, size))[0] == expected


def test_ngrams_include_generated_tokens():
    made = history([1, 2, 3], written=([1], [2]))
    assert forbidden(forbid_repeated_ngrams(flat(), made, 3)) == [[3]]


def test_the_last_token_of_a_bad_word_is_forbidden():
    words = ((3,), (1, 2), (1, 4), (5, 1, 6))
    rows = history([1], [5, 1], [2])
    assert forbidden(forbid_words(flat(3), rows, words, NO_END)) == [
        [2, 3, 4],
        [2, 3, 4, 6],
        [3],
    ]


def test_padding_before_a_row_completes_no_bad_word():
    rows = history([1], [5, 5])
    assert forbidden(forbid_words(flat(2), rows, ((0, 1, 6),), NO_END)) == [[], []]


def test_the_end_token_is_never_a_bad_word():
    assert forbidden(apply(history([1]), eos=(3,), bad_words_ids=((3,), (4,)))) == [[4, 8, 9]]


def test_no_text_ends_before_the_minimum_length():
    rows = history([1, 2, 3], [1])
    assert forbidden(apply(rows, min_length=3)) == [[8, 9], [7, 8, 9]]
    assert forbidden(apply(rows, min_new_tokens=1)) == [[7, 8, 9], [7, 8, 9]]
    later = history([1], written=([4],))
    assert forbidden(apply(later, min_new_tokens=1)) == [[8, 9]]


def test_a_first_token_is_forced_only_after_a_start_of_one_token():
    rows = history([1], [1, 2])
    found = apply(rows, forced_bos_token_id=4)
    assert np.argmax(found, axis=1)[0] == 4 and len(forbidden(found)[0]) == PADDED - 1
    assert forbidden(found)[1] == [8, 9]


@pytest.mark.parametrize("ids", [5, (5, 6)])
def test_a_last_token_is_forced_at_the_limit(ids):
    row = history([1], written=([2],))
    assert forbidden(apply(row, max_new_tokens=3, forced_eos_token_id=ids)) == [[8, 9]]
    left = {5} if ids == 5 else {5, 6}
    found = forbidden(apply(row, max_new_tokens=2, forced_eos_token_id=ids))
    assert found == [sorted(set(range(PADDED)) - left)]


def test_tokens_are_suppressed_everywhere_or_at_the_beginning():
    first, second = history([1]), history([1], written=([2],))
    assert forbidden(apply(first, suppress_tokens=(1, 2))) == [[1, 2, 8, 9]]
    assert forbidden(apply(second, suppress_tokens=(1, 2))) == [[1, 2, 8, 9]]
    assert forbidden(apply(first, begin_suppress_tokens=(3,))) == [[3, 8, 9]]
    assert forbidden(apply(second, begin_suppress_tokens=(3,))) == [[8, 9]]


def test_begin_suppress_tokens_apply_after_a_forced_first_token():
    settings = {"begin_suppress_tokens": (3,), "forced_bos_token_id": 4}
    assert 3 in forbidden(apply(history([1], written=([4],)), **settings))[0]
    assert forbidden(apply(history([1, 2]), **settings)) == [[3, 8, 9]]


def test_vocabulary_padding_is_never_generated():
    everything = tuple(range(VOCAB))
    found = apply(history([1]), logits=jnp.full((1, PADDED), -5.0), suppress_tokens=everything)
    assert forbidden(found) == [list(range(PADDED))]


def test_ids_beyond_the_vocabulary_change_nothing():
    found = apply(history([1]), suppress_tokens=(99,), bad_words_ids=((77,), (1, 88)))
    assert forbidden(found) == [[8, 9]]
