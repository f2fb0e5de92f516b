"""How a model is run reaches the layers of every family."""

from __future__ import annotations

from functools import partial

import jax
import pytest

from flax_transformers.huggingface.family import all_families, build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.layers import attention
from flax_transformers.testing import tiny_architecture
from tests.families.parity import some_by_default
from tests.huggingface.tensors import parameter_shapes

OWN_ATTENTION = {"BasicModel", "CoAtNetForImageClassification", "DebertaV2ForMaskedLM"}
"""Models whose attention is none that the kernels compute."""
FIRST = {next(iter(family.architectures)) for family in all_families()}
ALL = FIRST - OWN_ATTENTION | {"UMT5ForConditionalGeneration"}
LIKE_OTHERS = {
    "AlbertForMaskedLM",
    "MistralForCausalLM",
    "ViTMAEForPreTraining",
    "CohereForCausalLM",
    "DeiTForImageClassificationWithTeacher",
    "DistilBertForMaskedLM",
    "ElectraForPreTraining",
    "GemmaForCausalLM",
    "MarianMTModel",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "RobertaForMaskedLM",
    "SiglipModel",
    "UMT5ForConditionalGeneration",
    "VideoMAEForPreTraining",
}
"""Models whose layers are those of a family before them, as Llama's or BERT's."""


@pytest.mark.parametrize("architecture", some_by_default(sorted(ALL), ALL - LIKE_OTHERS))
def test_attention_is_computed_by_the_kernel_that_was_chosen(architecture, monkeypatch):
    original, kernels = attention.dot_product_attention, []

    def noted(*operands, kernel, **options):
        kernels.append(kernel)
        return original(*operands, **options)

    model = build_model(tiny_architecture(architecture), ComputeConfig(attention="splash"))
    params = {"params": parameter_shapes(model)}
    monkeypatch.setattr(attention, "dot_product_attention", noted)
    jax.eval_shape(partial(model.apply, **model.example_inputs()), params)
    assert set(kernels) == {"splash"}
