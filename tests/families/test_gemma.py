"""The first Gemma against Hugging Face's, through tests/golden/gemma.npz; its configuration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.gemma import SIZES, GemmaConfig, from_huggingface
from flax_transformers.huggingface.family import config_json
from flax_transformers.models.layers.norms import make_norm
from tests.families.parity import count_parameters, first_by_default
from tests.golden import gemma as golden

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)


def test_a_fresh_norm_does_not_scale_and_its_parameter_is_zero():
    norm = make_norm(SIZES["gemma-2b"], jnp.dtype("bfloat16"))
    x = jnp.array([[3.0, -4.0]], jnp.bfloat16)
    y, variables = norm.init_with_output(jax.random.key(0), x)
    assert jax.tree.leaves(variables["params"])[0].tolist() == [0.0, 0.0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), [[3 / 12.5**0.5, -4 / 12.5**0.5]], rtol=4e-3)


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    config = from_huggingface(CASES[name].config)
    assert from_huggingface(config_json(config)) == config
    assert config.scale_embeddings


@pytest.mark.parametrize(
    ("spelt", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "silu"}, "silu"),
    ],
)
def test_gelu_means_its_tanh_approximation(spelt, activation):
    assert from_huggingface(spelt).activation == activation


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "gemma"}) == SIZES["gemma-7b"] == GemmaConfig()


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_activation", "gelu", "two different activations"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention True"),
        ("model_type", "gemma2", "model_type 'gemma2'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("activation", "gelu"), ("scale_embeddings", False), ("mlp_bias", True)]
)
def test_a_model_that_hugging_face_has_no_gemma_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(GemmaConfig(**{field: value}))


PUBLISHED = {"gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


def test_another_norm_than_its_own_is_refused():
    with pytest.raises(ValueError, match=r"model\.norm is 'layer'; Gemma has only 'rms'"):
        GemmaConfig(norm="layer")
