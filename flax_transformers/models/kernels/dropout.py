"""Dropout (Srivastava et al., JMLR 15, 2014) with masks from a counter hash or from threefry.

The hash maps an element's index in the whole array and the two 32-bit words of a key to 32 bits, in
about a dozen integer operations. It depends on neither the sharding of the array nor on other
elements: the compiler merges it into what reads the result, devices send each other nothing, and
the backward pass computes the mask again instead of storing it. A kernel that sees a block of an
array computes the same mask from the indices of the block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.models.config import DropoutGenerator

_GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio: odd, and its multiples are far apart."""

_BITS = 24
"""Of the 32 bits that are compared with the rate: as many as float32 holds exactly."""


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


def key_words(key: jax.Array) -> jax.Array:
    """The words uint32 [2] of a key, for the hash."""
    first, second = jax.random.key_data(key).ravel()[:2]
    # Keys that differ in the first word alone would have masks that are permutations of each other.
    return jnp.stack([first, _mixed(first, second)])


def is_kept(
    words: jax.Array | Sequence[jax.Array],
    keep: float | jax.Array,
    shape: Sequence[int],
    at: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """bool: which elements of an array of ``shape`` are kept, each with probability ``keep``.

    ``words`` are those of a key. ``at``: integer indices along each axis, which broadcast to the
    shape of the result; None for the whole array.
    """
    bits = hash_bits(words, shape, at) >> (32 - _BITS)
    # Signed: kernels for TPUs compare no others.
    if isinstance(keep, float):
        return bits.astype(jnp.int32) < math.ceil(keep * 2**_BITS)
    return bits.astype(jnp.int32) < jnp.ceil(keep * 2**_BITS).astype(jnp.int32)


def hash_bits(
    words: jax.Array | Sequence[jax.Array],
    shape: Sequence[int],
    at: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """32 bits uint32 for each element, with the arguments of ``is_kept``.

    The bits of different elements differ, up to 2**32 elements.
    """
    if at is None:
        at = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    low, high = _index_words(shape, at)
    second = words[1] if high is None else words[1] + high * jnp.uint32(_GOLDEN)
    return _mixed(low ^ words[0], second)


def _mixed(x: jax.Array, second: jax.Array) -> jax.Array:
    """A permutation of uint32 ``x``, another one for each ``second``.

    The shifts and factors are those of ``triple32``, in which each bit of ``x`` flips each bit of
    the result in half of all cases (C. Wellons, "Prospecting for hash functions", 2018).
    """
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB) + second
    x = (x ^ (x >> 11)) * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)


def _index_words(
    shape: Sequence[int], at: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """The index of elements as one uint32, or, in an array with more than 2**32 elements, of the
    last axes that have at most so many together, and a second one of the axes before them."""
    found: list[jax.Array] = [jnp.uint32(0)]
    stride = 1
    for size, index in zip(reversed(shape), reversed(at), strict=True):
        if stride * size > 2**32 and len(found) == 1:
            found.append(jnp.uint32(0))
            stride = 1
        if size > 1:
            found[-1] = found[-1] + index.astype(jnp.uint32) * jnp.uint32(stride % 2**32)
        stride *= size
    low, *high = found
    return low, high[0] if high else None
