"""The model of the lm-evaluation-harness; tests/parity compares it with that of transformers."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.generation_settings import GenerationSettings
from tests.cli.test_generate import (
    TINY,
    counting_params,
    published_tokenizer,
    tokenizer_with_added_padding,
)


@pytest.fixture
def harness(monkeypatch):
    """The module, with the names that it takes of lm_eval, which is not installed."""
    names = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": SimpleNamespace},
        "lm_eval.api.model": {"LM": type("LM", (), {})},
        "lm_eval.api.registry": {"register_model": lambda name: lambda model: model},
        "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    name = "flax_transformers.harness.model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_texts_end_as_the_generation_config_and_the_task_say(harness, tmp_path):
    published_tokenizer(tmp_path / "tokenizer", special=["<s>", "</s>", "d"])

    def written(until, **settings):
        model = build_model(
            dataclasses.replace(TINY, generation=GenerationSettings(**settings)), ComputeConfig()
        )
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        tokenizer = tmp_path / "tokenizer"
        ft.save_pretrained(folder, model, counting_params(model), tokenizer_from=tokenizer)
        request = SimpleNamespace(args=("a", {"until": until, "max_gen_toks": 9}))
        return harness.HarnessModel(str(folder), batch_size=1).generate_until([request])

    assert written([]) == [" b c e"]
    assert written(["d"]) == [" b c"]
    assert written([], eos_token_id=(1, 4)) == [" b"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_scores_are_those_without_a_padding_token_that_the_model_lacks(harness, tmp_path):
    tokenizer_with_added_padding(tmp_path / "tokenizer")
    model = build_model(TINY, ComputeConfig())
    folder, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    ft.save_pretrained(folder, model, counting_params(model), tokenizer_from=tokenizer)
    assert ft.load_tokenizer(folder).vocabulary.pad_id == TINY.vocab_size
    loaded = harness.HarnessModel(str(folder), batch_size=2)
    requests = [SimpleNamespace(args=args) for args in (("a", " b"), ("a b", " c d e"))]
    found = [score for score, _ in loaded.loglikelihood(requests)]
    # The logit of the next word is sqrt(8), that of the others 0.
    one = np.sqrt(8) - np.log(np.exp(np.sqrt(8)) + TINY.vocab_size - 1)
    np.testing.assert_allclose(found, [one, 3 * one], rtol=1e-4)
