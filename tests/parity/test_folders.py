"""Folders as people have them, written by the original: read here with the original's outputs."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import flax_transformers as ft
from flax_transformers.testing import relative_difference

IDS = np.array([[2, 5, 9, 3], [7, 8, 30, 4]], np.int32)
SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def edit(folder, **changes):
    """Changes fields of a config.json; those that become None are left out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: v for name, v in content.items() if v is not None}))


def assert_same_outputs(original, folder, field, **how):
    model, params = ft.load_pretrained(folder, **how)
    with jax.default_matmul_precision("highest"):
        ours = getattr(jax.jit(model.apply)({"params": params}, IDS), field)
    with torch.no_grad():
        theirs = original.eval()(torch.tensor(IDS, dtype=torch.long))[field].numpy()
    assert relative_difference(ours, theirs) < 1e-5


def test_a_config_of_2019_is_read_as_what_the_caller_says(tmp_path):
    original = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    original.save_pretrained(tmp_path)
    edit(tmp_path, model_type=None, architectures=None)
    assert_same_outputs(original, tmp_path, "logits", architecture="BertForMaskedLM")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.BertModel, transformers.BertConfig),
        (transformers.RobertaModel, transformers.RobertaConfig),
    ],
)
def test_an_encoder_without_pooler_has_the_originals_hidden_states(tmp_path, kind, config):
    original = kind(config(**SMALL), add_pooling_layer=False)
    original.save_pretrained(tmp_path)
    assert_same_outputs(original, tmp_path, "last_hidden_state")


def test_the_first_spelling_of_llama_is_read(tmp_path):
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    original.save_pretrained(tmp_path)
    edit(tmp_path, architectures=["LLaMAForCausalLM"])
    assert_same_outputs(original, tmp_path, "logits")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "state_dict.net."])
def test_weights_under_the_names_of_a_wrapper_are_read(tmp_path, wrapper):
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    original.save_pretrained(tmp_path)
    tensors = {wrapper + name: t.contiguous() for name, t in original.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_outputs(original, tmp_path, "logits")


def test_a_head_that_is_not_here_is_read_as_another_of_its_family(tmp_path):
    original = transformers.BertForMultipleChoice(transformers.BertConfig(**SMALL))
    original.save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertForRelations"])
    assert_same_outputs(original.bert, tmp_path, "last_hidden_state", architecture="BertModel")


def test_labels_that_are_numbers_are_read_as_the_original_does(tmp_path):
    config = transformers.BertConfig(**SMALL)
    original = transformers.BertForSequenceClassification(config)
    original.save_pretrained(tmp_path)
    edit(tmp_path, id2label={"0": 1, "1": 5}, label2id={"1": 0, "5": 1})
    assert_same_outputs(original, tmp_path, "logits")
    assert ft.load_pretrained(tmp_path)[0].config.label_names == ("1", "5")
