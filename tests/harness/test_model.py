"""The model of the lm-evaluation-harness; tests/parity compares it with that of transformers."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

import flax_transformers as ft
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.generation_settings import GenerationSettings
from tests.cli.test_generate import TINY, counting_params, published_tokenizer


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
