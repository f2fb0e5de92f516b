"""Fields of a config.json that describe no layer: kept, refused, or named."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import config_json, family_of_json
from flax_transformers.huggingface.fields import kept_fields
from flax_transformers.huggingface.read import _read_config, directory_config
from tests.families.tiny_bert import make_model
from tests.huggingface.tensors import drawn_model

KEPT = {
    "problem_type": "multi_label_classification",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "finetuning_task": "mnli",
    "gradient_checkpointing": False,
    "use_cache": True,
    "transformers_version": "4.6.0.dev0",
    "output_past": True,
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "prefix": "translate: ",
}


def read_and_write(folder, **described):
    """The config.json that comes back for one of these fields."""
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").touch()  # whose tensors are not looked at
    _, own, _ = _read_config(folder, None, None)
    return config_json(own)


@pytest.mark.parametrize(
    "architecture",
    ["BertForSequenceClassification", "GPT2LMHeadModel", "BartForConditionalGeneration"],
)
def test_fields_that_describe_no_layer_come_back(tmp_path, architecture, caplog):
    written = read_and_write(tmp_path, architectures=[architecture], **KEPT)
    assert {name: written[name] for name in KEPT} == KEPT
    assert not caplog.text


@pytest.mark.parametrize(
    "architecture",
    [
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "ModernBertForSequenceClassification",
        "GPT2ForSequenceClassification",
        "LlamaForSequenceClassification",
        "MistralForSequenceClassification",
        "GemmaForSequenceClassification",
        "BartForSequenceClassification",
        "T5ForSequenceClassification",
        "ViTForImageClassification",
        "DeiTForImageClassification",
    ],
)
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_type_of_a_problem_is_kept_in_every_family(tmp_path, architecture, kind):
    described = {"architectures": [architecture], "problem_type": kind}
    assert read_and_write(tmp_path, **described)["problem_type"] == kind
    family = family_of_json(described)
    assert family.from_huggingface(described).problem_type == kind
    del described["problem_type"]
    assert "problem_type" not in family.to_huggingface(family.from_huggingface(described))


def test_another_type_of_problem_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"problem_type 'ranking'; it must be one of regression, "):
        read_and_write(tmp_path, architectures=["BertModel"], problem_type="ranking")


def test_fields_that_are_not_known_are_kept_and_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        written = read_and_write(
            tmp_path, architectures=["BertModel"], logit_softcap=30.0, _other={"a": [1]}
        )
    assert written["logit_softcap"] == 30.0 and written["_other"] == {"a": [1]}
    assert "fields that are not known here: _other, logit_softcap;" in caplog.text


def test_a_second_name_follows_the_field_that_it_stands_for(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["GPT2LMHeadModel"], "n_layer": 3, "num_hidden_layers": 12})
    )
    (tmp_path / "model.safetensors").touch()
    _, own, _ = _read_config(tmp_path, None, None)
    assert own.num_layers == 3
    assert config_json(own)["num_hidden_layers"] == 3


def test_removed_heads_are_refused():
    with pytest.raises(UserError, match=r"pruned_heads \{'0': \[1\]\}, and models with some"):
        kept_fields({"pruned_heads": {"0": [1]}}, {}, {})
    assert kept_fields({"pruned_heads": {}}, {}, {}) == (("pruned_heads", "{}"),)


def test_another_number_of_labels_is_said_everywhere(tmp_path):
    model, params = make_model(architecture="BertForSequenceClassification", num_labels=3)
    save_pretrained(tmp_path / "three", model, params)
    file = tmp_path / "three" / "config.json"
    described = json.loads(file.read_text()) | {"_num_labels": 3, "torch_dtype": "float16"}
    file.write_text(json.dumps(described))
    save_pretrained(tmp_path / "four", *load_pretrained(tmp_path / "three", num_labels=4))
    written = json.loads((tmp_path / "four" / "config.json").read_text())
    assert written["_num_labels"] == 4 and len(written["id2label"]) == 4
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert load_file(tmp_path / "four" / "model.safetensors")["classifier.bias"].shape == (4,)


@pytest.mark.parametrize("architecture", ["CLIPModel", "SiglipModel"])
def test_a_number_of_labels_comes_back_of_a_model_without_labels(tmp_path, architecture):
    written = read_and_write(tmp_path, architectures=[architecture], num_labels=2)
    assert written["num_labels"] == 2 and "id2label" not in written


def test_numbers_of_labels_that_are_strings_are_kept_only_with_their_labels(tmp_path):
    names = {"0": "cat", "1": "dog"}
    strings = {"cat": "0", "dog": "1"}  # as scripts of transformers write them
    written = read_and_write(
        tmp_path, architectures=["ViTForImageClassification"], id2label=names, label2id=strings
    )
    assert written["id2label"] == names and written["label2id"] == strings
    _, own, _ = _read_config(tmp_path, None, None)
    for others in (("dog", "cat"), ("oak", "elm"), ("oak", "elm", "fir")):
        changed = dataclasses.replace(own, num_labels=len(others), label_names=others)
        assert config_json(changed)["label2id"] == {name: i for i, name in enumerate(others)}
        assert list(config_json(changed)["id2label"].values()) == list(others)


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("BertForMaskedLM", {"layer_norm_eps": 1e30}, "has layer_norm_eps 1e.30; it must be in"),
        ("GPT2LMHeadModel", {"bos_token_id": "x"}, "has bos_token_id 'x'; it must be a whole"),
        ("MarianMTModel", {"decoder_start_token_id": -3}, "has decoder_start_token_id -3; it"),
        ("BertForMaskedLM", {"hidden_act": ["gelu"]}, "has hidden_act of a kind that cannot be re"),
        ("LlamaForCausalLM", {"rope_scaling": 0.5}, "has rope_scaling of a kind that cannot be re"),
        (
            "CLIPModel",
            {"vision_config": {"layer_norm_eps": 1e-5, "num_attention_heads": 0}},
            r"num_heads is 0; it must be at least 1; look at its field vision_config.num_attent",
        ),
        ("GPT2LMHeadModel", {"n_layer": -1}, "has n_layer -1; it must be at least 0$"),
        # which no list is made for
        ("Gemma2ForCausalLM", {"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000; it"),
        ("ModernBertModel", {"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000; it"),
    ],
)
def test_a_field_that_cannot_be_read_is_named_as_the_file_does(
    tmp_path, architecture, fields, said
):
    described = {"architectures": [architecture]} | fields
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=said):
        directory_config(tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_decoder_that_attends_both_ways_is_refused(tmp_path, architecture):
    save_pretrained(tmp_path, *drawn_model(architecture))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": False}))
    with pytest.raises(UserError, match="is_causal false, which makes a decoder attend both ways"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "written"), [("Olmo2ForCausalLM", None), ("ModernBertForMaskedLM", 0)]
)
def test_padding_beyond_the_vocabulary_is_not_written(tmp_path, architecture, written):
    model, params = drawn_model(architecture, pad_id=50_000)
    assert model.config.filler_id == 0
    save_pretrained(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == written


@pytest.mark.parametrize(
    "architecture",
    [
        "BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM", "AlbertForMaskedLM",
        "DistilBertForMaskedLM", "ModernBertForMaskedLM", "DebertaV2ForMaskedLM", "GPT2LMHeadModel",
        "LlamaForCausalLM",
    ],
)  # fmt: skip
def test_a_classifier_starts_from_a_model_whose_head_is_not_tied(tmp_path, architecture):
    model, params = drawn_model(architecture, tie_embeddings=False)
    save_pretrained(tmp_path, model, params)
    wanted = architecture.partition("For")[0].partition("LMHead")[0] + "ForSequenceClassification"
    _, found = load_pretrained(tmp_path, architecture=wanted, num_labels=3)
    size = model.config.vocab_size  # without padding
    np.testing.assert_array_equal(
        found["words"]["embedding"][:size], params["words"]["embedding"][:size]
    )


def test_layers_that_share_their_tensors_can_be_more_than_these(tmp_path):
    model, params = drawn_model("AlbertForMaskedLM", num_layers=64)
    save_pretrained(tmp_path, model, params)
    assert load_pretrained(tmp_path)[0].config.num_layers == 64


@pytest.mark.parametrize("architecture", ["BertForTokenClassification", "BertForMaskedLM"])
def test_the_pooling_of_the_encoder_that_a_tagger_began_as_is_not_written(tmp_path, architecture):
    of_encoder = {"pooling": "mean", "normalize_embeddings": True}
    save_pretrained(tmp_path, *drawn_model(architecture, **of_encoder))
    found = load_pretrained(tmp_path)[0].config
    assert (found.pooling, found.normalize_embeddings) == ("cls", None)
    classifier = drawn_model("BertForSequenceClassification", **of_encoder)
    with pytest.raises(UserError, match="pooling is 'mean', which BertForSequenceClassification"):
        save_pretrained(tmp_path / "b", *classifier)


def test_models_of_timm_get_another_number_of_labels(tmp_path):
    model, params = drawn_model("DeiT3ForImageClassification", num_labels=5)
    save_pretrained(tmp_path, model, params)
    found, read = load_pretrained(tmp_path, num_labels=3)
    assert found.config.num_labels == 3
    assert read["classification_head"]["kernel"].shape[-1] == 3
