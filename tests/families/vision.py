"""What the tests of vision families share."""

from __future__ import annotations

import math

from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.weights import (
    tensor_shapes,
)
from flax_transformers.models.config import ComputeConfig
from tests.huggingface.tensors import parameter_shapes


def published_count(config, weights):
    """The number of parameters in published tensors; nothing is allocated."""
    model = build_model(config, ComputeConfig())
    shapes = parameter_shapes(model)
    return sum(math.prod(shape) for shape in tensor_shapes(weights(config), shapes, 0).values())


def without_prefix(tensors, prefix):
    """The tensors of a file that was saved from the model without its head."""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
