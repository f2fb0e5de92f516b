"""Flash attention for TPUs with a bias by distance (T5), which is never materialised.

Blocks of scores that are equally far from the diagonal have the same bias. All that differ, a few
for each head, are made beforehand, and the kernels pick theirs: nothing is as large as [N, T, T].
Otherwise as FlashAttention-2 (arXiv:2307.08691): one kernel forward, two backward.

B Batch, T length of queries, S of keys, N heads, H head width, O blocks of bias, b block size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_transformers.models.kernels.local import (
    ATTENDED,
    SEGMENTS,
    block_size,
    gathered,
    gathering,
    on_cpu,
    on_each_device,
    padded,
    part_index,
)
from flax_transformers.models.layers.masks import AttentionMask
from flax_transformers.models.layers.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.sharding import HEADS, KEY_HEADS

LARGEST_BLOCK = 256
"""All blocks of a head's bias lie in a TPU core's memory at once, five of 256 KiB."""

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Two of them still have a difference."""


def biased_flash_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    mask: AttentionMask,
    bias: RelativePositionBias,
    scale: float,
) -> jax.Array:
    """``dot_product_attention`` of a sequence to itself, with mask and bias by index.

    Every place may look at itself at least. The bias gets its gradient too.
    """
    length = q_BTNH.shape[1]
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    if mask.query_segments is None:
        one = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        mask = mask.replace(query_segments=one, key_segments=one)
    q_BTNH, k_BTNH, v_BTNH, segments = padded(q_BTNH, k_BTNH, v_BTNH, mask)
    attended_BTNH = on_each_device(
        gathering(partial(_attend, mask.causal)),
        (q_BTNH, k_BTNH, v_BTNH, bias.values_ND, segments),
        (HEADS, KEY_HEADS, KEY_HEADS, ("heads", None), SEGMENTS),
        HEADS,
    )
    return attended_BTNH[:, :length]


def _attend(
    causal: bool,
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    values_ND: jax.Array,
    segments: tuple[jax.Array, jax.Array],
) -> jax.Array:
    queries = q_BTNH.shape[1]
    size = block_size(queries, LARGEST_BLOCK)
    first = jnp.asarray(part_index("length") * (queries // size), jnp.int32)[None]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, gathered(k_BSNH), gathered(v_BSNH)))
    blocks_NObb = RelativePositionBias(values_ND).blocks(size)
    seen_by, seen = segments[0][:, :, None], segments[1][:, None, :]
    return jnp.swapaxes(_flash(causal, first, q, k, v, blocks_NObb, seen_by, seen), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    causal: bool,
    first: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
) -> jax.Array:
    """[B, N, T, H] of q [B, N, T, H], k and v [B, N, S, H], bias float32 [N, O, b, b] and segments
    int32 [B, T, 1] and [B, 1, S]. ``first`` int32 [1]: number of the first block of queries."""
    return _forward(causal, first, q, k, v, bias, q_segments, k_segments)[0]


def _flash_forward(causal: bool, *operands: jax.Array) -> tuple[jax.Array, Any]:
    out, lse = (checkpoint_name(x, ATTENDED) for x in _forward(causal, *operands))
    return out, (operands, out, lse)


def _flash_backward(causal: bool, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    (first, q, k, v, bias, *segments), out, lse = kept
    product = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
    operands = q, k, v, bias, *segments, cotangent, lse, jnp.sum(product, axis=-1)[:, :, None]
    dq = _query_gradient(causal, first, *operands)
    dk, dv, dbias = _other_gradients(causal, first, *operands)
    return None, dq, dk, dv, dbias, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _call(
    kernel: Callable[..., None],
    order: str,
    causal: bool,
    operands: tuple[jax.Array, ...],
    outputs: dict[str, jnp.dtype],
    scratch: tuple[bool, ...],
    products: int,
) -> list[jax.Array]:
    """Runs ``kernel`` for every block of scores, in which it makes so many ``products``.

    Its programs are numbered in the ``order`` of row b, head n, block of queries i and block of
    keys j, the last one fastest. ``operands`` are those of ``_flash``; in the backward pass there
    follow the cotangent, the log-sum-exp and the rows of cotangent times output. ``outputs`` are
    named as in ``_block_specs``. ``scratch``: what is kept between programs, float32, as wide as a
    head or one.
    """
    _, q, k, _, bias, *_ = operands
    batch, heads, queries, width = q.shape
    keys, size = k.shape[2], bias.shape[-1]
    counts = {"b": batch, "n": heads, "i": queries // size, "j": keys // size}
    specs = _block_specs(order, causal, counts["i"], width, bias.shape)
    inputs = ("q", "k", "v", "bias", "q_segments", "k_segments", "q", "row", "row")
    row = (batch, heads, 1, queries)
    shapes = {"q": q.shape, "k": k.shape, "v": k.shape, "row": row, "biases": bias.shape}
    out_shape = [jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()]
    scores = batch * heads * queries * keys // (1 + causal)
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    name = kernel.__name__.strip("_")
    call = pl.pallas_call(
        partial(kernel, causal, order),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(counts[axis] for axis in order),
            in_specs=[specs[name] for name in inputs[: len(operands) - 1]],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[
                pltpu.VMEM((size, width if wide else 1), jnp.float32) for wide in scratch
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width, transcendentals=scores, bytes_accessed=moved
        ),
        name=name,
        interpret=on_cpu(),
    )
    with jax.named_scope(name):
        found: list[jax.Array] = call(*operands)
    return found


def _block_specs(
    order: str, causal: bool, query_blocks: int, width: int, bias_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Which block of each kind of array a program sees.

    Where attention is causal, the blocks after the diagonal, which no program works on, are not
    fetched either: the nearest before or after them is there already.
    """
    _, offsets, size, _ = bias_shape

    def spec(shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> Any:
        def index(*numbers: Any) -> tuple[Any, ...]:
            *numbers_in_order, first_ref = numbers
            at = dict(zip(order, numbers_in_order, strict=True))
            b, n, i, j, first = at["b"], at["n"], at["i"], at["j"], first_ref[0]
            if causal and order[-1] == "j":
                j = jnp.minimum(j, i + first)
            if causal and order[-1] == "i":
                i = jnp.clip(j - first, i, query_blocks - 1)
            return place(b, n, i, j, _bias_number(j - i - first, offsets))

        return pl.BlockSpec(shape, index)

    return {
        "q": spec((None, None, size, width), lambda b, n, i, j, o: (b, n, i, 0)),
        "k": spec((None, None, size, width), lambda b, n, i, j, o: (b, n, j, 0)),
        "v": spec((None, None, size, width), lambda b, n, i, j, o: (b, n, j, 0)),
        "bias": spec((None, None, size, size), lambda b, n, i, j, o: (n, o, 0, 0)),
        "biases": spec((None, *bias_shape[1:]), lambda b, n, i, j, o: (n, 0, 0, 0)),
        "q_segments": spec((None, size, 1), lambda b, n, i, j, o: (b, i, 0)),
        "k_segments": spec((None, 1, size), lambda b, n, i, j, o: (b, 0, j)),
        "row": spec((None, None, 1, size), lambda b, n, i, j, o: (b, n, 0, i)),
    }


def _bias_number(off: jax.Array, offsets: int) -> jax.Array:
    """Index among ``offsets`` blocks of bias for keys ``off`` blocks after the queries."""
    return jnp.clip(off, -(offsets // 2), offsets // 2) + offsets // 2


def _scores(causal: bool, off: jax.Array, *operands: Any) -> jax.Array:
    """float32 [b, b]; the keys are ``off`` blocks after the queries."""
    q, k, _, bias, q_segments, k_segments = (ref[...] for ref in operands)
    scores = _product(q, k, 1, 1) + bias
    allowed = q_segments == k_segments
    if causal:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        allowed &= column - row <= -off * len(bias)
    return jnp.where(allowed, scores, _LOWEST)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    # The compiler refuses bfloat16 at any other precision, whatever the default is set to.
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _off(order: str, first_ref: Any) -> jax.Array:
    i, j = (pl.program_id(order.index(axis)) for axis in "ij")
    return j - i - first_ref[0]


def _forward(causal: bool, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output, and the log-sum-exp of the scores float32 [B, N, 1, T]."""
    outputs = {"q": operands[1].dtype, "row": jnp.dtype(jnp.float32)}
    scratch = (False, False, True)
    out, lse = _call(_attention_fwd, "bnij", causal, operands, outputs, scratch, products=2)
    return out, lse


def _attention_fwd(causal: bool, order: str, first_ref: Any, *refs: Any) -> None:
    *operands, out, lse, highest, total, weighted = refs
    j, off = pl.program_id(3), _off(order, first_ref)

    @pl.when(j == 0)
    def start() -> None:
        highest[...] = jnp.full_like(highest, _LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when((off <= 0) | (not causal))
    def add() -> None:
        scores, v = _scores(causal, off, *operands), operands[2]
        before, now = highest[...], jnp.maximum(highest[...], scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(before - now)
        highest[...] = now
        total[...] = fade * total[...] + weights.sum(axis=1, keepdims=True)
        weighted[...] = fade * weighted[...] + _product(weights.astype(v.dtype), v[...], 1, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        out[...] = (weighted[...] / total[...]).astype(out.dtype)
        lse[0] = (highest[...] + jnp.log(total[...]))[:, 0]


def _probabilities_and_gradient(
    causal: bool, off: jax.Array, *operands: Any
) -> tuple[jax.Array, jax.Array]:
    """The probabilities float32 [b, b] again, and the gradient of the scores."""
    *of_scores, cotangent, lse, times_output = operands
    probabilities = jnp.exp(_scores(causal, off, *of_scores) - lse[0][:, None])
    gradient = _product(cotangent[...], of_scores[2][...], 1, 1) - times_output[0][:, None]
    return probabilities, probabilities * gradient


def _query_gradient(causal: bool, *operands: jax.Array) -> jax.Array:
    outputs = {"q": operands[1].dtype}
    return _call(_attention_dq, "bnij", causal, operands, outputs, (True,), products=3)[0]


def _attention_dq(causal: bool, order: str, first_ref: Any, *refs: Any) -> None:
    *operands, dq, total = refs
    j, off = pl.program_id(3), _off(order, first_ref)

    @pl.when(j == 0)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when((off <= 0) | (not causal))
    def add() -> None:
        _, gradient = _probabilities_and_gradient(causal, off, *operands)
        k = operands[1]
        total[...] += _product(gradient.astype(k.dtype), k[...], 1, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        dq[...] = total[...].astype(dq.dtype)


def _other_gradients(causal: bool, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Those of keys, values and all blocks of bias."""
    outputs = {"k": operands[2].dtype, "v": operands[3].dtype, "biases": jnp.dtype(jnp.float32)}
    scratch = (True, True)
    return tuple(_call(_attention_dkv, "nbji", causal, operands, outputs, scratch, products=4))


def _attention_dkv(causal: bool, order: str, first_ref: Any, *refs: Any) -> None:
    *operands, dk, dv, dbias, k_total, v_total = refs
    b, j, i, off = pl.program_id(1), pl.program_id(2), pl.program_id(3), _off(order, first_ref)

    @pl.when((b == 0) & (j == 0) & (i == 0))
    def start_head() -> None:
        dbias[...] = jnp.zeros_like(dbias)

    @pl.when(i == 0)
    def start() -> None:
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when((off <= 0) | (not causal))
    def add() -> None:
        probabilities, gradient = _probabilities_and_gradient(causal, off, *operands)
        q, cotangent = operands[0], operands[6]
        dbias[_bias_number(off, dbias.shape[0])] += gradient
        k_total[...] += _product(gradient.astype(q.dtype), q[...], 0, 0)
        v_total[...] += _product(probabilities.astype(q.dtype), cotangent[...], 0, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def end() -> None:
        dk[...] = k_total[...].astype(dk.dtype)
        dv[...] = v_total[...].astype(dv.dtype)
