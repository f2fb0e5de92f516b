"""Tiny models with adapters that are not zero."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.adapters.lora import LoraConfig, is_adapter
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.testing import tiny_model


def adapted_model(architecture, lora, **changes):
    """A model, its adapters, and drawn parameters; the padded vocabulary is zero."""
    config = tiny_model(architecture)[0].config
    model = build_model(dataclasses.replace(config, **changes))
    boxed, adapters = adapted_shapes(model, lora)
    random = np.random.default_rng(0)

    def draw(name, shape):
        spread = 0.3 if is_adapter(name) else 0.2
        value = (random.standard_normal(shape.shape) * spread).astype(np.float32)
        size = getattr(model.config, "vocab_size", 0)
        for axis, length in enumerate(value.shape):
            if length == getattr(model.config, "padded_vocab_size", None) and length != size:
                value[(slice(None),) * axis + (slice(size, None),)] = 0
        return jnp.asarray(value)

    leaves = flatten_dict(nn.meta.unbox(boxed))
    params = unflatten_dict({name: draw(name, leaf) for name, leaf in leaves.items()})
    return model, adapters, params


EVERYWHERE = LoraConfig(rank=3, alpha=2.0, targets=("all-linear",))
