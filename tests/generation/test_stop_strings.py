"""Stop strings: tables over tokens find what a search in the text finds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.generation.stop_strings import StopStrings

PIECES = ["", "a", "b", "ab", "ba", "aab", "c", "abab", "bc", " "]
STOPS = ("ab", "aba", "bcb", "aabaab")


def found_in(text, begin, stop):
    """Whether ``stop`` ends in ``text`` after its first ``begin`` characters."""
    return stop in text[max(0, begin - len(stop) + 1) :]


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_string_is_found_with_the_token_that_completes_it(seed):
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, len(PIECES), n).tolist() for n in (0, 1, 3, 5, 8)]
    stops = StopStrings.of(STOPS, PIECES, prompts)
    begin = ["".join(PIECES[i] for i in prompt) for prompt in prompts]
    texts, progress = list(begin), stops.start
    for ids in random.integers(0, len(PIECES), (12, len(prompts))):
        progress = stops.advance(progress, jnp.asarray(ids, jnp.int32))
        texts = [text + PIECES[i] for text, i in zip(texts, ids, strict=True)]
        expected = [
            [found_in(text, len(first), stop) for stop in STOPS]
            for text, first in zip(texts, begin, strict=True)
        ]
        np.testing.assert_array_equal(progress < 0, expected)
    assert (np.asarray(progress) < 0).any() and (np.asarray(progress) >= 0).any()


def test_progress_is_that_of_each_beam():
    stops = StopStrings.of(["abc"], PIECES, [[]])
    progress = stops.advance(jnp.zeros((1, 2, 1), jnp.int32), jnp.array([[3, 6]]))
    assert progress.tolist() == [[[2], [0]]]
    assert stops.advance(progress, jnp.array([[6, 6]])).tolist() == [[[-1], [0]]]


def test_an_id_beyond_the_tokenizer_adds_nothing():
    stops = StopStrings.of(["ab"], [*PIECES, ""], [[1]])
    assert stops.advance(stops.start, jnp.array([99])).tolist() == stops.start.tolist() == [[1]]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        StopStrings.of(["a", ""], PIECES, [[]])
