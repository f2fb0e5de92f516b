"""Splash attention, interpreted, against plain operations: outputs and gradients."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.kernels.dispatch import dot_product_attention
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.layers.stack import REMAT_POLICIES
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from flax_transformers.testing import relative_difference
from tests.families.parity import first_by_default
from tests.models.kernel_cases import assert_equal, draw, found

pytestmark = pytest.mark.slow

SEGMENTS = jnp.asarray(np.array([[1] * 100 + [2] * 150 + [0] * 6, [1] * 200 + [2] * 56]))
CASES = {
    "packed and causal": (256, AttentionMask.within(SEGMENTS, causal=True)),
    "window": (256, AttentionMask(window=(40, 20))),
    "a length that blocks do not divide": (200, AttentionMask(causal=True)),
    "causal window": (256, AttentionMask(causal=True, window=(63, 9))),
    "no mask": (256, AttentionMask()),
}


def attention(kernel, mask):
    return partial(dot_product_attention, mask=mask, kernel=kernel, scale=0.3)


@pytest.mark.parametrize("case", list(CASES)[:3])
def test_splash_is_attention_in_plain_operations_with_grouped_heads(case):
    length, mask = CASES[case]
    operands = draw(length, heads=4, key_heads=2)
    ours, plain = (found(attention(kernel, mask), operands) for kernel in ("splash", "xla"))
    assert_equal(ours, plain)


@pytest.mark.parametrize(
    "case", first_by_default(["packed and causal", "causal window", "no mask"])
)
def test_splash_is_the_same_over_a_mesh_that_divides_rows_places_and_heads(case):
    length, mask = CASES[case]
    operands = draw(length, heads=4, key_heads=2)
    plain = found(attention("xla", mask), operands)
    with jax.set_mesh(make_mesh(MeshConfig(2, context=2, tensor=2))), nn.logical_axis_rules(RULES):
        assert_equal(found(attention("splash", mask), operands), plain)


def test_splash_bounds_scores_as_plain_operations_do():
    length, mask = CASES["causal window"]
    operands = draw(length, heads=4, key_heads=2)
    ours, plain, unbounded = (
        found(partial(attention(kernel, mask), softcap=cap), operands)
        for kernel, cap in (("splash", 0.7), ("xla", 0.7), ("xla", None))
    )
    assert_equal(ours, plain)
    assert relative_difference(unbounded[1], plain[1]) > 0.1


def test_splash_attends_to_rows_of_another_length():
    q, (_, k, v) = draw(256)[0], draw(384)
    mask = AttentionMask(SEGMENTS, jnp.concatenate([SEGMENTS, SEGMENTS[:, 100:228]], axis=1))
    ours, plain = (found(attention(kernel, mask), (q, k, v)) for kernel in ("splash", "xla"))
    assert_equal(ours, plain)


@pytest.mark.parametrize(("remat", "forward_passes"), [("dots", 1), ("full", 2)])
def test_what_the_kernel_gives_is_computed_anew_only_where_everything_is(remat, forward_passes):
    attend = jax.checkpoint(
        attention("splash", AttentionMask(causal=True)), policy=REMAT_POLICIES[remat]
    )
    gradient = jax.grad(lambda *operands: jnp.sum(attend(*operands)), argnums=(0, 1, 2))
    traced = str(jax.make_jaxpr(gradient)(*draw(128)))
    assert traced.count("name=splash_mha_fwd") == forward_passes
