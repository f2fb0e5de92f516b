"""How a model is run reaches the layers of every family."""

from __future__ import annotations

import jax
import pytest

from flax_transformers.huggingface.family import all_families, build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.layers import attention
from flax_transformers.testing import tiny_model

OWN_ATTENTION = {"DebertaV2ForMaskedLM"}
"""Models whose attention is none that the kernels compute."""
FIRST = sorted({next(iter(family.architectures)) for family in all_families()} - OWN_ATTENTION)


@pytest.mark.parametrize("architecture", [*FIRST, "UMT5ForConditionalGeneration"])
def test_attention_is_computed_by_the_kernel_that_was_chosen(architecture, monkeypatch):
    original, kernels = attention.dot_product_attention, []

    def noted(*operands, kernel, **options):
        kernels.append(kernel)
        return original(*operands, **options)

    def run():
        model, params = tiny_model(architecture)
        model = build_model(model.config, ComputeConfig(attention="splash"))
        monkeypatch.setattr(attention, "dot_product_attention", noted)
        inputs = jax.tree.map(jax.numpy.asarray, model.example_inputs())
        return jax.tree.leaves(model.apply({"params": params}, **inputs))

    jax.eval_shape(run)
    assert set(kernels) == {"splash"}
