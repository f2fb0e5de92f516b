"""Beam search: texts as Hugging Face's ``generate``, and its parts on small tables."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.generation.beams import Beams
from flax_transformers.generation.decode import generate
from flax_transformers.generation.logits import History
from flax_transformers.generation.loop import Endings, Rules, TextLimits, advance
from flax_transformers.generation.translate import generate_target
from flax_transformers.huggingface.generation_settings import read_settings
from tests.families.parity import load_case, some_by_default
from tests.golden import generate as golden


@cache
def load(name):
    _, model, params, _ = load_case(golden.BEAM_CASES[name])
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize("number", some_by_default(range(len(golden.BEAMS)), [0, 7]))
def test_texts_equal_those_of_transformers(number):
    name, given = golden.BEAMS[number]
    with np.load(golden.OUTPUT) as file:
        eos, expected = (file[f"beams_{number}/{key}"] for key in ("eos", "tokens"))
    case = golden.BEAM_CASES[name]
    start = golden.starts_of_targets(case)
    write, read = (generate_target, golden.sources) if start else (generate, golden.prompts)
    tokens = write(
        *load(name),
        *read(case),
        max_new_tokens=golden.NEW_TOKENS,
        eos_id=eos.tolist(),
        pad_id=golden.PAD,
        settings=read_settings(given | start, "test"),
    )
    np.testing.assert_array_equal(tokens, expected)


TABLE = np.log(
    np.array(
        [
            [0.00, 0.50, 0.40, 0.10],  # after 0, the beginning
            [0.10, 0.30, 0.30, 0.30],  # greedy decoding comes here
            [0.90, 0.04, 0.03, 0.03],  # and beam search there
            [0.25, 0.25, 0.25, 0.25],
        ],
        np.float32,
    ).clip(1e-9)
)
"""Log-probabilities of the next token, by the last one; 0 ends a text."""


def search(choice, length=6, eos=(0,), table=TABLE, prompts=(0,)):
    """The new tokens of the first row, of which each depends on the one before, by ``table``."""
    limits = TextLimits(Endings(jnp.array(eos, jnp.int32), jnp.int32(0)), jnp.int32(length))
    rules = Rules(limits, jax.random.key(0), len(table))
    prompt = jnp.array(prompts, jnp.int32)[:, None]

    def step(ids, positions, ancestors, cache):
        return jnp.asarray(table)[ids], cache

    @jax.jit
    def run():
        history = History.of(prompt, jnp.ones_like(prompt), length)
        state = choice.start(jnp.asarray(table)[prompt[:, 0]], history, rules)
        state, _ = advance(step, state, (), choice, rules, limits.max_new_tokens)
        return choice.result(state)[0, 1:], state

    tokens, state = run()
    return tokens.tolist(), state


def test_the_most_probable_text_need_not_begin_with_the_most_probable_token():
    tokens, state = search(Beams(num_beams=2, length_penalty=0.0))
    assert tokens == [2, 0, 0, 0, 0, 0]
    assert np.exp(state.finished.score_BK[0, 0]) == pytest.approx(0.4 * 0.9)


def test_without_an_end_token_the_search_goes_to_the_limit():
    tokens, state = search(Beams(num_beams=2), length=3, eos=())
    assert len(tokens) == 3 and int(state.history.written) == 3
    assert bool(state.finished.real_BK.all())


@pytest.mark.parametrize(("form", "expected"), [("power", 4**0.6), ("gnmt", ((5 + 4) / 6) ** 0.6)])
def test_the_length_penalty_has_two_forms(form, expected):
    choice = Beams(num_beams=2, length_penalty=0.6, length_penalty_form=form)
    assert float(choice.penalty(jnp.int32(4))) == pytest.approx(expected)


def test_a_score_is_divided_by_the_penalty():
    _, state = search(Beams(num_beams=2, length_penalty=0.6, length_penalty_form="gnmt"))
    expected = np.log(0.4 * 0.9) / ((5 + 2) / 6) ** 0.6
    assert float(state.finished.score_BK[0, 0]) == pytest.approx(expected, rel=1e-5)


def test_early_stopping_ends_with_as_many_texts_as_beams():
    steps = {
        early: int(search(Beams(num_beams=2, early_stopping=early), length=9)[1].history.written)
        for early in (True, False, "never")
    }
    assert steps[True] < steps["never"] and steps[True] <= steps[False] <= steps["never"]


@pytest.mark.slow
def test_as_many_beams_go_on_where_a_text_can_end_in_several_ways():
    table = np.tile(np.float32([0.3, 0.3, 0.3, 0.06, 0.04]), (5, 1))
    table[4] = 0.96, 0.01, 0.01, 0.01, 0.01
    longest = Beams(num_beams=2, length_penalty=4.0, early_stopping="never")
    tokens, _ = search(longest, length=2, eos=(0, 1, 2), table=np.log(table))
    assert tokens == [4, 0]  # through the second best token of those that end nothing


@pytest.mark.slow
def test_a_row_that_early_stopping_has_ended_gets_no_text_that_ends_later():
    table = np.full((7, 7), 0.005, np.float32)
    table[0, [0, 2, 3]] = 0.5, 0.4, 0.06
    table[2, [0, 4]] = 0.44, 0.54
    table[4, 0] = 0.97  # [2, 4, 0] would be better than [2, 0] by its length
    table[5:, [6, 5]] = 0.6, 0.3  # after which nothing ends
    choice = Beams(num_beams=2, length_penalty=4.0, early_stopping=True)
    tokens, state = search(choice, length=4, table=np.log(table), prompts=(0, 5))
    assert int(state.history.written) == 4
    assert tokens == search(choice, length=4, table=np.log(table))[0] == [2, 0, 0, 0]


def test_one_beam_is_refused():
    with pytest.raises(UserError, match="num_beams is 1"):
        Beams(num_beams=1)
