"""Matrix products in the form that XLA's CPU backend computes fastest."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def merged_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum`` in float32, with axes merged that stand together wherever they occur.

    "BTF,BTD->FD" becomes the product of two matrices "BF,BD->FD". For a sum over several axes, the
    CPU backend first writes a transposed copy of an operand, element by element; for one axis it
    does not (as of jaxlib 0.12). Only for arrays that no mesh divides: merging an axis with a
    divided one would gather it.
    """
    operands, result = spec.split("->")
    axes_a, axes_b = operands.split(",")
    sizes = dict(zip(axes_a + axes_b, a.shape + b.shape, strict=True))
    merged = _merged(axes_a, axes_b, result)

    def short(axes: str) -> str:
        return "".join(letter for letter in axes if letter in merged)

    def narrow(axes: str, array: jax.Array) -> jax.Array:
        return array.reshape([math.prod(sizes[i] for i in merged[x]) for x in short(axes)])

    product = jnp.einsum(
        f"{short(axes_a)},{short(axes_b)}->{short(result)}",
        narrow(axes_a, a),
        narrow(axes_b, b),
        preferred_element_type=jnp.float32,
    )
    return product.reshape([sizes[letter] for letter in result])


def _merged(*arrays: str) -> dict[str, str]:
    """By its first letter, each run of letters that every array has whole and in order, or not."""
    runs: dict[str, str] = {}
    for letter in dict.fromkeys("".join(arrays)):
        last = next(reversed(runs), "")
        longer = runs.get(last, "") + letter
        if last and all(longer in axes or not set(longer) & set(axes) for axes in arrays):
            runs[last] = longer
        else:
            runs[letter] = letter
    return runs
