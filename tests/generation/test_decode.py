"""Decoding: greedily as Hugging Face's ``generate``, sampling as asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.generation import program
from flax_transformers.generation.beams import Beams
from flax_transformers.generation.choices import choice_of
from flax_transformers.generation.decode import check_prompts, generate
from flax_transformers.generation.logits import History
from flax_transformers.generation.loop import Endings, Rules, TextLimits, advance
from flax_transformers.generation.program import GenerationRequest, Settings
from flax_transformers.generation.sampling import Sampling
from flax_transformers.models.config import Rope
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from tests.families.parity import load_case, some_by_default
from tests.golden import bert
from tests.golden import generate as golden

CASES = {case.name: case for case in golden.CASES}
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
@pytest.mark.parametrize("name", some_by_default(CASES, ["write_gpt2", "write_mistral"]))
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
@pytest.mark.parametrize("to_side", ["left", "right"])
def test_a_bidirectional_prompt_is_read_as_the_prefix_of_a_training_example(to_side):
    model, params = load("write_mistral")
    ids, mask = golden.prompts(CASES["write_mistral"])
    texts = [row[used > 0] for row, used in zip(ids, mask, strict=True)]
    if to_side == "right":
        ids, mask = to_the_right(ids, mask)
    limits = TextLimits(Endings.of([1000], golden.PAD), jnp.int32(LENGTH), None)
    request = GenerationRequest(jnp.asarray(ids), jnp.asarray(mask), limits, jax.random.key(0))
    read = jax.jit(program._read_prompts, static_argnums=(0, 3))

    def first_logits(**settings):
        compiled = Settings(LENGTH, Sampling(temperature=0.0), GenerationSettings(**settings))
        return np.asarray(read(model, params, request, compiled)[0])

    row = np.zeros((len(texts), ids.shape[1] + LENGTH), np.int32)
    segments, prefix = np.zeros_like(row), np.zeros_like(row)
    written = write(
        "write_mistral", ids, mask, settings=GenerationSettings(bidirectional_prompt=True)
    )
    for number, (text, new) in enumerate(zip(texts, written, strict=True)):
        row[number, : len(text) + LENGTH] = [*text, *new]
        segments[number, : len(text) + LENGTH] = 1
        prefix[number, : len(text)] = 1
    states = partial(model.apply, method="hidden_states")
    trained = jax.jit(
        lambda: model.apply(
            {"params": params},
            states(
                {"params": params}, row, segment_ids=segments, prefix_mask=prefix
            ).last_hidden_state,
            method="unembed",
        )
    )()
    places = np.array([len(text) - 1 for text in texts])
    rows = np.arange(len(texts))
    np.testing.assert_allclose(
        first_logits(bidirectional_prompt=True), trained[rows, places], rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(first_logits(), trained[rows, places], atol=1e-3)
    for number in range(LENGTH):
        best = np.argmax(trained[rows, places + number, : model.config.vocab_size], axis=-1)
        np.testing.assert_array_equal(written[:, number], best)


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


@pytest.mark.slow
@pytest.mark.parametrize("to_side", ["left", "right"])
def test_padding_may_have_an_id_that_the_model_lacks(to_side):
    name = "write_gpt2"
    ids, mask = golden.prompts(CASES[name])
    added = load(name)[0].config.vocab_size + 200  # [PAD] of a tokenizer
    ids = np.where(mask == 1, ids, added)
    ids, mask = to_the_right(ids, mask) if to_side == "right" else (ids, mask)
    model, params = load(name)
    written = generate(model, params, ids, mask, max_new_tokens=LENGTH, pad_id=added)
    np.testing.assert_array_equal(written, stored(name)["free"])


def count_up(ids, positions, ancestors, cache):
    """A model of six tokens that counts up in each row, and counts its calls."""
    return 9.0 * jax.nn.one_hot((ids + 1) % 6, 6), cache + 1


def count_from(first, eos, length):
    """The new tokens of rows that begin with ``first``, and the number of calls of ``step``."""
    limits = TextLimits(Endings(jnp.array(eos, jnp.int32), jnp.int32(7)), jnp.int32(length))
    choice, rules = Sampling(), Rules(limits, jax.random.key(0), 6)
    first = jnp.array(first)
    prompt = jnp.zeros((len(first), 1), jnp.int32)

    @jax.jit
    def run(logits):
        history = History.of(prompt, prompt + 1, length, 7)
        state = choice.start(logits, history, rules)
        state, calls = advance(count_up, state, jnp.int32(0), choice, rules, limits.max_new_tokens)
        return choice.result(state)[:, 1:], calls

    tokens, calls = run(9.0 * jax.nn.one_hot(first, 6))
    return tokens.tolist(), int(calls)


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
    assert count_from([1, 4], eos, 5)[0] == expected


@pytest.mark.slow
def test_the_loop_ends_when_all_rows_have_ended():
    assert count_from([1], [], 1)[1] == 0
    assert count_from([1], [], 4)[1] == 3
    assert count_from([1], [3], 9)[1] == 2


@pytest.mark.slow
def test_each_token_is_drawn_by_a_number_of_its_own():
    length, size = 6, 1000
    limits = TextLimits(Endings.of((), 0), jnp.int32(length))
    choice, rules = Sampling(temperature=1.0), Rules(limits, jax.random.key(0), size)
    prompt, logits = jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1, size))

    @jax.jit
    def run():
        state = choice.start(logits[:, 0], History.of(prompt, prompt + 1, length), rules)
        step = lambda ids, positions, ancestors, cache: (logits, cache)  # noqa: E731
        state, _ = advance(step, state, (), choice, rules, limits.max_new_tokens)
        return choice.result(state)[:, 1:]

    assert len(np.unique(run())) > length  # of 12; of fewer numbers, some rows or columns are equal


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
        (Sampling(temperature=1.0, min_p=0.3), [1, 3, 4]),
        (Sampling(temperature=2.0, min_p=0.55), [1, 3, 4]),
        (Sampling(temperature=1.0, top_k=3, min_p=0.5), [1, 3]),
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
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.2}])
def test_tokens_are_drawn_as_often_as_they_are_likely(filters):
    sampling, draws = Sampling(temperature=0.5, **filters), 20_000
    many = jnp.broadcast_to(LOGITS, (draws, 5))
    drawn = np.bincount(sampling.choose(many, jax.random.key(0)), minlength=5)
    expected = draws * np.asarray(jax.nn.softmax(sampling.log_probabilities(LOGITS)[0]))
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    # Chi-square exceeds this with probability 1e-4 at four degrees of freedom, less at fewer.
    assert ((drawn - expected)[kept] ** 2 / expected[kept]).sum() < 23.5


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
        ({"choice": Beams(num_beams=2), "streamer": print}, "no text before its end"),
        ({"max_new_tokens": 34}, "41 tokens.*40 positions"),
        ({"attention_mask": np.zeros((3, 7), np.int32)}, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    ids, mask = golden.prompts(CASES["write_gpt2"])
    asked = {"attention_mask": mask, "max_new_tokens": 1} | settings
    with pytest.raises(UserError, match=says):
        generate(*load("write_gpt2"), ids, **asked)


@pytest.mark.parametrize("scaling", ["linear", "yarn", "dynamic"])
def test_text_may_be_as_long_as_scaled_positions_allow(scaling):
    rope = Rope(scaling=scaling, factor=4.0, original_max_positions=16)
    config = LlamaConfig(max_positions=16, rope=rope)
    table = replace(config, positions="learned")
    asked = [20], 44, Sampling(), None, NO_SETTINGS
    assert check_prompts(SimpleNamespace(config=config), *asked)[0] == 44
    with pytest.raises(UserError, match="64 tokens of prompt and text.*16 positions"):
        check_prompts(SimpleNamespace(config=table), *asked)


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
    found = choice_of(settings, object(), **asked)
    assert (found.temperature, found.top_k, found.top_p) == expected


BEAMS = GenerationSettings(num_beams=4, length_penalty=0.6, early_stopping="never")
NEVER = Beams(num_beams=4, length_penalty=0.6, early_stopping="never")


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        (BEAMS, {}, NEVER),
        (BEAMS, {"temperature": 0.0}, NEVER),
        (BEAMS, {"num_beams": 2, "early_stopping": True, "length_penalty": 0.0},
         Beams(num_beams=2, length_penalty=0.0, early_stopping=True)),
        (BEAMS, {"num_beams": 1}, Sampling()),
        (BEAMS, {"temperature": 0.5}, Sampling(temperature=0.5, top_k=50)),
        (replace(BEAMS, do_sample=True), {}, Sampling(temperature=1.0, top_k=50)),
        (replace(DRAWING, min_p=0.1), {"num_beams": 3}, Beams(num_beams=3)),
        (replace(DRAWING, min_p=0.1), {}, Sampling(temperature=0.6, top_k=50, min_p=0.1)),
        (NO_SETTINGS, {"num_beams": 2}, Beams(num_beams=2)),
    ],
)  # fmt: skip
def test_beams_are_those_given_or_of_the_settings(settings, given, expected):
    assert choice_of(settings, object(), **given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 4, "temperature": 0.8}, "num_beams is 4 and temperature 0.8"),
        ({"length_penalty": 0.6}, "apply to beam search only"),
        ({"early_stopping": True, "temperature": 1.0}, "apply to beam search only"),
        ({"num_beams": 4, "top_k": 3}, "set a temperature"),
        ({"num_beams": 4, "length_penalty": 1e9}, "length_penalty is 1000000000.0"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        choice_of(NO_SETTINGS, object(), **given)


def test_top_k_without_a_temperature_anywhere_is_refused():
    with pytest.raises(UserError, match="set a temperature"):
        choice_of(NO_SETTINGS, object(), top_k=40)
