"""Decoding: greedily as Hugging Face's ``generate``, sampling as asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.generation.decode import (
    Endings,
    Sampling,
    continue_text,
    generate,
    sampling_of,
)
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from tests.families.parity import load_case
from tests.golden import bert
from tests.golden import generate as golden

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
LENGTH = golden.NEW_TOKENS


@cache
def load(name):
    _, model, params, _ = load_case(CASES[name])
    return model, params


def stored(name):
    with np.load(golden.OUTPUT) as file:
        return {key: file[f"{name}/{key}"] for key in ("free", "eos", "ended")}


def write(name, ids, mask, **settings):
    return np.asarray(
        generate(*load(name), ids, mask, max_new_tokens=LENGTH, pad_id=golden.PAD, **settings)
    )


def to_the_right(ids, mask):
    """The same prompts with their padding after them."""
    order = np.argsort(mask == 0, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)


@pytest.mark.slow
@EACH
def test_greedy_text_equals_that_of_transformers(name):
    ids, mask = golden.prompts(CASES[name])
    expected = stored(name)
    # An id that is not in the vocabulary ends nothing, and needs no other compilation.
    never = [1000, 1001]
    np.testing.assert_array_equal(write(name, ids, mask, eos_id=never), expected["free"])
    eos = expected["eos"].tolist()
    np.testing.assert_array_equal(write(name, ids, mask, eos_id=eos), expected["ended"])
    right = to_the_right(ids, mask)
    assert right[1][2].tolist() == [1, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(write(name, *right, eos_id=eos), expected["ended"])


@pytest.mark.slow
def test_samples_depend_only_on_the_key_and_greedy_text_does_not():
    ids, mask = golden.prompts(CASES["write_llama"])
    sample = partial(write, "write_llama", ids, mask, temperature=2.0)
    first, again, other = (sample(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= 0 and first.max() < load("write_llama")[0].config.vocab_size
    greedy = stored("write_llama")["free"]
    best = sample(key=jax.random.key(0), top_k=1)
    np.testing.assert_array_equal(best, greedy)


def count_up(ids, count, cache):
    """A model of six tokens that counts up in each row, and counts its calls."""
    return 9.0 * jax.nn.one_hot((ids + 1) % 6, 6), cache + 1


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        ([], [[1, 2, 3, 4, 5], [4, 5, 0, 1, 2]]),
        ([3], [[1, 2, 3, 7, 7], [4, 5, 0, 1, 2]]),
        ([3, 5], [[1, 2, 3, 7, 7], [4, 5, 7, 7, 7]]),
        ([1, 4], [[1, 7, 7, 7, 7], [4, 7, 7, 7, 7]]),
    ],
)
def test_a_row_ends_at_the_end_token_and_is_padded(eos, expected):
    endings = Endings(jnp.array(eos, jnp.int32), jnp.int32(7))
    logits = jax.nn.one_hot(jnp.array([1, 4]), 6)
    run = partial(continue_text, count_up, max_new_tokens=5, sampling=Sampling())
    tokens = jax.jit(run)(jnp.int32(0), logits, endings, jax.random.key(0))
    assert tokens.tolist() == expected


@pytest.mark.slow
def test_the_loop_ends_when_all_rows_have_ended():
    calls = []

    def step(ids, count, cache):
        jax.debug.callback(lambda count: calls.append(int(count)), count)
        return count_up(ids, count, cache)

    def run(eos, length):
        calls.clear()
        endings = Endings(jnp.array(eos, jnp.int32), jnp.int32(7))
        logits = jax.nn.one_hot(jnp.array([1]), 6)
        go = partial(continue_text, step, max_new_tokens=length, sampling=Sampling())
        jax.block_until_ready(jax.jit(go)(jnp.int32(0), logits, endings, jax.random.key(0)))
        jax.effects_barrier()
        return sorted(calls)

    assert run([], 1) == []
    assert run([], 4) == [0, 1, 2]
    assert run([3], 9) == [0, 1]


LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.1, 0.3, 0.15]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_k=9), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_p=0.3), [1]),
        (Sampling(temperature=1.0, top_p=0.65), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.75), [1, 3, 4]),
        (Sampling(temperature=1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        # Of the three likeliest, renormalised to 0.47, 0.35 and 0.18.
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [1, 3]),
        # The temperature comes first: it flattens to 0.12, 0.29, 0.16, 0.25 and 0.18.
        (Sampling(temperature=2.0, top_p=0.65), [1, 3, 4]),
    ],
)
def test_samples_are_among_the_remaining_tokens(sampling, kept):
    scores = np.asarray(sampling.log_probabilities(LOGITS))[0]
    assert np.flatnonzero(np.isfinite(scores)).tolist() == kept
    expected = np.asarray(LOGITS[0])[kept] / sampling.temperature
    np.testing.assert_allclose(
        scores[kept] - scores[1], expected - expected[kept.index(1)], rtol=1e-5
    )


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_they_are_likely():
    many = jnp.broadcast_to(LOGITS, (4000, 5))
    drawn = Sampling(temperature=0.5).choose(many, jax.random.key(0))
    share = np.bincount(drawn, minlength=5) / 4000
    squares = np.exp(np.asarray(LOGITS[0])) ** 2
    np.testing.assert_allclose(share, squares / squares.sum(), atol=0.03)


@pytest.mark.slow
def test_padded_vocabulary_entries_are_never_drawn():
    padded = jnp.pad(jnp.zeros((2000, 3)), ((0, 0), (0, 5)), constant_values=-3.4e38)
    for temperature in (0.0, 0.01, 1.0, 100.0):
        drawn = Sampling(temperature=temperature).choose(padded, jax.random.key(0))
        assert int(drawn.max()) <= 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "needs a random key"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.5}, "set a temperature"),
        ({"max_new_tokens": 34}, "41 tokens.*40 positions"),
        ({"attention_mask": np.zeros((3, 7), np.int32)}, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    ids, mask = golden.prompts(CASES["write_gpt2"])
    asked = {"attention_mask": mask, "max_new_tokens": 1} | settings
    with pytest.raises(UserError, match=says):
        generate(*load("write_gpt2"), ids, **asked)


def test_a_model_that_generates_no_text_is_refused():
    _, model, params, _ = load_case(bert.CASES[0])
    with pytest.raises(UserError, match=r"BertFor\w+ does not generate text"):
        generate(model, params, np.ones((1, 2), np.int32), max_new_tokens=1)


DRAWING = GenerationSettings(do_sample=True, temperature=0.6)


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        (DRAWING, {"top_k": 40}, (0.6, 40, None)),
        (DRAWING, {"top_p": 0.5}, (0.6, 50, 0.5)),
        (DRAWING, {}, (0.6, 50, None)),
        (DRAWING, {"temperature": 0.0}, (0.0, None, None)),
        (replace(DRAWING, top_k=7, top_p=0.9), {"temperature": 1.0}, (1.0, 7, 0.9)),
        (replace(DRAWING, top_k=0), {}, (0.6, None, None)),
        (replace(DRAWING, top_k=7, temperature=None), {"top_k": 3}, (1.0, 3, None)),
        (NO_SETTINGS, {"temperature": 1.0}, (1.0, 50, None)),
        (NO_SETTINGS, {}, (0.0, None, None)),
        (GenerationSettings(top_k=7, temperature=0.6), {}, (0.0, None, None)),
        (GenerationSettings(top_k=7), {"temperature": 2.0, "top_p": 0.5}, (2.0, 7, 0.5)),
    ],
)
def test_temperature_top_k_and_top_p_are_resolved_separately(settings, given, expected):
    asked = {"temperature": None, "top_k": None, "top_p": None} | given
    found = sampling_of(settings, **asked, key=object())
    assert (found.temperature, found.top_k, found.top_p) == expected


def test_top_k_without_a_temperature_anywhere_is_refused():
    with pytest.raises(UserError, match="set a temperature"):
        sampling_of(NO_SETTINGS, None, 40, None, object())
