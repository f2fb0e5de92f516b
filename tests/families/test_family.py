"""Families found by name."""

from __future__ import annotations

import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.families.family import all_families, family_of, family_of_json


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
    with pytest.raises(UserError, match="'OPTForCausalLM'.*not supported.*BertForMaskedLM"):
        family_of_json({"architectures": ["OPTForCausalLM"], "model_type": "opt"})


def test_a_model_has_the_method_of_its_own_head_and_of_no_other():
    methods = {
        "SequenceClassification": "classify",
        "ImageClassification": "classify",
        "ImageClassificationWithTeacher": "classify",
        "TokenClassification": "tag",
        "QuestionAnswering": "answer_spans",
    }
    for family in all_families():
        for name, kind in family.config.architectures.items():
            wanted = {methods[head] for head in methods if name.endswith(f"For{head}")}
            assert {method for method in methods.values() if hasattr(kind, method)} == wanted, name
