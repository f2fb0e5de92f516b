"""What a model's description refuses and derives."""

from __future__ import annotations

import pytest

from flax_transformers.models.config import Execution, TransformerConfig

SIZES = {
    "vocab_size": 130,
    "hidden_size": 6,
    "num_layers": 1,
    "num_heads": 3,
    "intermediate_size": 5,
    "max_positions": 8,
}


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (30522, 30592)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(size, padded):
    assert TransformerConfig(**SIZES | {"vocab_size": size}).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("num_heads", 4, "hidden_size 6 does not divide by model.num_heads 4"),
        *((name, 0, f"model.{name} is 0; it must be at least 1") for name in SIZES),
        ("dropout", 1.0, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ("attention_dropout", -0.1, "model.attention_dropout is -0.1"),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_name(field, value, names):
    with pytest.raises(ValueError, match=names):
        TransformerConfig(**SIZES | {field: value})


def test_the_automatic_dtype_is_float32_on_cpu_and_bfloat16_elsewhere():
    dtypes = [Execution(dtype="auto").resolve(p).dtype for p in ("cpu", "gpu", "tpu")]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]
    assert Execution(dtype="bfloat16").resolve("cpu").dtype == "bfloat16"
