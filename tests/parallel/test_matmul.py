"""Products that accumulate in float32."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.parallel.matmul import einsum

SPECS = list(itertools.product(("BD", "DB"), ("DV", "VD"), ("BV", "VB")))


@pytest.mark.parametrize("rows", [1, 8, 13, 24])
@pytest.mark.parametrize("spec", SPECS)
def test_a_transposed_bfloat16_product_and_its_gradients_can_be_computed(spec, rows):
    """The CPU backend cannot run a product with which XLA has joined a transposition of it."""
    left, right, result = spec
    sizes = {"B": rows, "D": 16, "V": 32}
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.integers(-3, 4, [sizes[axis] for axis in axes]), jnp.bfloat16)
        for axes in (left, right)
    )

    def total(a, b):
        product = einsum(f"{left},{right}->{result}", a, b, jnp.float32)
        return jnp.sum(product.T**2), product.T

    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        step = jax.jit(jax.grad(total, (0, 1), has_aux=True))
        (grad_a, grad_b), product = step(a, b)
        transposed = jax.jit(lambda a, b: step(a, b)[0][1].T)(a, b)
    wide = [np.asarray(x, np.float64) for x in (a, b)]
    expected = np.einsum(f"{left},{right}->{result}", *wide)
    np.testing.assert_array_equal(product, expected.T)
    assert grad_a.dtype == grad_b.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(grad_b, np.float64),
        np.einsum(f"{result},{left}->{right}", 2 * expected, wide[0]),
        rtol=0.02,
        atol=1.0,
    )
    np.testing.assert_array_equal(transposed, grad_b.T)
