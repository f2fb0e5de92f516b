"""config.json files of every family: fields of a wrong kind, and names that mean the same."""

from __future__ import annotations

import math

import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.family import all_families, config_json, family_of_json
from tests.families.tiny_bert import without

FAMILIES = pytest.mark.parametrize("family", all_families(), ids=lambda f: f.model_types[0])
NOT_READ = {"is_encoder_decoder", "embd_pdrop", "rope_parameters"}
"""Written for the original's sake; the last one would stand in for ``rope_theta``."""


def refused(family, described, field, value):
    """Whether a file with this field is refused by its name."""
    try:
        family.from_huggingface(described | {field: value})
    except UserError as error:
        return field in str(error) or repr(value) in str(error)
    return False


@FAMILIES
def test_what_is_neither_true_nor_false_is_refused_by_name(family):
    described = without(config_json(family.config()), *NOT_READ)
    switches = [name for name, value in described.items() if isinstance(value, bool)]
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
    numbers = [name for name, value in described.items() if type(value) in (int, float)]
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
