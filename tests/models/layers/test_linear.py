"""Products that accumulate in float32 both ways, and the linear layer."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.parallel.matmul import einsum, weighted
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.partitioning import gradients_reduced_in
from flax_transformers.parallel.rules import RULES
from tests.models.reference import equations, randomize

SPECS = {
    "BTD,DF->BTF": ((2, 3, 4), (4, 5)),
    "BTD,DNH->BTNH": ((2, 3, 4), (4, 2, 3)),
    "BTNH,NHD->BTD": ((2, 3, 2, 3), (2, 3, 4)),
    "BTNH,BSNH->BNTS": ((2, 3, 2, 4), (2, 5, 2, 4)),
    "BNTS,BSNH->BTNH": ((2, 2, 3, 5), (2, 5, 2, 4)),
    "BMD,VD->BMV": ((2, 3, 4), (7, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_of_jax_in_float32(spec):
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in SPECS[spec])
    weight = random.standard_normal(jnp.einsum(spec, a, b).shape).astype(np.float32)

    def both(product):
        def weighed(a, b):
            return jnp.sum(product(spec, a, b) * weight)

        return jax.jit(lambda a, b: (product(spec, a, b), jax.grad(weighed, (0, 1))(a, b)))(a, b)

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6),
        both(einsum),
        both(jnp.einsum),
    )


def ones(*shape):
    return jnp.ones(shape, jnp.bfloat16)


def in_bfloat16(count):
    """What adding up ``count`` ones gives if the running sum is kept in bfloat16: at most 256."""
    return float(jax.lax.fori_loop(0, count, lambda _, total: total + 1, jnp.bfloat16(0)))


def test_a_sum_kept_in_bfloat16_would_be_visible_here():
    assert in_bfloat16(2048) == 256


@pytest.mark.slow
def test_bfloat16_products_are_summed_in_float32_forward():
    assert einsum("BD,DF->BF", ones(1, 2048), ones(2048, 1)).item() == 2048
    # 2,049 is no bfloat16: a float32 result was never rounded to one.
    assert einsum("BD,DF->BF", ones(1, 2049), ones(2049, 1), jnp.float32).item() == 2049


@pytest.mark.parametrize("out_dtype", [None, jnp.float32], ids=["bfloat16", "float32"])
def test_bfloat16_products_are_summed_in_float32_backward(out_dtype):
    def total(a, b):
        return jnp.sum(einsum("BD,DF->BF", a, b, out_dtype).astype(jnp.float32))

    # d total / da sums over F, d total / db over B.
    to_a, to_b = jax.jit(jax.grad(total, (0, 1)))(ones(1024, 2), ones(2, 2048))
    assert to_a.dtype == to_b.dtype == jnp.bfloat16
    assert set(np.asarray(to_a, np.float32).ravel()) == {2048}
    assert set(np.asarray(to_b, np.float32).ravel()) == {1024}


@pytest.mark.parametrize("out_dtype", [None, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_all_three_products_read_bfloat16_and_give_what_has_to_cross_a_mesh(platform, out_dtype):
    """On a CPU float32, which it would not sum in else; on accelerators, which do, the result's
    dtype, in which a mesh adds up the devices' parts."""

    def total(a, b):
        return jnp.sum(einsum("BD,DF->BF", a, b, out_dtype).astype(jnp.float32))

    traced = jax.jit(jax.value_and_grad(total, (0, 1))).trace(ones(2, 3), ones(3, 4))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    types = [line.rpartition(" : ")[2] for line in text.splitlines() if "dot_general" in line]
    dtypes = [re.findall(r"bf16|f32", one) for one in types]  # of both operands and the result
    gradient = {"cpu": "f32", "tpu": "bf16"}[platform]
    result = gradient if out_dtype is None else "f32"
    assert sorted(dtypes) == sorted(["bf16", "bf16", one] for one in (result, gradient, gradient))


WEIGHT = ("BTD,DF->BTF", ("embed", "mlp"))


def gradients_of(weight, x):
    def total(weight, x):
        return jnp.sum(weighted(*WEIGHT, x, weight).astype(jnp.float32) ** 2)

    return jax.grad(total, (0, 1))(weight, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_weight_crosses_the_mesh_in_the_dtype_in_force(dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((8, 4, 16)), jnp.bfloat16)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def ruled(weight, x):
        with nn.logical_axis_rules(RULES), gradients_reduced_in(dtype):
            return gradients_of(weight, x)

    divided = NamedSharding(mesh, PartitionSpec("fsdp"))
    with jax.set_mesh(mesh):
        placed = jax.jit(ruled, in_shardings=divided, out_shardings=divided)
        lowered = placed.trace(weight, x).lower(lowering_platforms=("tpu",)).as_text()
        found, _ = placed(weight, x)
    products = re.findall(r"dot_general.*-> tensor<([\dx]+x\w+)>", lowered)
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert [p for p in products if p.count("x") == 2] == [f"16x8x{short}"]
    assert found.dtype == jnp.float32
    exact = gradients_of(weight, x.astype(jnp.float32))[0]
    np.testing.assert_allclose(found, exact, rtol=0.03, atol=0.3)


@pytest.mark.parametrize(
    ("spec", "axes", "shapes"),
    [
        ("BTKC,KCD->BTD", ("patch_width", "embed", "features"), ((8, 4, 3, 16), (3, 16, 8))),
        ("BTD,DNH->BTNH", ("embed", "heads", "head_dim"), ((8, 4, 16), (16, 2, 4))),
        ("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), ((8, 4, 2, 4), (2, 4, 16))),
    ],
)
def test_gradients_of_divided_weights_are_those_of_whole_ones(spec, axes, shapes):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def gradients(weight, x):
        with nn.logical_axis_rules(RULES):
            return jax.grad(lambda *args: jnp.sum(weighted(spec, axes, *args) ** 2), (0, 1))(
                x, weight
            )

    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=8))):
        found = jax.jit(gradients)(weight, x)
    whole = gradients(weight, x)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4),
        found,
        whole,
    )


def test_without_a_choice_the_gradient_of_a_weight_is_never_rounded_to_bfloat16():
    gradient, _ = gradients_of(jnp.ones((1, 1)), jnp.ones((1, 257, 1), jnp.bfloat16))
    assert gradient.item() == 2 * 257  # no bfloat16


def test_in_float32_a_weight_is_multiplied_as_einsum_does():
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (2, 3, 6)))

    def total(weight, x):
        return jnp.sum(einsum(WEIGHT[0], x, weight) ** 2)

    for ours, theirs in zip(
        gradients_of(weight, x), jax.grad(total, (0, 1))(weight, x), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def make(spec, shape, axes, x, **options):
    layer = Linear(spec, shape, axes, dtype=jnp.float32, **options)
    return layer, layer.init(jax.random.key(0), x)["params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "shape", "axes", "bias_shape", "bias_axes"),
    [
        ("BTD,DNH->BTNH", (4, 2, 3), ("embed", "heads", "head_dim"), (2, 3), ("heads", "head_dim")),
        ("BTNH,NHD->BTD", (2, 3, 4), ("heads", "head_dim", "embed"), (4,), ("embed",)),
        ("BTD,DF->BTF", (4, 5), ("embed", "mlp"), (5,), ("mlp",)),
    ],
)
def test_a_bias_covers_the_kernel_axes_that_remain(spec, shape, axes, bias_shape, bias_axes):
    x = np.random.default_rng(0).standard_normal((2, 3, *shape[: -len(bias_shape)]))
    layer, boxed = make(spec, shape, axes, jnp.asarray(x, jnp.float32))
    assert boxed["kernel"].names == axes
    assert boxed["bias"].names == bias_axes
    params = randomize(nn.meta.unbox(boxed))
    assert params["bias"].shape == bias_shape
    expected = np.einsum(spec, x, params["kernel"]) + params["bias"]
    ours = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_without_bias_there_is_a_kernel_alone():
    _, params = make("BTD,DF->BTF", (2, 3), ("embed", "mlp"), jnp.ones((1, 1, 2)), use_bias=False)
    assert params.keys() == {"kernel"}


def test_the_gradient_of_a_bias_is_summed_over_tokens_in_float32():
    x = jnp.ones((2, 3, 4))
    layer = Linear("BTD,DF->BTF", (4, 5), ("embed", "mlp"), dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)

    def total(params):
        return jnp.sum(layer.apply(params, x).astype(jnp.float32))

    sums = [e for e in equations(jax.grad(total), params) if e.primitive.name == "reduce_sum"]
    assert {e.outvars[0].aval.dtype for e in sums} == {jnp.dtype(jnp.float32)}


def test_kernels_start_from_a_normal_cut_at_two_deviations():
    values = np.asarray(truncated_normal(0.02)(jax.random.key(0), (100_000,)))
    assert np.abs(values).max() <= 0.04
    # The cut takes 12 % off the deviation.
    assert values.std() == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert values.mean() == pytest.approx(0, abs=2e-4)
