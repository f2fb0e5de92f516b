"""A tiny BERT to save, and ways to change what was saved."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from flax_transformers.families.bert import BertConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from tests.huggingface.tensors import parameter_shapes

CONFIG = BertConfig(
    architecture="BertForMaskedLM",
    vocab_size=37,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    intermediate_size=12,
    max_positions=16,
)
IDS = np.array([[2, 5, 9, 3], [2, 7, 3, 0]], np.int32)


def make_model(**changes):
    """A model and random parameters; what no file holds (padded vocabulary) is zero."""
    model, params = _made(**changes)
    return model, jax.tree.map(lambda leaf: leaf, params)  # a tree that a test may change


@functools.cache
def _made(**changes):
    model = build_model(dataclasses.replace(CONFIG, **changes), ComputeConfig())
    random = np.random.default_rng(0)

    def draw(path, leaf):
        value = random.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key in ("embedding", "bias") and leaf.shape[0] == 128:
            value[CONFIG.vocab_size :] = 0
        return jnp.asarray(value)

    return model, jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


def assert_same(params, others):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, others)


def change_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_tensors(directory, change):
    """Rewrites the weights as another program would: without a digest."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, {"format": "pt"})


def without(tree, *names):
    return {name: leaf for name, leaf in tree.items() if name not in names}
