"""Matrix products that accumulate in float32 in both passes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.parallel.cpu_products import merged_einsum
from flax_transformers.parallel.partitioning import (
    constrain,
    gradient_dtype,
    is_divided,
    mesh_axes_of,
)

PROJECTION = "projection"
"""The name under which a rematerialisation policy finds the product of every linear layer."""


def plain_einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The product in ``dtype``, summed in float32.

    If a mesh divides the axis of the sum, the partitioner reduces over devices right after the
    product, in the product's dtype: so on accelerators, which accumulate in float32 internally, it
    is ``dtype`` from the start. Products of float32 are the same either way.
    """

    def wide(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)

    def on_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.dtype == jnp.bfloat16 and batched:
            # XLA's CPU backend lacks some batched bfloat16 products (as of jaxlib 0.12); products
            # of bfloat16 numbers are exact in float32, so only the time changes.
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if is_divided():
            product = jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
        else:
            product = merged_einsum(spec, a, b)
        if a.dtype == jnp.bfloat16:
            # XLA would join a transposition of the result, such as that of the gradient of an
            # untied output table, with the product, into one that the CPU backend cannot run (as of
            # jaxlib 0.10.2).
            product = jax.lax.optimization_barrier(product)
        return product.astype(dtype)

    operands, result = spec.split("->")
    batched = set.intersection(*map(set, operands.split(",")), result)
    # XLA's CPU backend is slow at bfloat16 results (as of jaxlib 0.12).
    default = narrow if a.dtype == jnp.bfloat16 else wide
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=default)


def gradient_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The gradient of a weight, in the dtype of gradient reductions."""
    return plain_einsum(spec, a, b, gradient_dtype(a.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """``jnp.einsum`` of two operands of one dtype, summed in float32 whatever that dtype is.

    The derivative of a bfloat16 product would otherwise multiply a float32 cotangent by a bfloat16
    operand; here the cotangent is first cast to the operands' dtype, so that the two products of
    the backward pass run at the speed of the forward one and also sum in float32.

    ``spec`` names every axis by a letter ("BTD,DF->BTF"); each letter of an operand must occur in
    the other operand or in the result. The result has ``out_dtype``, by default that of ``a``.
    """
    return plain_einsum(spec, a, b, out_dtype or a.dtype)


def _einsum_forward(
    spec: str, a: jax.Array, b: jax.Array, out_dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return einsum(spec, a, b, out_dtype), (a, b)


def _einsum_backward(
    spec: str,
    out_dtype: jnp.dtype | None,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    (a_axes, b_axes), out_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    cotangent = cotangent.astype(a.dtype)
    return (
        plain_einsum(f"{out_axes},{b_axes}->{a_axes}", cotangent, b, a.dtype),
        plain_einsum(f"{out_axes},{a_axes}->{b_axes}", cotangent, a, b.dtype),
    )


einsum.defvjp(_einsum_forward, _einsum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def weighted(
    spec: str,
    axes: tuple[str, ...],
    x: jax.Array,
    weight: jax.Array,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``einsum`` of ``x`` and a float32 ``weight``, which is first rounded to the dtype of ``x``.

    ``axes`` are the logical names of the weight's axes. Where a mesh divides "embed", the rounded
    weight is gathered and used whole, and its gradient is reduced onto the parts (ZeRO-3,
    arXiv:1910.02054); the reduction is in ``partitioning.gradient_dtype``, the result float32.
    """
    return plain_einsum(spec, x, _gathered(axes, weight.astype(x.dtype)), out_dtype or x.dtype)


def _gathered(axes: tuple[str, ...], weight: jax.Array) -> jax.Array:
    return constrain(weight, tuple(None if axis == "embed" else axis for axis in axes))


def rounded(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A float32 weight in the dtype of the activations, for a pass that keeps no copy of it.

    For a plain cast XLA makes a rounded copy of all layers' weights before the loop over them (its
    pass ``bfloat16-propagation``, as of libtpu 0.0.52). That saves time where weights are read
    often, as in decoding, or where a mesh does not divide them. But a training step with sharded
    weights has no memory for it. XLA does not propagate through ``reduce_precision``, which gives
    the same numbers.
    """
    if dtype == jnp.bfloat16 and mesh_axes_of("embed"):
        weight = jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
    return weight.astype(dtype)


def _weighted_forward(
    spec: str,
    axes: tuple[str, ...],
    x: jax.Array,
    weight: jax.Array,
    out_dtype: jnp.dtype | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    whole = _gathered(axes, rounded(weight, x.dtype))
    return plain_einsum(spec, x, whole, out_dtype or x.dtype), (x, weight)


def _weighted_backward(
    spec: str,
    axes: tuple[str, ...],
    out_dtype: jnp.dtype | None,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, weight = operands
    (x_axes, weight_axes), out_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    cotangent, whole = cotangent.astype(x.dtype), _gathered(axes, rounded(weight, x.dtype))
    dx = plain_einsum(f"{out_axes},{weight_axes}->{x_axes}", cotangent, whole, x.dtype)
    if not mesh_axes_of("embed") or not _is_matrix(spec, axes):
        gradient = gradient_product(f"{x_axes},{out_axes}->{weight_axes}", x, cotangent)
        return dx, constrain(gradient, axes).astype(weight.dtype)
    return dx, _scattered_gradient(spec, weight, axes, x, cotangent).astype(weight.dtype)


def _is_matrix(spec: str, axes: tuple[str, ...]) -> bool:
    """Whether the gradient of a weight can be computed as a matrix whose rows are "embed": one
    operand has all its other axes, together at the end. Those of a convolution have not."""
    if "embed" not in axes:
        return False
    (x_axes, weight_axes), out_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    columns = weight_axes.replace(weight_axes[axes.index("embed")], "")
    return len(columns) == 1 or x_axes.endswith(columns) or out_axes.endswith(columns)


def _scattered_gradient(
    spec: str, weight: jax.Array, axes: tuple[str, ...], x: jax.Array, cotangent: jax.Array
) -> jax.Array:
    """The gradient of a weight, reduce-scattered along "embed".

    It is computed as a matrix whose rows are "embed". libtpu reduce-scatters rows; with 128 columns
    on each device, or more axes, it all-reduces instead (as of 0.0.52), at twice the bytes.
    """
    (x_axes, weight_axes), out_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    axis = axes.index("embed")
    row, columns = weight_axes[axis], weight_axes.replace(weight_axes[axis], "")

    def merged(array: jax.Array, letters: str) -> tuple[jax.Array, str]:
        if not letters.endswith(columns):
            return array, letters
        kept = array.ndim - len(columns)
        return array.reshape(*array.shape[:kept], -1), letters[:kept] + columns[0]

    (x, x_axes), (cotangent, out_axes) = merged(x, x_axes), merged(cotangent, out_axes)
    gradient = gradient_product(f"{x_axes},{out_axes}->{row}{columns[0]}", x, cotangent)
    gradient = constrain(gradient, ("embed", axes[weight_axes.index(columns[0])]))
    sizes = dict(zip(weight_axes, weight.shape, strict=True))
    parts = gradient.reshape([sizes[letter] for letter in row + columns])
    return constrain(jnp.moveaxis(parts, 0, axis), axes)


weighted.defvjp(_weighted_forward, _weighted_backward)
