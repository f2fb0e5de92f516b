"""What encoder-decoders write, against Hugging Face's, through tests/golden/translate.npz."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bart import BartConfig
from flax_transformers.generation.translate import generate_target
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from tests.families.parity import first_by_default, load_case, some_by_default
from tests.golden import translate as golden

CASES = {case.name: case for case in golden.cases()}
TINY = BartConfig(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    intermediate_size=8,
    max_positions=16,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", some_by_default(CASES, ["bart", "newer"]))
def test_greedy_targets_equal_those_of_transformers(name):
    case = CASES[name]
    _, model, params, _ = load_case(case)
    with np.load(golden.OUTPUT) as file:
        eos, expected = int(file[f"{name}/eos"]), file[f"{name}/tokens"]
    tokens = generate_target(
        model,
        params,
        case.inputs["input_ids"],
        case.inputs["attention_mask"],
        max_new_tokens=golden.NEW_TOKENS,
        eos_id=eos,
        pad_id=0,
    )
    # The original stops when all rows have ended, and then has no more columns.
    padded = np.pad(expected, ((0, 0), (0, golden.NEW_TOKENS - expected.shape[1])))
    # It also counts positions from the padding before a source; ours go on as if there was none.
    comparable = case.inputs["attention_mask"][:, 0] == 1
    if model.config.positions == "none":
        comparable[:] = True
    assert comparable.sum() >= 3
    np.testing.assert_array_equal(tokens[comparable], padded[comparable])


@pytest.mark.slow
@pytest.mark.full
def test_start_ids_are_read_and_not_repeated():
    case = CASES["every_layer"]
    _, model, params, _ = load_case(case)
    source = case.inputs["input_ids"][:1], case.inputs["attention_mask"][:1]
    tokens = generate_target(model, params, *source, max_new_tokens=4)
    start = (model.config.decoder_start_id, *np.asarray(tokens)[0, :2].tolist())
    rest = generate_target(model, params, *source, max_new_tokens=2, start_ids=start)
    np.testing.assert_array_equal(rest, tokens[:, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(["bart", "newer"]))
def test_padding_of_a_source_on_either_side_changes_nothing(name):
    _, model, params, _ = load_case(CASES[name])
    source = np.random.default_rng(1).integers(5, 30, (1, 5))
    plain = generate_target(model, params, source, max_new_tokens=8)
    for widths in ((3, 0), (0, 3)):
        ids, mask = (np.pad(rows, ((0, 0), widths)) for rows in (source, np.ones_like(source)))
        for pad in (0, model.config.vocab_size + 200):  # also [PAD] of a tokenizer alone
            filled = np.where(mask == 1, ids, pad)
            padded = generate_target(model, params, filled, mask, max_new_tokens=8)
            np.testing.assert_array_equal(padded, plain)


@pytest.mark.slow
def test_a_forced_first_token_is_written_and_continued():
    case = CASES["bart"]
    _, model, params, _ = load_case(case)
    source = case.inputs["input_ids"][:1], case.inputs["attention_mask"][:1]
    free = generate_target(model, params, *source, max_new_tokens=4)
    forced = (int(free[0, 0]) + 1) % model.config.vocab_size
    tokens = generate_target(model, params, *source, max_new_tokens=4, forced_first_id=forced)
    start = (model.config.decoder_start_id, forced)
    rest = generate_target(model, params, *source, max_new_tokens=3, start_ids=start)
    np.testing.assert_array_equal(tokens, [[forced, *np.asarray(rest)[0]]])


@pytest.mark.slow
def test_a_forced_first_token_is_sampled():
    case = CASES["bart"]
    _, model, params, _ = load_case(case)
    tokens = generate_target(
        model,
        params,
        case.inputs["input_ids"],
        max_new_tokens=1,
        forced_first_id=7,
        temperature=2.0,
        top_k=3,
        top_p=0.9,
        key=jax.random.key(0),
    )
    assert set(np.asarray(tokens)[:, 0].tolist()) == {7}


def test_padding_of_a_source_takes_no_positions():
    model = build_model(dataclasses.replace(TINY, max_positions=4), ComputeConfig())
    mask = np.array([[1, 1, 1, 1, 0, 0, 0, 0]])
    with pytest.raises(UserError, match="4 tokens of source and 5 of target"):
        generate_target(model, {}, np.ones((1, 8), np.int32), mask, max_new_tokens=4)


@pytest.mark.parametrize(
    ("changes", "settings", "names"),
    [
        ({}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({}, {"max_new_tokens": 16}, "5 tokens of source and 17 of target.*16 positions"),
        ({}, {"max_new_tokens": 2, "temperature": 1.0}, "sampling needs a random key"),
        ({"decoder_start_id": None}, {"max_new_tokens": 2}, "give start_ids"),
        ({}, {"max_new_tokens": 2, "start_ids": (2, 50)}, "has id 50.*are 0 to 49"),
        ({}, {"max_new_tokens": 2, "forced_first_id": -1}, "has id -1"),
        ({"architecture": "BartModel"}, {"max_new_tokens": 2}, "BartModel does not generate"),
        (
            {"architecture": "BartModel"},
            {"max_new_tokens": 2, "start_ids": (2,)},
            "BartModel does not generate",
        ),
    ],
)
def test_invalid_settings_are_refused(changes, settings, names):
    model = build_model(dataclasses.replace(TINY, **changes), ComputeConfig())
    with pytest.raises(UserError, match=names):
        generate_target(model, {}, np.ones((1, 5), np.int32), **settings)


def test_a_model_with_one_stack_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(architecture="GPT2LMHeadModel"), unembed=None)
    with pytest.raises(UserError, match="GPT2LMHeadModel does not generate"):
        generate_target(model, {}, np.ones((1, 5), np.int32), max_new_tokens=2)
