"""Dropout (Srivastava et al., JMLR 15, 2014) with masks from a counter hash or from threefry.

The masks of the hash do not depend on the sharding of an array, are merged into what reads the
result, and are computed again in the backward pass instead of stored.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import DropoutGenerator
from flax_transformers.models.kernels.dropout_hash import is_kept, key_words


class Dropout(nn.Module):
    """Zero elements with probability ``rate`` and scale up the others, if not ``deterministic``,
    which is given here or in the call."""

    rate: float
    generator: DropoutGenerator = "auto"
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """The shape and dtype of ``x``; the key is the stream "dropout"."""
        if nn.merge_param("deterministic", self.deterministic, deterministic) or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"), self.generator)


def dropout(x: jax.Array, rate: float, key: jax.Array, generator: DropoutGenerator) -> jax.Array:
    """Zero elements of ``x`` with probability ``rate`` and divide the others by ``1 - rate``.

    The hash divides in float32 and rounds to the dtype of ``x``, threefry in the dtype of ``x``.
    """
    if generator == "threefry":
        keep = 1.0 - rate
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)
    return _hash_dropout(rate, x, key_words(key))


def drop_path(
    y: jax.Array, rate: jax.Array, key: jax.Array, generator: DropoutGenerator
) -> jax.Array:
    """Zero whole examples of ``y`` [B, ...] and scale up the others (stochastic depth,
    arXiv:1603.09382). ``rate`` is a float32 scalar, which need not be a constant."""
    keep, of_example = 1.0 - rate, y.shape[:1] + (1,) * (y.ndim - 1)
    if generator == "threefry":
        kept_B = jax.random.bernoulli(key, keep, y.shape[:1])
        return jnp.where(kept_B.reshape(of_example), y / keep.astype(y.dtype), 0)
    kept = is_kept(key_words(key), keep, of_example)
    return jnp.where(kept, (y.astype(jnp.float32) / keep).astype(y.dtype), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hash_dropout(rate: float, x: jax.Array, words: jax.Array) -> jax.Array:
    kept = is_kept(words, 1.0 - rate, x.shape)
    return jnp.where(kept, (x.astype(jnp.float32) * (1.0 / (1.0 - rate))).astype(x.dtype), 0)


def _hash_dropout_forward(
    rate: float, x: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _hash_dropout(rate, x, words), words


def _hash_dropout_backward(
    rate: float, words: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, None]:
    return _hash_dropout(rate, cotangent, words), None


_hash_dropout.defvjp(_hash_dropout_forward, _hash_dropout_backward)
