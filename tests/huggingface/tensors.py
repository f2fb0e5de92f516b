"""Whole models as nested dicts and as published tensors, where the package streams them."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.huggingface.weights import export_tensors, read_parameters
from flax_transformers.testing import tiny_architecture


def parameter_shapes(model):
    """The parameters of ``model`` as nested ``jax.ShapeDtypeStruct``; nothing is allocated."""
    return nn.meta.unbox(boxed_shapes(model))


def drawn_model(architecture, **changes):
    """The model of ``tiny_model`` and drawn parameters, for which nothing is compiled."""
    model = build_model(tiny_architecture(architecture, **changes))
    return model, drawn_parameters(model, parameter_shapes(model))


def drawn_parameters(model, shapes, spread=lambda name: 0.2):
    """Normal values of ``spread`` by name; rows that pad the vocabulary, which no file holds, are
    zero."""
    random = np.random.default_rng(0)
    size, padded = (getattr(model.config, f"{kind}vocab_size", 0) for kind in ("", "padded_"))

    def draw(name, shape):
        value = (random.standard_normal(shape.shape) * spread(name)).astype(np.float32)
        for axis, length in enumerate(value.shape):
            if length == padded != size:
                value[(slice(None),) * axis + (slice(size, None),)] = 0
        return jnp.asarray(value)

    leaves = flatten_dict(shapes)
    return unflatten_dict({name: draw(name, leaf) for name, leaf in leaves.items()})


def import_weights(table, tensors, params, vocab_size, **how):
    """The parameters of ``read_parameters`` as one nested dict of numpy arrays."""
    read = read_parameters(table, tensors, params, vocab_size, **how)
    return unflatten_dict(dict(read), sep="/")


def export_weights(table, params, vocab_size):
    """The published tensors, by name, without copies and without padded vocabulary rows."""
    return dict(export_tensors(table, params, vocab_size))
