"""Every family compared with the original, by the goldens in tests/golden."""

from __future__ import annotations

import importlib

import pytest

from flax_transformers.huggingface.family import all_families
from tests.families.parity import (
    assert_parity,
    assert_weights_come_back,
    first_of_each_by_default,
)

PUBLISHED = [family for family in all_families() if family.model_types]
NAMES = [family.config.__module__.rpartition(".")[2] for family in PUBLISHED]
GOLDENS = {name: importlib.import_module(f"tests.golden.{name}") for name in NAMES}
CASES = {
    f"{name}/{case.name}": (case, golden.__file__)
    for name, golden in GOLDENS.items()
    for case in golden.CASES
}
FAMILIES = {name: name.partition("/")[0] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each_by_default(FAMILIES))
def test_outputs_are_those_of_the_original_and_weights_are_exported_unchanged(name):
    case, script = CASES[name]
    assert_parity(case, script)
    assert_weights_come_back(case)
