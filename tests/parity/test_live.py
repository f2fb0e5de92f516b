"""Models against the originals, live and through files: needs torch and transformers.

``make parity`` runs this in an environment of its own. Every case of ``tests/golden`` is drawn and
saved by the original, read by ``load_pretrained``, compared, written by ``save_pretrained`` and
read by the original again.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
import torch
import transformers

import flax_transformers as ft
import tests.golden
from flax_transformers.huggingface.family import family_of
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE, first_of_each_by_default
from tests.golden.hub import Case, load_original, run_original

CASES = {
    f"{module.name}/{case.name}": case
    for module in pkgutil.iter_modules(tests.golden.__path__)
    for case in getattr(importlib.import_module(f"tests.golden.{module.name}"), "CASES", ())
    if isinstance(case, Case) and hasattr(transformers, case.config["architectures"][0])
}
EACH = pytest.mark.parametrize(
    "name",
    first_of_each_by_default({n: case.config["architectures"][0] for n, case in CASES.items()}),
)
AS_IN_USE = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    # Only the versions that tests/conftest.py switches it off for have it.
    **({"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}),
}
"""XLA's own settings, which tests/conftest.py changes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the original has saved, of a case by name."""

    @cache
    def saved(name):
        path = tmp_path_factory.mktemp("original")
        load_original(CASES[name], path, "float32")
        return path

    return saved


@EACH
def test_a_saved_original_gives_the_same_outputs_here(name, folder):
    case = CASES[name]
    model, params = ft.load_pretrained(folder(name))
    apply = partial(model.apply, {"params": params}, **case.extra)
    output = jax.jit(apply, compiler_options=AS_IN_USE)(**case.inputs)
    expected = run_original(case)
    for field in case.outputs:
        found = case.attended(field, np.asarray(getattr(output, field)))
        assert relative_difference(found, expected[field]) < TOLERANCE, field


@EACH
def test_what_is_saved_here_is_loaded_by_the_original_bit_for_bit(name, folder, tmp_path):
    model, params = ft.load_pretrained(folder(name))
    ft.save_pretrained(tmp_path / "ours", model, params)
    kind = getattr(transformers, CASES[name].config["architectures"][0])
    before = kind.from_pretrained(folder(name)).state_dict()
    loaded, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    after = loaded.state_dict()
    # Tables that the original computes, and tensors that it has and never looks at, are not kept.
    table = family_of(model.config).weights(model.config)
    unused = [re.escape(row.theirs) for row in table.weights if row.unused]
    needless = re.compile("|".join([*unused, *table.ignorable]) or "$^").fullmatch
    assert not report["unexpected_keys"]
    assert [key for key in report["missing_keys"] if not needless(key)] == []
    names = [key for key in before | after if not needless(key)]
    assert [key for key in names if not torch.equal(before[key], after[key])] == []
