"""Cross-entropy by position over a vocabulary that may be sharded, and its sums."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.objectives.base import LossTerms
from flax_transformers.parallel.matmul import gradient_product, plain_einsum
from flax_transformers.parallel.partitioning import LANES, parts


class Scores(NamedTuple):
    """Scores of labels, float32 [...] each, in nats.

    Attributes:
      nll: negative log-likelihood of the label.
      correct: 1 where the label's logit is greater than all others, else 0 (also for ties).
      log_z: log of the sum of the exponentials of all logits.
      mean_nll: mean negative log-likelihood over the vocabulary, without entries that only pad it,
        whose logits are the lowest float32.
    """

    nll: jax.Array
    correct: jax.Array
    log_z: jax.Array
    mean_nll: jax.Array

    def smoothed(self, label_smoothing: float) -> jax.Array:
        """Cross-entropy with a target of ``1 - s`` at the label plus ``s / V`` at every entry.

        This is the definition of arXiv:1512.00567 section 7, PyTorch and Hugging Face.
        tensor2tensor and T5X give the label ``1 - s`` and each of the V - 1 others
        ``s / (V - 1)``: their s is this one times (V - 1) / V. The entropy of the target is not
        subtracted, so that a perfect model does not reach zero.
        """
        if label_smoothing == 0.0:
            return self.nll
        return (1.0 - label_smoothing) * self.nll + label_smoothing * self.mean_nll


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Scores:
    """Scores float32 [...] of ``logits`` float32 [..., V] and ``labels`` integer [...].

    The label's logit is selected by comparison, not by a gather: with a sharded vocabulary, each
    device compares its own logits, while a gather would first collect all of them.
    """
    vocabulary = jnp.arange(logits.shape[-1])
    chosen = jnp.expand_dims(labels, -1) == jnp.expand_dims(vocabulary, tuple(range(labels.ndim)))
    label_logit = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    as_high = jnp.sum(logits >= jnp.expand_dims(label_logit, -1), axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    real = logits > 0.5 * jnp.finfo(jnp.float32).min
    mean_logit = jnp.mean(logits, axis=-1, where=real)
    return Scores(
        nll=log_z - label_logit,
        correct=(as_high == 1).astype(jnp.float32),
        log_z=log_z,
        mean_nll=log_z - mean_logit,
    )


def label_terms(
    name: str,
    scores: Scores,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    coefficient: float = 1.0,
    prefix: str = "",
) -> LossTerms:
    """The loss ``name`` of scores [...] and weights float32 [...].

    Its metrics are ``prefix`` + "loss", the cross-entropy without label smoothing, and ``prefix`` +
    "accuracy".
    """
    count = jnp.sum(weights)
    smoothed, nll, correct = (
        jnp.sum(values * weights)
        for values in (scores.smoothed(label_smoothing), scores.nll, scores.correct)
    )
    return LossTerms(
        losses={name: (smoothed, count, coefficient)},
        metrics={f"{prefix}loss": (nll, count), f"{prefix}accuracy": (correct, count)},
    )


_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Chunk(NamedTuple):
    """Unembedding of a chunk of the vocabulary: t shards, v entries of each; or [chunks, ...].

    ``table`` float32 [t, v, D], ``bias`` float32 [t, v].
    """

    table: jax.Array
    bias: jax.Array


def lm_scores(unembedding: Any, labels_BM: jax.Array, max_logits: int) -> Scores:
    """Scores float32 [B, M] of ``labels_BM``, with at most ``max_logits`` logits on a device.

    ``unembedding`` is the model's ``Unembedding`` of hidden states [B, M, D]. If there are more
    logits, they are computed for one chunk of the vocabulary at a time, and again in the backward
    pass. Because the vocabulary is divided and not the positions, a sharded table is gathered once
    in each pass, and its gradient reduced once. The result is that of `cross_entropy` up to
    rounding.
    """
    vocabulary, shards = len(unembedding.table_VD), parts("vocab")
    positions = labels_BM.size // (parts("batch") * parts("length"))
    each = vocabulary // shards
    if positions * each <= max_logits:
        return cross_entropy(unembedding.logits(), labels_BM)
    chunks = -(-each // max(LANES, max_logits // positions // LANES * LANES))
    size = -(-each // chunks // LANES) * LANES

    def cut(x_V: jax.Array) -> jax.Array:
        """[V, ...] to [chunks, t, v, ...], padded with zeros."""
        rest = x_V.shape[1:]
        filler = [(0, 0), (0, chunks * size - each), *((0, 0) for _ in rest)]
        x_V = jnp.pad(x_V.reshape(shards, each, *rest), filler)
        return x_V.reshape(shards, chunks, size, *rest).swapaxes(0, 1)

    bias_V = unembedding.bias_V
    bias_V = jnp.zeros(vocabulary, jnp.float32) if bias_V is None else bias_V
    id_V = jnp.arange(1, vocabulary + 1, dtype=jnp.int32)
    ids = cut(jnp.where(id_V <= unembedding.size, id_V, 0)) - 1  # -1 for padding
    table = nn.with_logical_constraint(cut(unembedding.table_VD), (None, "vocab", None, "embed"))
    chunk = _Chunk(table, cut(bias_V))
    fixed = _Fixed(unembedding.size, unembedding.softcap)
    return _chunked(fixed, unembedding.hidden_BMD, chunk, ids, labels_BM)


class _Fixed(NamedTuple):
    """Number of real entries of the vocabulary, and the bound of their logits or None."""

    size: int
    softcap: float | None


def _chunk_logits(
    hidden_BMD: jax.Array, chunk: _Chunk, id_tv: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits float32 [B, M, t, v] of one chunk, its table in the dtype of ``hidden``, and the
    derivative of the bound on the logits, if there is one."""
    table_tvD = chunk.table.astype(hidden_BMD.dtype)
    table_tvD = nn.with_logical_constraint(table_tvD, ("vocab", None, None))
    logits = (
        plain_einsum("BMD,tvD->BMtv", hidden_BMD, table_tvD, jnp.float32) + chunk.bias[None, None]
    )
    slope = None
    if softcap is not None:
        share = jnp.tanh(logits / softcap)
        logits, slope = softcap * share, 1.0 - share * share
    logits = jnp.where(id_tv[None, None] >= 0, logits, _LOWEST)
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab", None)), table_tvD, slope


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    fixed: _Fixed, hidden_BMD: jax.Array, chunks: _Chunk, ids: jax.Array, labels_BM: jax.Array
) -> Scores:
    """``cross_entropy`` over all chunks, which are [chunks, ...]. ``ids`` int32 [chunks, t, v] are
    those of the entries, -1 for padding."""
    zero_BM = jnp.zeros(labels_BM.shape, jnp.float32)

    def add(so_far: Any, xs: Any) -> tuple[Any, None]:
        highest, ties, total, label_logit, mean_logit = so_far
        chunk, id_tv = xs
        logits, _, _ = _chunk_logits(hidden_BMD, chunk, id_tv, fixed.softcap)
        here = jnp.max(logits, axis=(2, 3))
        ties_here = jnp.sum(logits == here[..., None, None], axis=(2, 3))
        ties = jnp.where(here > highest, 0, ties) + jnp.where(here >= highest, ties_here, 0)
        above, highest = highest, jnp.maximum(highest, here)
        total *= jnp.exp(above - highest)
        total += jnp.sum(jnp.exp(logits - highest[..., None, None]), axis=(2, 3))
        chosen = labels_BM[..., None, None] == id_tv[None, None]
        label_logit += jnp.sum(jnp.where(chosen, logits, 0.0), axis=(2, 3))
        total_logit = jnp.sum(jnp.where(id_tv[None, None] >= 0, logits, 0.0), axis=(2, 3))
        mean_logit += total_logit / fixed.size
        return (highest, ties, total, label_logit, mean_logit), None

    start = (zero_BM + _LOWEST, zero_BM.astype(jnp.int32), zero_BM, zero_BM, zero_BM)
    (highest, ties, total, label_logit, mean_logit), _ = jax.lax.scan(add, start, (chunks, ids))
    log_z = highest + jnp.log(total)
    correct = (label_logit == highest) & (ties == 1)
    return Scores(
        log_z - label_logit, correct.astype(jnp.float32), log_z, mean_nll=log_z - mean_logit
    )


def _chunked_forward(
    fixed: _Fixed, hidden_BMD: jax.Array, chunks: _Chunk, ids: jax.Array, labels_BM: jax.Array
) -> tuple[Scores, Any]:
    scores = _chunked(fixed, hidden_BMD, chunks, ids, labels_BM)
    return scores, (hidden_BMD, chunks, ids, labels_BM, scores.log_z)


def _chunked_backward(
    fixed: _Fixed, residuals: Any, cotangents: Scores
) -> tuple[jax.Array, _Chunk, None, None]:
    hidden_BMD, chunks, ids, labels_BM, log_z = residuals
    of_nll, of_mean = cotangents.nll[..., None, None], cotangents.mean_nll[..., None, None]
    of_log_z = cotangents.log_z[..., None, None] + of_nll + of_mean

    def add(hidden_gradient: jax.Array, xs: Any) -> tuple[jax.Array, _Chunk]:
        chunk, id_tv = xs
        logits, table_tvD, slope = _chunk_logits(hidden_BMD, chunk, id_tv, fixed.softcap)
        gradient = of_log_z * jnp.exp(logits - log_z[..., None, None])
        gradient -= jnp.where(id_tv[None, None] >= 0, of_mean / fixed.size, 0.0)
        gradient -= jnp.where(labels_BM[..., None, None] == id_tv[None, None], of_nll, 0.0)
        if slope is not None:
            gradient *= slope
        bias = jnp.sum(gradient, axis=(0, 1))
        gradient = gradient.astype(hidden_BMD.dtype)
        hidden_gradient += plain_einsum("BMtv,tvD->BMD", gradient, table_tvD, jnp.float32)
        table = gradient_product("BMtv,BMD->tvD", gradient, hidden_BMD)
        table = nn.with_logical_constraint(table, ("vocab", None, "embed")).astype(jnp.float32)
        return hidden_gradient, _Chunk(table, bias)

    zeros = jnp.zeros(hidden_BMD.shape, jnp.float32)
    hidden_gradient, gradients = jax.lax.scan(add, zeros, (chunks, ids))
    return hidden_gradient.astype(hidden_BMD.dtype), gradients, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
