"""Products of matrices with merged axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.parallel import cpu_products
from flax_transformers.parallel.cpu_products import merged_einsum

SPECS = {
    "BTD,DNH->BTNH": (2, 2),
    "BTNH,NHD->BTD": (2, 2),
    "BTD,BTNH->DNH": (2, 2),
    "BTCPQ,CPQD->BTD": (2, 2),
    "BTNH,BSNH->BNTS": (4, 4),
}
"""Ranks of the operands after merging."""


@pytest.mark.parametrize("spec", SPECS)
def test_axes_that_stand_together_are_one_axis_of_the_product(spec: str) -> None:
    rng, sizes = np.random.default_rng(0), {letter: 2 + i for i, letter in enumerate("BTSDNHCPQ")}
    shapes = [[sizes[letter] for letter in axes] for axes in spec.split("->")[0].split(",")]
    operands = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return merged_einsum(spec, a, b)

    expected = np.einsum(spec, *(np.asarray(x, np.float64) for x in operands))
    np.testing.assert_allclose(product(*operands), expected, rtol=1e-4, atol=1e-5)
    text = jax.jit(product).lower(*operands).as_text()
    line = next(line for line in text.splitlines() if "dot_general" in line)
    shapes_of_operands = re.findall(r"tensor<([\dx]+)xf32>", line)[:2]
    assert tuple(shape.count("x") + 1 for shape in shapes_of_operands) == SPECS[spec]


@pytest.mark.parametrize("spec", ["BTD,BTF->DF", "BTF,BTD->DF", "BTD,DNH->BTNH", "BTNH,DNH->BTD"])
@pytest.mark.parametrize("batch", [1, 3, 11])
def test_bfloat16_matrices_are_summed_over_the_columns_of_the_left_one(
    spec: str, batch: int
) -> None:
    rng, sizes = np.random.default_rng(0), {"B": batch, "T": 5, "D": 6, "F": 7, "N": 2, "H": 3}
    shapes = [[sizes[letter] for letter in axes] for axes in spec.split("->")[0].split(",")]
    operands = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return merged_einsum(spec, a, b)

    found = product(*operands)
    assert found.dtype == jnp.float32
    expected = np.einsum(spec, *(np.asarray(x, np.float64) for x in operands))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    text = jax.jit(product).lower(*operands).as_text()
    assert re.search(r"dot_general .*contracting_dims = \[1\] x", text)


def test_bfloat16_instructions_are_read_from_the_flags_of_the_processor(monkeypatch):
    text = "model name : X\nflags : fpu avx512_bf16 sse amx_tile amx_bf16\nflags : fpu\n"
    monkeypatch.setattr(cpu_products.Path, "read_text", lambda path: text)
    assert cpu_products.bfloat16_instructions() == ["amx_bf16", "avx512_bf16"]
    monkeypatch.setattr(cpu_products.Path, "read_text", lambda path: "Features : fp asimd bf16\n")
    assert cpu_products.bfloat16_instructions() == []
