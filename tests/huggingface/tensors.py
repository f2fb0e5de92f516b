"""Whole models as nested dicts and as published tensors, where the package streams them."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax.traverse_util import unflatten_dict

from flax_transformers.huggingface.weights import export_tensors, read_parameters


def parameter_shapes(model, *inputs):
    """The parameters of ``model`` as nested ``jax.ShapeDtypeStruct``; nothing is allocated."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return nn.meta.unbox(boxed)


def import_weights(table, tensors, params, vocab_size, **how):
    """The parameters of ``read_parameters`` as one nested dict of numpy arrays."""
    read = read_parameters(table, tensors, params, vocab_size, **how)
    return unflatten_dict(dict(read), sep="/")


def export_weights(table, params, vocab_size):
    """The published tensors, by name, without copies and without padded vocabulary rows."""
    return dict(export_tensors(table, params, vocab_size))
