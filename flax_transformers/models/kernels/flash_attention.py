"""Flash attention for TPUs with dropout, and with a bias by distance (T5): what JAX's has not.

As FlashAttention-2 (arXiv:2307.08691): one kernel forward, two backward. Nothing is as large as
[N, T, S]. Dropout masks are computed again in each kernel, from the indices of its block of scores.
Blocks of scores that are equally far from the diagonal have the same bias: all that differ, a few
for each head, are made beforehand, and the kernels pick theirs.

B Batch, T length of queries, S of keys, N heads, H head width, O blocks of bias, b block size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_transformers.models.kernels.dropout import is_kept
from flax_transformers.models.kernels.local import (
    ATTENDED,
    LANES,
    SEGMENTS,
    block_size,
    gathered,
    gathering,
    on_cpu,
    on_each_device,
    padded_to_lanes,
    part_index,
)
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.partitioning import HEADS, KEY_HEADS

LARGEST_BLOCK = 512
LARGEST_BIASED_BLOCK = 256
"""All blocks of a head's bias lie in a TPU core's memory at once, five of 256 KiB."""

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Two of them still have a difference."""


class Masks(NamedTuple):
    """Dropout of attention probabilities: the rate, and the words of a key for the hash."""

    rate: float
    words: jax.Array


def flash_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    mask: AttentionMask,
    scale: float,
    bias: RelativePositionBias | None = None,
    dropout: Masks | None = None,
) -> jax.Array:
    """``dot_product_attention`` with a mask by index in the sequence and as many heads of keys.

    With a bias, which gets its gradient too, or a causal mask there are as many keys as queries. A
    query without any key gets an undefined result, so its output must not affect the loss.
    """
    shape = (q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], k_BSNH.shape[1])
    rate, words = (0.0, jnp.zeros(2, jnp.uint32)) if dropout is None else dropout
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    if mask.query_segments is None or mask.key_segments is None:
        queries, keys = (jnp.ones(x.shape[:2], jnp.int32) for x in (q_BTNH, k_BSNH))
        mask = mask.replace(query_segments=queries, key_segments=keys)
    q_BTNH, k_BSNH, v_BSNH, segments = padded_to_lanes(q_BTNH, k_BSNH, v_BSNH, mask)
    attended_BTNH = on_each_device(
        gathering(partial(_attend, mask.causal, rate, shape)),
        (q_BTNH, k_BSNH, v_BSNH, None if bias is None else bias.values_ND, segments, words),
        (HEADS, KEY_HEADS, KEY_HEADS, None if bias is None else ("heads", None), SEGMENTS, (None,)),
        HEADS,
    )
    return attended_BTNH[:, : shape[2]]


def _attend(
    causal: bool,
    rate: float,
    shape: tuple[int, int, int, int],
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    values_ND: jax.Array | None,
    segments: tuple[jax.Array, jax.Array],
    words: jax.Array,
) -> jax.Array:
    """One device's part; ``shape`` [B, N, T, S] is that of all scores, without padding."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, gathered(k_BSNH), gathered(v_BSNH)))
    batch, heads, queries, _ = q.shape
    largest = LARGEST_BLOCK if values_ND is None else LARGEST_BIASED_BLOCK
    q_size = k_size = block_size(queries, largest)
    if values_ND is None and not causal:
        k_size = block_size(k.shape[2], largest)
    starts = (
        part_index("batch") * batch,
        part_index("heads") * heads,
        part_index("length") * (queries // q_size),
    )
    scalars = jnp.stack([jnp.asarray(start, jnp.int32) for start in starts])
    operands = {
        "scalars": jnp.concatenate([scalars, jax.lax.bitcast_convert_type(words, jnp.int32)]),
        "q": q,
        "k": k,
        "v": v,
        "q_segments": segments[0][:, :, None],
        "k_segments": segments[1][:, None, :],
    }
    if values_ND is not None:
        operands["bias"] = RelativePositionBias(values_ND).blocks(q_size)
    call = _Call(causal, rate, shape, (q_size, k_size))
    return jnp.swapaxes(_flash(call, operands), 1, 2)


@dataclass(frozen=True)
class _Call:
    """What is fixed when a kernel is compiled.

    ``shape`` [B, N, T, S] of the scores on all devices. ``sizes`` of blocks of queries and keys,
    which are equal where attention is causal or has a bias.
    """

    causal: bool
    rate: float
    shape: tuple[int, int, int, int]
    sizes: tuple[int, int]


Operands = dict[str, jax.Array]
"""Of a device: q [B, N, T, H], k and v [B, N, S, H], bias float32 [N, O, b, b] or none, and
segments int32 [B, T, 1] and [B, 1, S]. ``scalars`` int32 [5]: numbers of the first example, head
and block of queries, and the words of the key. The backward pass has also the cotangent, the
log-sum-exp, and the sums over H of cotangent times output, float32 [B, N, 1, T]."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(call: _Call, operands: Operands) -> jax.Array:
    """[B, N, T, H] of one device."""
    return _forward(call, operands)[0]


def _flash_forward(call: _Call, operands: Operands) -> tuple[jax.Array, Any]:
    out, lse = (checkpoint_name(x, ATTENDED) for x in _forward(call, operands))
    return out, (operands, out, lse)


def _flash_backward(call: _Call, kept: Any, cotangent: jax.Array) -> tuple[dict[str, Any]]:
    operands, out, lse = kept
    product = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
    product = jnp.sum(product, axis=-1)[:, :, None]
    operands = operands | {"cotangent": cotangent, "lse": lse, "product": product}
    gradients = _query_gradient(call, operands) | _other_gradients(call, operands)
    kinds = ("scalars", "q_segments", "k_segments")
    return (gradients | dict.fromkeys(kinds),)


_flash.defvjp(_flash_forward, _flash_backward)


def _run(
    kernel: Callable[..., None],
    order: str,
    call: _Call,
    operands: Operands,
    outputs: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    scratch: tuple[tuple[int, int], ...],
    products: int,
) -> list[jax.Array]:
    """Runs ``kernel`` for every block of scores, in which it makes so many ``products``.

    Its programs are numbered in the ``order`` of row b, head n, block of queries i and block of
    keys j, the last one fastest. ``outputs`` are arrays like the results, by a name of
    ``_block_specs``. ``scratch``: shapes of what is kept between programs, float32.
    """
    batch, heads, queries, width = operands["q"].shape
    keys = operands["k"].shape[2]
    counts = {
        "b": batch,
        "n": heads,
        "i": queries // call.sizes[0],
        "j": keys // call.sizes[1],
    }
    bias = operands.get("bias")
    specs = _block_specs(order, call, counts["i"], width, None if bias is None else bias.shape)
    names = [name for name in operands if name != "scalars"]
    scores = batch * heads * queries * keys // (1 + call.causal)
    moved = sum(x.size * x.dtype.itemsize for x in operands.values())
    name = kernel.__name__.strip("_")
    run = pl.pallas_call(
        partial(kernel, call, order, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(counts[axis] for axis in order),
            in_specs=[specs[name] for name in names],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width, transcendentals=scores, bytes_accessed=moved
        ),
        name=name,
        interpret=on_cpu(),
    )
    with jax.named_scope(name):
        found: list[jax.Array] = run(operands["scalars"], *(operands[name] for name in names))
    return found


def _block_specs(
    order: str, call: _Call, query_blocks: int, width: int, bias_shape: tuple[int, ...] | None
) -> dict[str, Any]:
    """Which block of each kind of array a program sees.

    Where attention is causal, the blocks after the diagonal, which no program works on, are not
    fetched either: the nearest before or after them is there already.
    """
    q_size, k_size = call.sizes

    def spec(shape: tuple[int | None, ...], block: Callable[..., tuple[Any, ...]]) -> Any:
        def index(*numbers: Any) -> tuple[Any, ...]:
            *numbers_in_order, scalars = numbers
            at = dict(zip(order, numbers_in_order, strict=True))
            b, n, i, j, first = at["b"], at["n"], at["i"], at["j"], scalars[2]
            if call.causal and order[-1] == "j":
                j = jnp.minimum(j, i + first)
            if call.causal and order[-1] == "i":
                i = jnp.clip(j - first, i, query_blocks - 1)
            return block(b, n, i, j, j - i - first)

        return pl.BlockSpec(shape, index)

    of_queries = spec((None, None, q_size, width), lambda b, n, i, j, off: (b, n, i, 0))
    of_keys = spec((None, None, k_size, width), lambda b, n, i, j, off: (b, n, j, 0))
    row = spec((None, None, 1, q_size), lambda b, n, i, j, off: (b, n, 0, i))
    specs = {
        **dict.fromkeys(("q", "cotangent"), of_queries),
        **dict.fromkeys(("k", "v"), of_keys),
        **dict.fromkeys(("lse", "product"), row),
        "q_segments": spec((None, q_size, 1), lambda b, n, i, j, off: (b, i, 0)),
        "k_segments": spec((None, 1, k_size), lambda b, n, i, j, off: (b, 0, j)),
    }
    if bias_shape is not None:
        offsets = bias_shape[1]
        specs["bias"] = spec(
            (None, None, q_size, k_size),
            lambda b, n, i, j, off: (n, _bias_number(off, offsets), 0, 0),
        )
        specs["biases"] = spec((None, *bias_shape[1:]), lambda b, n, i, j, off: (n, 0, 0, 0))
    return specs


def _bias_number(off: jax.Array, offsets: int) -> jax.Array:
    """Index among ``offsets`` blocks of bias for keys ``off`` blocks after the queries."""
    return jnp.clip(off, -(offsets // 2), offsets // 2) + offsets // 2


@dataclass(frozen=True)
class _Block:
    """The block of scores that a program of a kernel works on, and what it has been given.

    Numbers of the row b, the head n, and the blocks of queries i and keys j are those of the
    device. ``off``: by how many blocks the keys are after the queries.
    """

    call: _Call
    refs: Mapping[str, Any]
    b: jax.Array
    n: jax.Array
    i: jax.Array
    j: jax.Array
    off: jax.Array

    @classmethod
    def open(
        cls, call: _Call, order: str, names: Sequence[str], refs: Sequence[Any]
    ) -> tuple[_Block, Sequence[Any]]:
        """The block of this program, and the references that follow its inputs."""
        scalars, *others = refs
        numbers = {axis: pl.program_id(index) for index, axis in enumerate(order)}
        inputs = {"scalars": scalars, **dict(zip(names, others, strict=False))}
        off = numbers["j"] - numbers["i"] - scalars[2]
        return cls(call, inputs, **numbers, off=off), others[len(names) :]

    def __getitem__(self, name: str) -> jax.Array:
        return self.refs[name][...]

    @property
    def has_scores(self) -> jax.Array | bool:
        """Whether any query of the block attends to a key of it, by the causal mask."""
        return self.off <= 0 if self.call.causal else True

    def scores(self) -> jax.Array:
        """float32 [b, b]."""
        scores = _product(self["q"], self["k"], 1, 1)
        if "bias" in self.refs:
            scores += self["bias"]
        allowed = self["q_segments"] == self["k_segments"]
        if self.call.causal:
            row, column = (
                jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)
            )
            allowed &= column - row <= -self.off * self.call.sizes[0]
        return jnp.where(allowed, scores, _LOWEST)

    def dropped(self, x: jax.Array) -> jax.Array:
        """Numbers [b, b] that belong to probabilities, after dropout."""
        if self.call.rate == 0.0:
            return x
        scalars, (q_size, k_size) = self.refs["scalars"], self.call.sizes
        row, column = (
            jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            for axis, shape in enumerate(((q_size, 1), (1, k_size)))
        )
        at = (
            self.b + scalars[0],
            self.n + scalars[1],
            (self.i + scalars[2]) * q_size + row,
            self.j * k_size + column,
        )
        words = [scalars[index].astype(jnp.uint32) for index in (3, 4)]
        keep = 1.0 - self.call.rate
        return jnp.where(is_kept(words, keep, self.call.shape, at), x * (1.0 / keep), 0.0)


def _transposed(x: jax.Array) -> jax.Array:
    """[b, 1] of [1, b] and the reverse, by way of whole tiles, which every TPU can transpose."""
    rows, columns = x.shape
    if columns == 1:
        return jnp.broadcast_to(x, (rows, LANES)).T[:1]
    return jnp.broadcast_to(x, (LANES, columns)).T[:, :1]


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    # The compiler refuses bfloat16 at any other precision, whatever the default is set to.
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _forward(call: _Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The output, and the log-sum-exp of the scores float32 [B, N, 1, T]."""
    q = operands["q"]
    batch, heads, queries, width = q.shape
    row = jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32)
    scratch = [(call.sizes[0], columns) for columns in (1, 1, width)]
    out, lse = _run(
        _attention_fwd, "bnij", call, operands, {"q": q, "lse": row}, tuple(scratch), products=2
    )
    return out, lse


def _attention_fwd(call: _Call, order: str, names: Sequence[str], *refs: Any) -> None:
    block, (out, lse, highest, total, weighted) = _Block.open(call, order, names, refs)

    @pl.when(block.j == 0)
    def start() -> None:
        highest[...] = jnp.full_like(highest, _LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(block.has_scores)
    def add() -> None:
        scores, v = block.scores(), block["v"]
        before, now = highest[...], jnp.maximum(highest[...], scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(before - now)
        highest[...] = now
        total[...] = fade * total[...] + weights.sum(axis=1, keepdims=True)
        weights = block.dropped(weights).astype(v.dtype)
        weighted[...] = fade * weighted[...] + _product(weights, v, 1, 0)

    @pl.when(block.j == pl.num_programs(3) - 1)
    def end() -> None:
        out[...] = (weighted[...] / total[...]).astype(out.dtype)
        lse[...] = _transposed(highest[...] + jnp.log(total[...]))


def _probabilities_and_gradient(block: _Block) -> tuple[jax.Array, jax.Array]:
    """The probabilities float32 [b, b] again, after dropout, and the gradient of the scores."""
    probabilities = jnp.exp(block.scores() - _transposed(block["lse"]))
    gradient = _product(block["cotangent"], block["v"], 1, 1)
    gradient = block.dropped(gradient) - _transposed(block["product"])
    return block.dropped(probabilities), probabilities * gradient


def _query_gradient(call: _Call, operands: Operands) -> dict[str, jax.Array]:
    q = operands["q"]
    scratch = ((call.sizes[0], q.shape[-1]),)
    (dq,) = _run(_attention_dq, "bnij", call, operands, {"q": q}, scratch, products=3)
    return {"q": dq}


def _attention_dq(call: _Call, order: str, names: Sequence[str], *refs: Any) -> None:
    block, (dq, total) = _Block.open(call, order, names, refs)

    @pl.when(block.j == 0)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(block.has_scores)
    def add() -> None:
        _, gradient = _probabilities_and_gradient(block)
        k = block["k"]
        total[...] += _product(gradient.astype(k.dtype), k, 1, 0)

    @pl.when(block.j == pl.num_programs(3) - 1)
    def end() -> None:
        dq[...] = total[...].astype(dq.dtype)


def _other_gradients(call: _Call, operands: Operands) -> dict[str, jax.Array]:
    """Those of keys, values and all blocks of bias."""
    k, v = operands["k"], operands["v"]
    outputs = {"k": k, "v": v}
    if "bias" in operands:
        outputs["biases"] = operands["bias"]
    scratch = ((call.sizes[1], k.shape[-1]),) * 2
    found = _run(_attention_dkv, "nbji", call, operands, outputs, scratch, products=4)
    return dict(zip(("k", "v", "bias"), found, strict=False))


def _attention_dkv(call: _Call, order: str, names: Sequence[str], *refs: Any) -> None:
    block, (dk, dv, *others) = _Block.open(call, order, names, refs)
    *dbias, k_total, v_total = others
    b, j, i = block.b, block.j, block.i

    if dbias:

        @pl.when((b == 0) & (j == 0) & (i == 0))
        def start_head() -> None:
            dbias[0][...] = jnp.zeros_like(dbias[0])

    @pl.when(i == 0)
    def start() -> None:
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(block.has_scores)
    def add() -> None:
        probabilities, gradient = _probabilities_and_gradient(block)
        q, cotangent = block["q"], block["cotangent"]
        if dbias:
            dbias[0][_bias_number(block.off, dbias[0].shape[0])] += gradient
        k_total[...] += _product(gradient.astype(q.dtype), q, 0, 0)
        v_total[...] += _product(probabilities.astype(q.dtype), cotangent, 0, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def end() -> None:
        dk[...] = k_total[...].astype(dk.dtype)
        dv[...] = v_total[...].astype(dv.dtype)
