"""Prefix language modelling: who sees whom, and what is predicted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.mistral import MistralConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.prefix_lm import PrefixLM
from tests.objectives.test_causal_lm import (
    LENGTH,
    SMALL,
    VOCAB,
    batch_of,
    built,
    copying_model,
    example,
    lists,
    terms_of,
)


def prepare(raw, rng=0, **settings):
    return PrefixLM(**settings).prepare(raw, np.random.default_rng(rng), VOCAB, LENGTH)


def divisions(raw, draws, document=1):
    """How many tokens the prefix of a document has, many times."""
    rng = np.random.default_rng(1)
    for _ in range(draws):
        row = PrefixLM().prepare(raw, rng, VOCAB, LENGTH)
        yield int((row["prefix_mask"] * (row["segment_ids"] == document)).sum()) - 1


def test_tokens_after_the_prefix_are_predicted():
    raw = example([10, 11, 12, 13], [4])
    rows = [prepare(raw, rng) for rng in range(30)]
    found = {tuple(row["prefix_mask"].tolist()): lists(row) for row in rows}
    two = found[1, 1, 1, *[0] * 9]  # the beginning, 10 and 11
    assert two == {
        "input_ids": [1, 10, 11, 12, 13] + [0] * 7,
        "labels": [10, 11, 12, 13, 2] + [0] * 7,
        "segment_ids": [1] * 5 + [0] * 7,
        "label_weights": [0, 0, 1, 1, 1] + [0] * 7,
        "prefix_mask": [1, 1, 1, 0, 0] + [0] * 7,
    }


def test_every_division_is_equally_likely():
    draws = 4000
    found = np.bincount(list(divisions(example(range(10, 18), [8]), draws)), minlength=9)
    assert found[0] == 0 and found[9:].sum() == 0  # from one token of prefix to one of the rest
    expected = draws / 8
    assert np.sum((found[1:] - expected) ** 2) / expected < 7 + 4 * np.sqrt(14)


def test_each_document_has_a_division_of_its_own():
    raw = example([*range(10, 15), *range(20, 24)], [5])
    pairs = set(zip(divisions(raw, 300), divisions(raw, 300, document=2), strict=True))
    assert {a for a, _ in pairs} == {1, 2, 3, 4, 5}
    assert {b for _, b in pairs} == {1, 2, 3}
    assert len(pairs) == 15


def test_a_document_of_one_token_is_predicted_without_a_prefix():
    row = prepare(example([10]))
    assert row["prefix_mask"].tolist() == [1] + [0] * 11
    assert row["label_weights"].tolist() == [1] + [0] * 11


def test_an_empty_example_has_no_weight():
    assert not any(values.any() for values in prepare(example([])).values())


def test_other_arrays_are_those_of_causal_examples():
    raw, rng = example([10, 11, 12, 20, 21], [3]), np.random.default_rng(2)
    causal = CausalLM().prepare(raw, rng, VOCAB, LENGTH)
    row = PrefixLM().prepare(raw, rng, VOCAB, LENGTH)
    for name in ("input_ids", "labels", "segment_ids"):
        np.testing.assert_array_equal(row[name], causal[name])


def allowed(mask, length):
    return np.asarray(mask.dense(length, length))[0].astype(int)


@pytest.mark.slow
def test_keys_of_the_prefix_are_seen_by_their_whole_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0]])
    prefix = jnp.array([[1, 1, 0, 1, 0, 0, 0]]) > 0
    mask = AttentionMask(segments, segments, key_prefix=prefix, causal=True)
    assert allowed(mask, 7).tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_a_sliding_window_limits_previous_tokens_and_not_the_prefix():
    prefix = jnp.array([[True, True, True, True, False]])
    mask = AttentionMask(key_prefix=prefix, causal=True, window=(1, 0))
    assert allowed(mask, 5).tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def influence(config):
    """[T, T] bool, whether the hidden state at a place changes when an input does."""
    functions, params = built(config)
    length, division = 8, 3
    batch = {
        "input_ids": np.arange(10, 10 + length, dtype=np.int32)[None],
        "segment_ids": np.ones((1, length), np.int32),
        "prefix_mask": (np.arange(length) <= division).astype(np.int32)[None],
    }
    hidden = jax.jit(lambda batch: functions.hidden_states(params, batch, {}).last_hidden_state)
    before, changed = np.asarray(hidden(batch))[0], []
    for place in range(length):
        ids = batch["input_ids"].copy()
        ids[0, place] = 40
        after = np.asarray(hidden(batch | {"input_ids": ids}))[0]
        changed.append((before != after).any(-1))
    return np.array(changed).T


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [GPT2Config(**SMALL), MistralConfig(num_key_value_heads=1, **SMALL)],
    ids=["gpt2", "mistral"],
)
def test_attention_is_bidirectional_in_the_prefix_and_causal_after_it(config):
    place = np.arange(8)
    expected = (place[None, :] <= place[:, None]) | (place <= 3)[None, :]
    np.testing.assert_array_equal(influence(config), expected)


@pytest.mark.slow
def test_a_prefix_read_into_a_cache_is_seen_both_ways():
    config = GPT2Config(**SMALL)
    module, (_, params) = build_model(config, ComputeConfig()), built(config)
    ids = jnp.arange(10, 18)[None]
    prefix = (jnp.arange(8) <= 3)[None].astype(jnp.int32)

    @jax.jit
    def run(ids, prefix, cache):
        return module.apply(
            {"params": params}, ids, prefix_mask=prefix, cache=cache, method="hidden_states"
        )

    whole = run(ids, prefix, None).last_hidden_state
    cache = module.bind({"params": params}).empty_cache(1, 10)
    first = run(ids[:, :4], prefix[:, :4], cache)
    rest = run(ids[:, 4:], None, first.cache)
    parts = jnp.concatenate([first.last_hidden_state, rest.last_hidden_state], axis=1)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_a_bidirectional_model_is_refused():
    model = build_model(BertConfig(architecture="BertForMaskedLM", **SMALL), ComputeConfig())
    batch = batch_of(prepare(example([10, 11, 12])))

    def hidden_states():
        inputs = {name: jnp.asarray(batch[name]) for name in model.inputs if name in batch}
        return model.init(jax.random.key(0), **inputs, method="hidden_states")

    with pytest.raises(UserError, match="needs a causal model"):
        jax.eval_shape(hidden_states)


def test_terms_are_sums_over_tokens_after_the_prefix():
    row = prepare(example([10, 10, 10, 11], []), rng=3)
    rest = int(row["label_weights"].sum())
    assert 0 < rest < 4
    zeros = {name: np.zeros_like(values) for name, values in row.items()}
    losses, metrics = terms_of(PrefixLM(), copying_model(), {}, batch_of(row, zeros))
    log_z = np.log(np.exp(3.0) + 49)
    loss = pytest.approx(rest * log_z - 3.0 * (rest - 1), rel=1e-6)
    assert losses == {"prefix_lm": (loss, rest, 1.0)}
    assert metrics == {"loss": (loss, rest), "accuracy": (rest - 1, rest)}


def test_the_example_view_has_the_prefix_and_the_rest_of_each_document():
    row = prepare(example([10, 11, 12, 13, 20, 21], [4]))
    shown = PrefixLM().example_views(row)
    assert [part.name for part in shown] == ["prefix", "rest", "prefix", "rest"]
    assert [*shown[0].ids, *shown[1].ids] == [1, 10, 11, 12, 13, 2]
    assert [*shown[2].ids, *shown[3].ids] == [1, 20, 21]
    assert shown[0].labels is None and (shown[1].labels == shown[1].ids).all()
