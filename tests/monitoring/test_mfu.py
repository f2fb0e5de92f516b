"""FLOP counts against counts by hand, and peaks by the names JAX gives devices."""

from __future__ import annotations

from flax_transformers.monitoring.mfu import (
    mfu,
    transformer_matmul_flops,
)


def count_matmul(rows, inner, columns):
    """Multiplications and additions of [rows, inner] @ [inner, columns]."""
    return 2 * rows * inner * columns


def test_an_encoder_layer_is_the_sum_of_its_matmuls_three_times_over():
    batch, length, width, heads, head_width, inner = 2, 6, 8, 2, 4, 32
    tokens = batch * length
    forward = 4 * count_matmul(tokens, width, heads * head_width)
    forward += 2 * count_matmul(tokens, width, inner)
    forward += batch * heads * count_matmul(length, head_width, length)
    forward += batch * heads * count_matmul(length, length, head_width)
    assert 3 * 3 * forward == transformer_matmul_flops(
        tokens=tokens,
        matmul_parameters=3 * (4 * width * heads * head_width + 2 * width * inner),
        num_layers=3,
        attention_width=heads * head_width,
        key_length=length,
        causal=False,
    )


def test_logits_cost_only_where_they_are_needed():
    settings = {"matmul_parameters": 100, "num_layers": 2, "attention_width": 4, "key_length": 8}
    body = transformer_matmul_flops(tokens=64, causal=False, **settings)
    masked = transformer_matmul_flops(
        tokens=64, causal=False, head_tokens=10, head_parameters=4 * 50, **settings
    )
    assert masked - body == 3 * count_matmul(10, 4, 50)


def test_causal_attention_counts_half_and_weights_in_full():
    def flops(causal, parameters):
        return transformer_matmul_flops(
            tokens=16,
            matmul_parameters=parameters,
            num_layers=2,
            attention_width=8,
            key_length=16,
            causal=causal,
        )

    assert flops(True, 0) == flops(False, 0) / 2
    assert flops(True, 7) - flops(True, 0) == flops(False, 7) - flops(False, 0) == 6 * 16 * 7


def test_bert_base_at_length_512_costs_what_the_paper_convention_says():
    layers, width, length = 12, 768, 512
    parameters = layers * 12 * width * width
    per_token = transformer_matmul_flops(
        tokens=1,
        matmul_parameters=parameters,
        num_layers=layers,
        attention_width=width,
        key_length=length,
        causal=False,
    )
    assert per_token == 6 * 84_934_656 + 12 * 12 * 512 * 768 == 566_231_040


def test_a_cpu_and_an_unknown_chip_have_no_mfu():
    assert mfu(1e12, 1.0, "cpu", 1) is None
    assert mfu(1e12, 1.0, "NVIDIA Something Else", 8) is None


def test_mfu_is_the_share_of_all_devices_peak():
    assert mfu(275e12, 2.0, "TPU v4", 1) == 0.5
    assert mfu(275e12, 0.5, "TPU v4", 8) == 0.25


def test_mfu_of_a_step_that_took_no_time_is_unknown():
    assert mfu(1e12, 0.0, "TPU v4", 1) is None
