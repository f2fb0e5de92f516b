"""GELU (arXiv:1606.08415) and standardisation, with derivatives in closed form.

The backward pass keeps one array of each, where automatic differentiation keeps every intermediate
one. All is computed in float32, whatever the dtype of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """``x`` times the normal distribution function of ``x``, in the dtype of ``x``."""
    return _exact(x.astype(jnp.float32))[0].astype(x.dtype)


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """The approximation of ``gelu`` by ``tanh``, in the dtype of ``x``."""
    return _by_tanh(x.astype(jnp.float32))[0].astype(x.dtype)


def _exact(x: jax.Array) -> Pair:
    below = 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * below, below + x * density


def _by_tanh(x: jax.Array) -> Pair:
    rate, cubic = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
    below = jax.nn.sigmoid(rate * (x + cubic * x**3))  # (1 + tanh(y)) / 2 = sigmoid(2 y)
    steep = below * (1.0 - below) * rate * (1.0 + 3.0 * cubic * jnp.square(x))
    return x * below, below + x * steep


def _derivative(
    both: Callable[[jax.Array], Pair], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> Pair:
    (x,), (tangent,) = primals, tangents
    value, slope = both(x.astype(jnp.float32))
    return value.astype(x.dtype), slope.astype(x.dtype) * tangent


gelu.defjvp(partial(_derivative, _exact))
gelu_tanh.defjvp(partial(_derivative, _by_tanh))


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
    """``x`` bounded smoothly to (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


Kept = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardized(x: jax.Array, eps: float) -> jax.Array:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis, in float32.

    The variance is the mean of squared deviations: the cheaper ``E[x^2] - E[x]^2`` is not exact
    enough for parity with the original implementations. The backward pass keeps the result and one
    number for each row, and reads each array once per sum.
    """
    return _standardize(x, eps)[0]


def _standardize(x: jax.Array, eps: float) -> tuple[jax.Array, Kept]:
    x32 = x.astype(jnp.float32)
    deviation = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(deviation), axis=-1, keepdims=True) + eps)
    result = deviation * rate
    return result, (result, rate, jnp.zeros((), x.dtype))


def _standardize_backward(eps: float, kept: Kept, cotangent: jax.Array) -> tuple[jax.Array]:
    del eps
    result, rate, of_dtype = kept
    mean = jnp.mean(cotangent, axis=-1, keepdims=True)
    along = jnp.mean(cotangent * result, axis=-1, keepdims=True)
    return ((rate * (cotangent - mean - result * along)).astype(of_dtype.dtype),)


standardized.defvjp(_standardize, _standardize_backward)
