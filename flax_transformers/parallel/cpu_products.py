"""Matrix products in the form that XLA's CPU backend computes fastest."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp


def bfloat16_instructions() -> list[str]:
    """The processor's instructions for products of bfloat16 numbers, by their names in Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


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

    merged_spec = f"{short(axes_a)},{short(axes_b)}->{short(result)}"
    a, b = narrow(axes_a, a), narrow(axes_b, b)
    summed = set(short(axes_a)) & set(short(axes_b)) - set(result)
    if a.dtype == jnp.bfloat16 and a.ndim == b.ndim == len(short(result)) == 2 and summed:
        product = _matrix_product(merged_spec, a, b)
    else:
        product = jnp.einsum(merged_spec, a, b, preferred_element_type=jnp.float32)
    return product.reshape([sizes[letter] for letter in result])


def _matrix_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two matrices, with the sum over the columns of the left one.

    The CPU backend computes other products of bfloat16 matrices in float32, at half the speed or
    less on processors with bfloat16 instructions (as of jaxlib 0.10).
    """
    operands, result = spec.split("->")
    left, right = operands.split(",")
    if result[0] in right:
        left, right, a, b = right, left, b, a
    if left[0] != result[0]:
        left, a = left[::-1], _transposed(a)
    contracted = ((1,), (right.index(left[1]),))
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _transposed(matrix: jax.Array) -> jax.Array:
    """The transpose, in a form that XLA does not fold into a product: by way of three axes."""
    rows, columns = matrix.shape
    part = next((n for n in (8, 4, 2, 3, 5, 7) if rows % n == 0), 1)
    transposed = matrix.reshape(part, -1, columns).transpose(2, 0, 1).reshape(columns, rows)
    return jax.lax.optimization_barrier(transposed)  # for few rows, whose axes XLA joins again


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
