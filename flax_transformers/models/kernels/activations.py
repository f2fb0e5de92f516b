"""GELU (arXiv:1606.08415), exact and by tanh, with derivatives in closed form.

The derivative is computed beside the value, from one evaluation of ``erf`` or ``tanh``, in float32
whatever the dtype of the activations; a backward pass keeps it instead of every intermediate array.
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
