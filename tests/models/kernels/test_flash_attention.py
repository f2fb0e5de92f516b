"""Flash attention with dropout or a bias by distance, interpreted, against plain operations."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.kernels.dispatch import dot_product_attention
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from flax_transformers.planning.topology import devices_of
from tests.families.parity import some_by_default
from tests.models.kernel_cases import assert_equal, draw, found

pytestmark = pytest.mark.slow

SEGMENTS = jnp.asarray(np.array([[1] * 100 + [2] * 150 + [0] * 6, [1] * 200 + [2] * 56]))
CASES = {
    "packed and causal": (256, 128, AttentionMask.within(SEGMENTS, causal=True)),
    "a length that blocks do not divide": (200, 7, AttentionMask()),
    "many blocks of one bias": (640, 100, AttentionMask(causal=True)),
}
DROPPED = {
    "several blocks": (640, None, AttentionMask(causal=True)),
    "packed, causal and with a bias": (256, 60, AttentionMask.within(SEGMENTS, causal=True)),
}
RATE = 0.3


def attention(kernel, mask, rate=0.0):
    def attend(q, k, v, values=None):
        return dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            bias=None if values is None else RelativePositionBias(values),
            scale=0.3,
            dropout_rate=rate,
            dropout_key=jax.random.key(5),
            kernel=kernel,
        )

    return attend


def operands(length, reach):
    if reach is None:
        return draw(length)
    values = np.random.default_rng(2).standard_normal((4, 2 * reach + 1))
    return [*draw(length), values.astype(np.float32)]


@pytest.mark.parametrize(
    "case", some_by_default(CASES, ["packed and causal", "many blocks of one bias"])
)
def test_it_is_attention_in_plain_operations_and_so_are_all_gradients(case):
    length, reach, mask = CASES[case]
    given = operands(length, reach)
    ours, plain = (found(attention(kernel, mask), given) for kernel in ("splash", "xla"))
    assert_equal(ours, plain)
    assert np.abs(ours[-1]).max(axis=1).min() > 1e-2, "a head whose bias learns nothing"


@pytest.mark.parametrize("case", some_by_default(DROPPED, ["packed, causal and with a bias"]))
def test_it_drops_what_plain_operations_drop_forward_and_backward(case):
    length, reach, mask = DROPPED[case]
    given = operands(length, reach)
    ours, plain = (found(attention(kernel, mask, RATE), given) for kernel in ("splash", "xla"))
    assert_equal(ours, plain)


def test_it_drops_in_attention_to_a_padded_sequence_of_another_length():
    q, (_, k, v) = draw(200)[0], draw(384)
    seen = jnp.asarray(np.arange(384)[None, :] < np.array([[384], [150]]), jnp.int32)
    mask = AttentionMask(jnp.ones((2, 200), jnp.int32), seen)
    ours, plain = (found(attention(one, mask, RATE), (q, k, v)) for one in ("splash", "xla"))
    assert_equal(ours, plain)


def test_it_is_the_same_over_a_mesh_that_divides_rows_places_and_heads():
    length, reach, mask = CASES["packed and causal"]
    given = operands(length, reach)
    plain = found(attention("xla", mask, RATE), given)
    mesh = make_mesh(MeshConfig(1, fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        assert_equal(found(attention("splash", mask, RATE), given), plain)


def test_long_rows_on_a_tpu_hold_nothing_as_large_as_all_scores():
    heads, length = 8, 8192
    mesh = make_mesh(MeshConfig(), devices_of("v5e:2x2")[:1])
    row = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((heads, 257), jnp.float32)

    def loss(q, k, v, values):
        attended = attention("splash", AttentionMask(causal=True), RATE)(q, k, v, values)
        return jnp.sum(attended.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 3))).lower(row, row, row, values).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < heads * length**2 / 8
    assert "attention_dkv" in compiled.as_text()
