"""config.json files of every family: fields of a wrong kind, and names that mean the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import (
    all_families,
    config_json,
    family_of_architecture,
    family_of_json,
)
from tests.families.tiny_bert import without

PUBLISHED = [f for f in all_families() if f.model_types]
OF_TRANSFORMERS = [f for f in PUBLISHED if "architectures" in config_json(f.config())]
FAMILIES = pytest.mark.parametrize("family", OF_TRANSFORMERS, ids=lambda f: f.config.__name__)
NOT_READ = {"is_encoder_decoder", "embd_pdrop", "rope_parameters"}
"""Written for the original's sake; the last one would stand in for ``rope_theta``."""


def fields_of(described, kinds, place=()):
    """Paths of the fields of these types, those of the towers of CLIP included."""
    for name, value in described.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield from fields_of(value, kinds, (*place, name))
        elif place and name == "projection_dim":  # CLIPModel reads the one outside of the towers
            continue
        elif type(value) in kinds and name not in NOT_READ:
            yield (*place, name)


def refused(family, described, path, value):
    """Whether a file with this field is refused by its name."""

    def changed(node, first, *rest):
        return node | {first: changed(node[first], *rest) if rest else value}

    try:
        family.from_huggingface(changed(described, *path))
    except UserError as error:
        return path[-1] in str(error) or repr(value) in str(error)
    return False


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "ModernBertForMaskedLM", "CohereForCausalLM"]
)
def test_a_model_without_a_limit_of_positions_is_not_written(name):
    config = replace(family_of_architecture(name).config(), max_positions=None)
    with pytest.raises(UserError, match=f"max_positions is None, but .* of {name} needs .*; set "):
        config_json(config)


@FAMILIES
def test_what_is_neither_true_nor_false_is_refused_by_name(family):
    described = without(config_json(family.config()), *NOT_READ)
    switches = list(fields_of(described, (bool,)))
    accepted = [
        (name, value)
        for name in switches
        for value in ("no", 1, None)
        if not refused(family, described, name, value)
    ]
    assert accepted == []


@FAMILIES
def test_numbers_that_no_model_can_have_are_refused_by_name(family):
    described = without(config_json(family.config()), *NOT_READ)
    numbers = list(fields_of(described, (int, float)))
    accepted = [
        (name, value)
        for name in numbers
        for value in (math.nan, math.inf, -0.5, "1")
        if not refused(family, described, name, value)
    ]
    assert len(numbers) >= 8 and accepted == []


@pytest.mark.parametrize(
    ("architecture", "alias", "own"),
    [
        ("GPT2Model", "hidden_size", "n_embd"),
        ("BartModel", "num_hidden_layers", "encoder_layers"),
        ("MarianModel", "hidden_size", "d_model"),
        ("T5Model", "head_dim", "d_kv"),
        ("MixtralModel", "num_experts", "num_local_experts"),
    ],
)
def test_names_that_the_original_reads_as_well_mean_the_same(architecture, alias, own):
    described = {"architectures": [architecture]}
    read = family_of_json(described).from_huggingface
    assert read(described | {alias: 48}) == read(described | {own: 48}) != read(described)
    assert read(described | {alias: 48, own: 96}) == read(described | {own: 96})


@pytest.mark.parametrize(
    ("described", "labels", "names"),
    [
        ({"id2label": {"0": 1, "1": 2}}, 2, ("1", "2")),
        ({"id2label": {"1": "b", "0": "a"}}, 2, ("a", "b")),
        ({"id2label": {0: "a", 1: 2.5, 2: True}}, 3, ("a", "2.5", "True")),
        ({"id2label": {"0.0": "a", "1.0": "b"}}, 2, ("a", "b")),
        ({"id2label": ["a", "b", 3]}, 3, ("a", "b", "3")),
        ({"id2label": {"no": 0, "yes": "1"}}, 2, ("no", "yes")),
        ({"id2label": {"yes": 1, "no": 0}}, 2, ("no", "yes")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, 2, ()),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 5}, 2, ("a", "b")),
        ({"id2label": {}, "num_labels": 5}, 5, ()),
        ({"num_labels": 5}, 5, ()),
        # Without an order there are no names.
        ({"id2label": {"1": "a", "2": "b"}}, 2, ()),
        ({"id2label": {"0": None, "1": "b"}}, 2, ()),
        ({"id2label": {"a": "b"}}, 1, ()),
    ],
)
def test_labels_are_strings_whatever_the_file_says_they_are(described, labels, names):
    config = read_bert(described)
    assert (config.num_labels, config.label_names) == (labels, names)
    assert read_bert(json.loads(json.dumps(config_json(config)))) == config


@pytest.mark.parametrize("labels", [5, "no", True])
def test_what_is_no_record_of_labels_is_refused(labels):
    with pytest.raises(UserError, match="has id2label .*; it must give a name to each number from"):
        read_bert({"id2label": labels})


def read_bert(described):
    described = {"architectures": ["BertForSequenceClassification"]} | described
    return family_of_json(described).from_huggingface(described)
