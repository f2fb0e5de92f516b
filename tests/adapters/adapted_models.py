"""Tiny models with adapters that are not zero."""

from __future__ import annotations

import flax.linen as nn

from flax_transformers.adapters.lora import LoraConfig, is_adapter
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.testing import tiny_architecture
from tests.huggingface.tensors import drawn_parameters


def untrained(architecture, **changes):
    """A tiny model without parameters."""
    return build_model(tiny_architecture(architecture, **changes))


def adapted_model(architecture, lora, **changes):
    """A model, its adapters, and drawn parameters; the padded vocabulary is zero."""
    model = untrained(architecture, **changes)
    boxed, adapters = adapted_shapes(model, lora)
    shapes = nn.meta.unbox(boxed)
    params = drawn_parameters(model, shapes, lambda name: 0.3 if is_adapter(name) else 0.2)
    return model, adapters, params


EVERYWHERE = LoraConfig(rank=3, alpha=2.0, targets=("all-linear",))
