"""Samples of a model during a run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.evaluation import samples
from flax_transformers.evaluation.samples import (
    Written,
    answered,
    continued,
    format_written,
    held_out_rows,
    readable_text,
)
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.testing import tiny_config, write_corpus

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt", 40)
    data = tiny_config(folder / "text.txt", folder / "store").data
    return prepare(dataclasses.replace(data, prepare_processes=1))


def config(objective):
    return tiny_config("text.txt", "store", objective=objective)


def test_a_decoder_continues_the_first_half_of_a_held_out_row(prepared, monkeypatch):
    asked = {}

    def echo(model, params, ids, mask, *, max_new_tokens, **settings):
        asked.update(settings, ids=ids, mask=mask)
        return np.repeat(TOKENIZER.encode_batch(["x"])[0][None], len(ids), 0).repeat(
            max_new_tokens, 1
        )

    monkeypatch.setattr(samples, "generate", echo)
    rows = held_out_rows(config(CausalLM()), prepared, 3)
    found = continued(prepared, None, None, rows)
    assert len(found) == 3
    assert asked["temperature"] == samples.TEMPERATURE and asked["eos_id"] == 1
    for sample, ids, mask in zip(found, asked["ids"], asked["mask"], strict=True):
        prompt = ids[mask > 0]
        assert prompt[0] == 1  # documents begin with the end token of the one before
        assert " ".join(TOKENIZER.decode(prompt).split()) == sample.given
        assert sample.wrote == 16 * "x" and sample.truth


def test_samples_of_a_prefix_language_model_begin_with_a_prefix(prepared, monkeypatch):
    asked = []

    def echo(model, params, ids, mask, *, max_new_tokens, settings, **others):
        asked.append(settings)
        return np.zeros((len(ids), max_new_tokens), np.int32)

    monkeypatch.setattr(samples, "generate", echo)
    own = GenerationSettings(top_k=3)
    model = SimpleNamespace(config=SimpleNamespace(generation=own))
    for objective in (CausalLM(), PrefixLM()):
        continued(prepared, model, None, held_out_rows(config(objective), prepared, 2))
    assert asked == [None, dataclasses.replace(own, bidirectional_prompt=True)]


def test_what_is_behind_the_end_of_a_continuation_is_not_shown(prepared, monkeypatch):
    padding = TOKENIZER.encode_batch(["!"])[0]  # without a padding token, ordinary text

    def short(model, params, ids, mask, *, max_new_tokens, **settings):
        written = np.concatenate([TOKENIZER.encode_batch(["x"])[0], [settings["eos_id"]]])
        return np.tile(np.concatenate([written, padding.repeat(8)]), (len(ids), 1))

    monkeypatch.setattr(samples, "generate", short)
    rows = held_out_rows(config(CausalLM()), prepared, 2)
    assert {sample.wrote for sample in continued(prepared, None, None, rows)} == {"x"}


def test_an_encoder_decoder_answers_held_out_rows(prepared, monkeypatch):
    asked = {}

    def echo(model, params, ids, mask, *, start_ids, **settings):
        asked.update(settings, start_ids=start_ids, ids=ids, mask=mask)
        return ids

    monkeypatch.setattr(samples, "generate_target", echo)
    rows = held_out_rows(config(SpanCorruption()), prepared, 2)
    found = answered(prepared, None, None, rows)
    assert asked["start_ids"] == [0] and asked["eos_id"] == 1
    for sample in found:
        assert sample.wrote == sample.given
        assert "<0xFF>" in sample.given and sample.truth.startswith("<0xFF>")


def test_sentinels_are_shown_by_name_and_the_same_bytes_elsewhere_are_text():
    ids = np.array([258, *TOKENIZER.encode_batch(["“so”"])[0], 257, 1, 0])
    assert readable_text(TOKENIZER, ids) == "<0xFF> “so” <0xFE>"


def test_a_sample_is_three_lines():
    assert format_written([Written("a", "b", "c")]) == "a\n    wrote: b\n    truth: c"
