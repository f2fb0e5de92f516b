"""Adapters in PEFT's format: written, read and merged, or refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.errors import UserError
from flax_transformers.huggingface.peft import write_adapter
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.pretrained import initial_model
from flax_transformers.testing import relative_difference
from tests.adapters.adapted_models import EVERYWHERE, adapted_model
from tests.families.tiny_bert import change_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(folder, architecture, lora=EVERYWHERE, **changes):
    """Saves a base and an adapter of it; returns the model and the parameters with adapters."""
    model, adapters, params = adapted_model(architecture, lora, **changes)
    ft.save_pretrained(folder / "base", model, base_of(params))
    (folder / "adapter").mkdir()
    boxed, _ = adapted_shapes(model, lora)
    base = str(folder / "base")
    write_adapter(folder / "adapter", base, model.config, boxed, adapters, params)
    return model, params


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_difference(a, b) < 1e-6


@pytest.mark.parametrize(
    "architecture",
    [
        "GPT2LMHeadModel",  # query, key and value in one matrix with inputs first
        "ModernBertForMaskedLM",
        pytest.param("LlamaForCausalLM", marks=pytest.mark.full),
        pytest.param("T5ForConditionalGeneration", marks=pytest.mark.full),
        pytest.param("RobertaForSequenceClassification", marks=pytest.mark.full),
    ],
)
def test_what_is_written_is_read_back_merged(tmp_path, architecture):
    model, params = save(tmp_path, architecture)
    found, theirs = ft.load_pretrained(tmp_path / "adapter")
    assert type(found) is type(model)
    assert_close(theirs, merged(params, EVERYWHERE.scale))


def test_one_part_of_a_fused_matrix_may_be_adapted_and_rslora_scales_by_the_root(tmp_path):
    lora = LoraConfig(rank=4, alpha=3.0, targets=("value", "query"), rslora=True)
    _, params = save(tmp_path, "GPT2LMHeadModel", lora)
    described = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert set(described["rank_pattern"].values()) == {8} and described["fan_in_fan_out"]
    assert_close(ft.load_pretrained(tmp_path / "adapter")[1], merged(params, lora.scale))


def test_names_and_shapes_are_those_of_peft(tmp_path):
    save(tmp_path, "BertForSequenceClassification", LoraConfig(rank=2), num_labels=3)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    query = "base_model.model.bert.encoder.layer.1.attention.self.query"
    assert tensors[f"{query}.lora_A.weight"].shape == (2, 32)
    assert tensors[f"{query}.lora_B.weight"].shape == (32, 2)
    assert tensors["base_model.model.classifier.weight"].shape == (3, 32)
    described = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert described["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert query.removeprefix("base_model.model.") in described["target_modules"]


def test_an_adapter_brings_its_head_to_a_base_without_one(tmp_path):
    lora = LoraConfig(rank=2)
    _, params = save(tmp_path, "BertForSequenceClassification", lora, num_labels=3)
    model, _, _ = adapted_model("BertForMaskedLM", lora)
    base = load_file(tmp_path / "base" / "model.safetensors")
    kept = {name: value for name, value in base.items() if ".encoder." in name or "embed" in name}
    save_file(kept, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    change_json(
        tmp_path / "base" / "config.json",
        architectures=["BertModel"], id2label=None, label2id=None,
    )  # fmt: skip
    found, theirs = ft.load_pretrained(tmp_path / "adapter")
    assert found.config.architecture == "BertForSequenceClassification"
    assert found.config.num_labels == 3 and type(found) is not type(model)
    assert_close(theirs, merged(params, lora.scale))


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_that_of_the_embedding_in_the_adapter(tmp_path, tied):
    lora = LoraConfig(rank=2)
    model, _ = save(tmp_path, "LlamaForCausalLM", lora, tie_embeddings=tied)
    size, width = model.config.vocab_size, model.config.hidden_size
    file, random = tmp_path / "adapter" / WEIGHTS, np.random.default_rng(0)
    tokens = random.standard_normal((size + 200, width)).astype(np.float32)
    head = tokens if tied else 2 * tokens
    saved = {"model.embed_tokens.weight": tokens, "lm_head.weight": head}
    saved = {f"base_model.model.{name}": value for name, value in saved.items()}
    save_file(load_file(file) | saved, file)
    found, params = ft.load_pretrained(tmp_path / "adapter")
    assert found.config.vocab_size == size + 200
    ft.save_pretrained(tmp_path / "merged", found, params)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], tokens)
    if not tied:
        np.testing.assert_array_equal(written["lm_head.weight"], head)


def test_the_base_is_taken_at_the_revision_that_the_adapter_names(tmp_path, monkeypatch):
    lora = LoraConfig(rank=2)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, adapters, params = adapted_model("BertModel", lora)
    entry = tmp_path / "cache" / "models--some--base"
    (entry / "refs").mkdir(parents=True)
    for name, scale in (("main", 2.0), ("v1", 1.0)):
        (entry / "refs" / name).write_text(f"commit-{name}")
        base = jax.tree.map(lambda leaf, scale=scale: scale * leaf, base_of(params))
        ft.save_pretrained(entry / "snapshots" / f"commit-{name}", model, base)
    (tmp_path / "adapter").mkdir()
    boxed, _ = adapted_shapes(model, lora)
    write_adapter(tmp_path / "adapter", "some/base@v1", model.config, boxed, adapters, params)
    described = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("some/base", "v1")
    assert_close(ft.load_pretrained(tmp_path / "adapter")[1], merged(params, lora.scale))


def test_alpha_is_that_of_the_module_and_the_rank_that_of_its_matrices(tmp_path):
    lora = LoraConfig(rank=2, alpha=8.0, targets=("query",))
    _, params = save(tmp_path, "BertModel", lora)
    file = tmp_path / "adapter" / CONFIG
    change_json(file, r=64, lora_alpha=5.0, alpha_pattern={"self.query": 8.0})
    assert_close(ft.load_pretrained(tmp_path / "adapter")[1], merged(params, lora.scale))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "merge it into its base by"),
        ({"init_lora_weights": "pissa"}, "merge it into its base by"),
        ({"peft_type": "LOHA"}, "holds an adapter (LOHA) and not the weights of a model"),
        ({"base_model_name_or_path": "not/here"}, "(base: not/here)"),
    ],
)
def test_what_only_peft_can_merge_is_refused_with_how(tmp_path, changes, message):
    save(tmp_path, "BertModel", LoraConfig(rank=2))
    change_json(tmp_path / "adapter" / CONFIG, **changes)
    with pytest.raises(UserError) as raised:
        ft.load_pretrained(tmp_path / "adapter")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "16"}, "has lora_alpha '16'; it must be a number"),
        ({"lora_alpha": float("nan")}, "has lora_alpha nan; it must be finite"),
        ({"lora_dropout": [0.1]}, "has lora_dropout [0.1]; it must be a number"),
        ({"alpha_pattern": {"query": 1e400}}, "has alpha_pattern.query inf; it must be finite"),
        ({"alpha_pattern": ["query"]}, "has alpha_pattern ['query']; it must be an object"),
        ({"alpha_pattern": {"que(ry": 2}}, "has the alpha_pattern 'que(ry': "),
        ({"auto_mapping": "Bert"}, "has auto_mapping 'Bert'; it must be an object"),
    ],
)
def test_fields_that_cannot_be_are_named(tmp_path, changes, message):
    save(tmp_path, "BertModel", LoraConfig(rank=2))
    change_json(tmp_path / "adapter" / CONFIG, **changes)
    with pytest.raises(UserError) as raised:
        ft.load_pretrained(tmp_path / "adapter")
    assert f"{CONFIG} {message}" in str(raised.value)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save(tmp_path, "BertModel", LoraConfig(rank=2))
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if "query.lora_A" in name)
    save_file(tensors | {name: np.zeros((2, 7), np.float32)}, file)
    with pytest.raises(UserError, match="of 32 outputs and 7 inputs, which do not fit it in"):
        ft.load_pretrained(tmp_path / "adapter")
    save_file({n.replace("query", "q_proj"): value for n, value in tensors.items()}, file)
    with pytest.raises(UserError, match="adapts encoder.layer.0.attention.self.q_proj, "):
        ft.load_pretrained(tmp_path / "adapter")


def test_an_adapter_with_dropout_is_read_but_starts_no_run(tmp_path):
    model, _ = save(tmp_path, "BertModel", LoraConfig(rank=2))
    change_json(tmp_path / "adapter" / CONFIG, lora_dropout=0.1)
    ft.load_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="was trained with lora_dropout 0.1"):
        initial_model(tmp_path / "adapter", model.config)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "ViTForImageClassification"])
def test_kernels_that_are_no_linear_layer_in_transformers_are_refused(tmp_path, architecture):
    with pytest.raises(UserError, match="write the merged weights, without --adapter-of"):
        save(tmp_path, architecture)
