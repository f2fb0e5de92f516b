"""Families found by name."""

from __future__ import annotations

import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import all_families, family_of, family_of_json, identify


def test_published_sizes_have_names_of_their_own():
    sizes = ft.published_sizes()
    assert len(sizes) == sum(len(family.sizes) for family in all_families())
    assert sizes["bert-base"].num_layers == 12
    assert sizes["t5-v1_1-xl"].hidden_size == 2048
    assert sizes["vit-l16"].patch_size == 16


def test_every_size_is_of_its_family_and_every_architecture_of_one_alone():
    for family in all_families():
        assert all(family_of(config) is family for config in family.sizes.values())
    names = [name for family in all_families() for name in family.architectures]
    assert len(names) == len(set(names))


def test_an_architecture_that_is_not_supported_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="'OPTForCausalLM'.*not supported.* bert, .*LlamaForC"):
        family_of_json({"architectures": ["OPTForCausalLM"], "model_type": "opt"})


def test_a_model_has_the_method_of_its_own_head_and_of_no_other():
    methods = {
        "SequenceClassification": "classify",
        "ImageClassification": "classify",
        "VideoClassification": "classify",
        "ImageClassificationWithTeacher": "classify",
        "TokenClassification": "tag",
        "QuestionAnswering": "answer_spans",
        "MultipleChoice": "choose",
    }
    for family in all_families():
        for name, kind in family.architectures.items():
            wanted = {methods[head] for head in methods if name.endswith(f"For{head}")}
            if name == "MultimodalMaeForClassification":
                wanted = {"classify"}
            assert {method for method in methods.values() if hasattr(kind, method)} == wanted, name


@pytest.mark.parametrize(
    ("described", "asked", "expected"),
    [
        # The argument comes first,
        ({}, "BertForMaskedLM", ("BertForMaskedLM", "bert")),
        ({}, "XLMRobertaModel", ("XLMRobertaModel", "xlm-roberta")),
        ({"architectures": ["BertForChat"]}, "BertModel", ("BertModel", "bert")),
        ({"model_type": "camembert"}, "RobertaModel", ("RobertaModel", "roberta")),
        ({"model_type": "bert"}, "BertModel", ("BertModel", "bert")),
        (
            {"model_type": "xlm-roberta", "architectures": ["RobertaForMaskedLM"]},
            "XLMRobertaForMaskedLM",
            ("XLMRobertaForMaskedLM", "xlm-roberta"),
        ),
        # then the first architecture that is known, under any of its names,
        ({"architectures": ["LLaMAForCausalLM"]}, None, ("LlamaForCausalLM", "llama")),
        ({"architectures": ["TFBertForMaskedLM"]}, None, ("BertForMaskedLM", "bert")),
        ({"architectures": ["FlaxGPT2LMHeadModel"]}, None, ("GPT2LMHeadModel", "gpt2")),
        ({"architectures": ["T5WithLMHeadModel"]}, None, ("T5ForConditionalGeneration", "t5")),
        ({"architectures": ["MyBert", "BertModel"]}, None, ("BertModel", "bert")),
        # and of one family the type of the model,
        (
            {"model_type": "mt5", "architectures": ["T5ForConditionalGeneration"]},
            None,
            ("MT5ForConditionalGeneration", "mt5"),
        ),
        (
            {"model_type": "xlm-roberta", "architectures": ["RobertaForMaskedLM"]},
            None,
            ("XLMRobertaForMaskedLM", "xlm-roberta"),
        ),
        # then the model type.
        ({"model_type": "umt5"}, None, ("UMT5ForConditionalGeneration", "umt5")),
        ({"model_type": "mbart"}, None, ("MBartForConditionalGeneration", "mbart")),
        ({"model_type": "gpt2", "architectures": []}, None, ("GPT2LMHeadModel", "gpt2")),
    ],
)
def test_the_caller_decides_then_the_architectures_then_the_model_type(described, asked, expected):
    found = identify(described, asked)
    assert (found.wanted["architectures"][0], found.wanted["model_type"]) == expected
    assert found.family.from_huggingface(found.wanted).architecture == expected[0]


@pytest.mark.parametrize(
    ("described", "asked", "said"),
    [
        ({}, None, r'neither "architectures" nor "model_type"; add a line .*"architectures": \["B'),
        (
            {"model_type": "opt"},
            None,
            r"model_type 'opt', which is not supported; .* bert, clip, clip_text_model",
        ),
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
            None,
            "'Phi3ForCausalLM' .*model types are albert, .* vit.* renamed Llama, give archit",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForRelations"]},
            None,
            "'BertForRelations'.*as another bert model, give architecture= .*one of BertForM",
        ),
        ({"model_type": "bert", "architectures": ["GPT2Model"]}, None, "does not go with .*'GPT2M"),
        (
            {"model_type": "bert"},
            "GPT2Model",
            "'GPT2Model' is not one of this family; .* BertModel",
        ),
        ({"architectures": ["MBartModel"]}, "BartModel", "'BartModel' is not one .* MBartModel$"),
        ({}, "OPTModel", "'OPTModel' is not supported; choose among .*BertForMaskedLM"),
        ({"architectures": "BertModel"}, None, "architectures 'BertModel'; it must be a list"),
        ({"architectures": [5]}, "BertModel", r"architectures \[5\]; it must be a list of names"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_what_to_add(described, asked, said):
    with pytest.raises(UserError, match=said):
        identify(described, asked)
