"""Sentence encoders: the files of sentence-transformers, and pooling by the mean of the tokens."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import jax
import numpy as np
import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.adapters.lora import LoraConfig, base_of
from flax_transformers.errors import UserError
from flax_transformers.huggingface.peft import write_adapter
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.huggingface.read import directory_config
from flax_transformers.huggingface.sentence_transformers import (
    carried_modules,
    sentence_length,
    sentence_limit,
    vector_length_is_one,
)
from flax_transformers.models.config import Rope
from flax_transformers.testing import tiny_architecture, tiny_bert
from tests.adapters.adapted_models import adapted_model
from tests.families.tiny_bert import make_model
from tests.huggingface.tensors import drawn_model

IDS = np.array([[3, 4, 5, 6], [7, 8, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32)


def published(folder, modes=("mean_tokens",), modules=("Normalize",)):
    """A folder as sentence-transformers publishes it."""
    save_pretrained(folder, *make_model(architecture="BertModel"))
    steps = ["Transformer", "Pooling", *modules]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": f"{i}_{step}" if i else "",
                    "type": f"sentence_transformers.models.{step}",
                }
                for i, step in enumerate(steps)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{mode}": True for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 8, "pooling_mode_max_tokens": False} | flags)
    )
    return folder


def embed(folder, ids=IDS, mask=MASK):
    model, params = load_pretrained(folder)
    output = jax.jit(model.apply)({"params": params}, ids, mask)
    return np.asarray(output.sentence_embedding), np.asarray(output.last_hidden_state)


def test_an_embedding_is_the_normalised_mean_of_the_tokens(tmp_path):
    found, hidden = embed(published(tmp_path / "a"))
    means = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_first_token_and_no_normalisation_are_obeyed_too(tmp_path):
    found, hidden = embed(published(tmp_path / "a", modes=("cls_token",), modules=()))
    np.testing.assert_allclose(found, hidden[:, 0], rtol=1e-6)


def test_the_newer_spelling_is_read(tmp_path):
    folder = published(tmp_path / "a")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert load_pretrained(folder)[0].config.pooling == "cls"
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["mean"]}')
    assert load_pretrained(folder)[0].config.pooling == "mean"


@pytest.mark.parametrize("modules", [(), ("Normalize",)])
@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens"])
def test_the_files_come_back(tmp_path, mode, modules):
    folder = published(tmp_path / "a", modes=(mode,), modules=modules)
    save_pretrained(tmp_path / "b", *load_pretrained(folder))
    assert json.loads((tmp_path / "b" / "modules.json").read_text()) == json.loads(
        (folder / "modules.json").read_text()
    )
    pooling = json.loads((tmp_path / "b" / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == [f"pooling_mode_{mode}"]
    limit = json.loads((tmp_path / "b" / "sentence_bert_config.json").read_text())
    assert limit == {"max_seq_length": 16, "do_lower_case": False}
    assert load_pretrained(tmp_path / "b")[0].config == load_pretrained(folder)[0].config


def test_scaled_positions_do_not_change_the_written_sentence_length(tmp_path):
    config = load_pretrained(published(tmp_path / "a"))[0].config
    rope = Rope(scaling="linear", factor=4.0)
    scaled = dataclasses.replace(config, positions="none", rope=rope)
    (limit,) = sentence_limit(scaled, {}).values()
    assert limit == {"max_seq_length": 16, "do_lower_case": False}


def test_a_model_that_is_no_sentence_encoder_has_no_such_files(tmp_path):
    save_pretrained(tmp_path / "a", *make_model(architecture="BertModel"))
    assert not (tmp_path / "a" / "modules.json").exists()
    model, params = load_pretrained(tmp_path / "a")
    output = jax.eval_shape(model.apply, {"params": params}, IDS, MASK)
    assert output.sentence_embedding is None


def test_a_classifier_on_a_sentence_encoder_pools_as_it_does(tmp_path):
    folder = published(tmp_path / "a")
    model, params = load_pretrained(
        folder, architecture="BertForSequenceClassification", num_labels=3
    )
    assert "pooler" not in params and model.config.pooling == "mean"
    output = jax.jit(model.apply)({"params": params}, IDS, MASK)
    hidden, logits = output.last_hidden_state, output.logits
    means = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    head = jax.device_get(params["classification_head"])
    np.testing.assert_allclose(logits, means @ head["kernel"] + head["bias"], atol=1e-5)
    short = jax.jit(model.apply)({"params": params}, IDS[1:, :2]).logits
    np.testing.assert_allclose(logits[1:], short, atol=1e-5)


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (("max_tokens",), "asks for pooling_mode_max_tokens, which is not supported"),
        (("mean_tokens", "cls_token"), "asks for cls and mean, which is not supported"),
        ((), "asks for no pooling"),
    ],
)
def test_another_pooling_is_refused(tmp_path, modes, said):
    with pytest.raises(UserError, match=rf"1_Pooling/config.json {said}"):
        load_pretrained(published(tmp_path / "a", modes=modes))


def test_modules_that_are_not_read_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        load_pretrained(published(tmp_path / "a", modules=("Dense",)))
    assert "modules.json has modules that are not read: Dense;" in caplog.text


def test_a_link_to_nothing_is_no_missing_file(tmp_path):
    folder = published(tmp_path / "a")
    (folder / "modules.json").unlink()
    (folder / "modules.json").symlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(UserError, match=r"modules\.json is a link to nothing; copy the folder"):
        load_pretrained(folder)


def test_the_vectors_of_any_folder_are_normalised_and_another_pooling_is_named(tmp_path, caplog):
    folder, named = published(tmp_path / "a", modules=("Dense", "Normalize")), tiny_bert()
    encoder = dataclasses.replace(named, pooling="mean", normalize_embeddings=False)
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        assert not vector_length_is_one(folder, encoder, "mean")
        assert not vector_length_is_one(None, named, "cls")
    assert not caplog.text
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        assert not vector_length_is_one(None, encoder, "cls")
        assert "pooled by mean; --pool cls gives other vectors" in caplog.text
        # What has no such fields, as a T5 or a decoder.
        assert vector_length_is_one(folder, tiny_architecture("T5ForConditionalGeneration"), "mean")
        assert "modules that are not read: Dense" in caplog.text
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
        decoder = tiny_architecture("Qwen3ForCausalLM")
        assert vector_length_is_one(folder, decoder, "mean")
        assert "pooled by pooling_mode_lasttoken; --pool mean gives other" in caplog.text


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_the_length_of_sentences_is_read_and_what_is_not_done_is_named(tmp_path, caplog, name):
    folder = published(tmp_path / "a")
    assert sentence_length(folder) is None
    (folder / name).write_text('{"max_seq_length": 5, "do_lower_case": true}')
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "Search: "}, "default_prompt_name": "query"}'
    )
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        assert sentence_length(folder) == 5
    assert "asks for lower case" in caplog.text and "asks for the prompt 'Search: '" in caplog.text
    (folder / name).write_text('{"max_seq_length": 0}')
    with pytest.raises(UserError, match=rf"{name} has max_seq_length 0; it must be at least 1"):
        sentence_length(folder)


def test_the_pooling_beside_an_adapter_is_that_of_its_model(tmp_path):
    model, adapters, params = adapted_model("BertModel", LoraConfig(rank=2))
    save_pretrained(tmp_path / "base", model, base_of(params))
    folder = published(tmp_path / "adapter")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    boxed, _ = adapted_shapes(model, LoraConfig(rank=2))
    write_adapter(folder, str(tmp_path / "base"), model.config, boxed, adapters, params)
    for config in (load_pretrained(folder)[0].config, directory_config(folder)):
        assert (config.pooling, config.normalize_embeddings) == ("mean", True)
    for name in ("modules.json", "1_Pooling"):
        (folder / name).rename(tmp_path / "base" / name)
    assert load_pretrained(folder)[0].config.pooling == "mean"


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "T5EncoderModel"])
def test_the_modules_of_what_has_no_pooling_in_its_config_are_copied(
    tmp_path, caplog, architecture
):
    source = published(tmp_path / "a", modes=("lasttoken",), modules=("Dense", "Normalize"))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    drawn = drawn_model(architecture)
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        save_pretrained(tmp_path / "without", *drawn, tokenizer_from=source)
    assert "its module Dense lacks its config.json or its weights; copy the mod" in caplog.text
    assert not (tmp_path / "without" / "modules.json").exists()
    (source / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    save_pretrained(tmp_path / "b", *drawn, tokenizer_from=source)
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("number", "changes", "fault"),
    [
        (
            0,
            {"type": "sentence_transformers.models.CLIPModel", "path": "0_CLIP"},
            "is no Transformer",
        ),
        (0, {"path": "0_Transformer"}, "is no Transformer"),
        (1, {"path": ".."}, r"is in '\.\.'"),
        (1, {"path": "."}, r"is in '\.'"),
    ],
)
def test_whole_models_and_files_elsewhere_are_not_copied(tmp_path, caplog, number, changes, fault):
    source = published(tmp_path / "all" / "a")
    for folder in (source / "0_CLIP", source.parent):
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("{}")
    modules = json.loads((source / "modules.json").read_text())
    modules[number] |= changes
    (source / "modules.json").write_text(json.dumps(modules))
    config = tiny_architecture("CLIPModel")
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        assert carried_modules(source, config) == {}
    assert re.search(f"module .*{fault}.*; copy the modules yourself", caplog.text)
    (source / "modules.json").write_text("[]")
    assert carried_modules(source, config) == {}


def test_modules_are_not_copied_beside_a_head_of_labels_or_a_config_with_a_pooling(tmp_path):
    source = published(tmp_path / "a")
    for architecture in ("Qwen3ForSequenceClassification", "BertForMaskedLM"):
        save_pretrained(tmp_path / architecture, *drawn_model(architecture), tokenizer_from=source)
        assert not (tmp_path / architecture / "modules.json").exists()


def test_a_classifier_of_means_is_none_of_transformers(tmp_path):
    model, params = make_model(
        architecture="BertForSequenceClassification", pooling="mean", num_labels=2
    )
    said = r"model.pooling is 'mean', which BertForSequenceClass.*\(--architecture BertModel\)"
    with pytest.raises(UserError, match=said):
        save_pretrained(tmp_path / "a", model, params)
    assert jax.tree.leaves(params)
