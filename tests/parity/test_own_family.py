"""The family that ``examples/own_family.py`` adds from outside, against the original."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertForMaskedLM

import flax_transformers as ft
from flax_transformers import config_json
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family.py"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(config_json, "_families", dict(config_json._families))
    monkeypatch.setattr(config_json, "_registered", dict(config_json._registered))
    spec = importlib.util.spec_from_file_location("own_family", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_family", module)
    spec.loader.exec_module(module)
    return module


def test_the_family_of_the_example_equals_the_original(registered, tmp_path):
    torch.manual_seed(0)
    original = MegatronBertForMaskedLM(
        MegatronBertConfig(
            vocab_size=47, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=36, max_position_embeddings=16, type_vocab_size=3,
            layer_norm_eps=1e-3,
        )
    ).eval()  # fmt: skip
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)  # norms and biases too
    original.save_pretrained(tmp_path / "original")
    ids = np.random.default_rng(0).integers(1, 47, (3, 11))
    types = np.random.default_rng(1).integers(0, 3, (3, 11))
    mask = np.arange(11) < np.array([[11], [7], [4]])

    model, params = ft.load_pretrained(tmp_path / "original")
    assert type(model.config) is registered.MegatronBertConfig
    found = jax.jit(model.apply)(
        {"params": params}, input_ids=ids, token_type_ids=types, attention_mask=mask
    ).logits
    tensors = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.astype(int)}
    with torch.no_grad():
        expected = original(**{name: torch.tensor(each) for name, each in tensors.items()}).logits
    assert relative_difference(np.asarray(found)[mask], expected.numpy()[mask]) < TOLERANCE

    ft.save_pretrained(tmp_path / "ours", model, params)
    again, report = MegatronBertForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    after = again.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in original.state_dict().items())
