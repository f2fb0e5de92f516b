"""Our side of the comparisons in ``tests/golden``."""

from __future__ import annotations

import math
from functools import partial

import jax
import numpy as np
import pytest

from flax_transformers.huggingface.family import build_model, family_of, family_of_json
from flax_transformers.huggingface.weights import (
    tensor_shapes,
)
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import relative_difference
from tests.golden.draw import draw_weights
from tests.golden.hub import Case, read_golden
from tests.huggingface.tensors import export_weights, import_weights, parameter_shapes

TOLERANCE = 1e-5


def first_by_default(values):
    """Parameters of a test: the first one by default, the others in `make test-full` only."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.full) for value in others)]


def some_by_default(values, some):
    """Parameters of a test: ``some`` of the values by default, the others in `make test-full`."""
    values = list(values)
    assert all(value in values for value in some)
    return [
        value if value in some else pytest.param(value, marks=pytest.mark.full) for value in values
    ]


def first_of_each_by_default(kinds):
    """Keys of ``kinds`` as parameters of a test: the first of each kind by default, the others in
    `make test-full` only."""
    names, values = list(kinds), list(kinds.values())
    return [
        pytest.param(name, marks=[pytest.mark.full] * (kind in values[:number]))
        for number, (name, kind) in enumerate(zip(names, values, strict=True))
    ]


_built: dict[tuple, tuple] = {}


def built_case(case: Case, **compute):
    """(config, model, shapes of parameters, weight table) of a case, traced once in a process.

    ``compute`` sets fields of ``ComputeConfig``.
    """
    key = (id(case), *sorted(compute.items()))
    if key not in _built:
        family = family_of_json(case.config)
        config = family.from_huggingface(case.config)
        model = build_model(config, ComputeConfig(**compute))
        shapes = parameter_shapes(model)
        # The case is kept as well, so that its id remains its own.
        _built[key] = case, config, model, shapes, family.weights(config)
    return _built[key][1:]


def load_case(case: Case, **compute):
    """(config, model, params, weight table) of a case, with the weights drawn for it."""
    config, model, shapes, table = built_case(case, **compute)
    params = import_weights(table, drawn_tensors(case), shapes, getattr(config, "vocab_size", 0))
    return config, model, params, table


def assert_parity(case: Case, script: str, **compute) -> None:
    """The forward pass of a case is that of the original, at all attended positions."""
    _, model, params, _ = load_case(case, **compute)
    output = jax.jit(partial(model.apply, **case.extra))({"params": params}, **case.inputs)
    expected = read_golden(script, case)
    for name in case.outputs:
        found = case.attended(name, np.asarray(getattr(output, name)))
        assert found.shape == expected[name].shape
        difference = relative_difference(found, expected[name])
        assert difference < TOLERANCE, f"{case.name}: {name} differs by {difference:.1e}"


def drawn_tensors(case: Case) -> dict[str, np.ndarray]:
    """The tensors of a case by their published names, as a freshly saved file holds them."""
    config, _, shapes, table = built_case(case)
    tensors = tensor_shapes(table, shapes, getattr(config, "vocab_size", 0))
    return draw_weights(tensors, case.name)


def import_case(case: Case, tensors):
    """The parameters of a case from ``tensors``, in whatever layout these come."""
    config, _, shapes, table = built_case(case)
    return import_weights(table, tensors, shapes, getattr(config, "vocab_size", 0))


def assert_weights_come_back(case: Case) -> None:
    """Exported tensors are bit-equal to the imported ones."""
    config, _, params, table = load_case(case)
    exported = export_weights(table, params, getattr(config, "vocab_size", 0))
    unused = {weight.theirs for weight in table.weights if weight.unused}
    drawn = drawn_tensors(case)
    assert exported.keys() == drawn.keys()
    for name in exported.keys() - unused:
        np.testing.assert_array_equal(exported[name], drawn[name], strict=True)


def count_parameters(config) -> int:
    """Published number of parameters of a config; nothing is allocated."""
    family, model = family_of(config), build_model(config, ComputeConfig())
    shapes = parameter_shapes(model)
    tensors = tensor_shapes(family.weights(config), shapes, getattr(config, "vocab_size", 0))
    return sum(math.prod(shape) for shape in tensors.values())
