"""Cross-entropy over a vocabulary that may be sharded, place by place and as sums."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.parallel.partitioning import gradient_dtype, parts


class Scores(NamedTuple):
    """What a model says of labels, float32 [...] each, in nats.

    ``nll``: negative log-likelihood of the label. ``correct``: 1 where no other entry has a logit
    as high as the label's; a tie is no answer. ``log_z``: log of the sum of the exponentials of all
    logits. ``mean_nll``: mean negative log-likelihood of all entries of the vocabulary, the label
    among them; entries that only pad the vocabulary, at the lowest float32, do not count.
    """

    nll: jax.Array
    correct: jax.Array
    log_z: jax.Array
    mean_nll: jax.Array

    def smoothed(self, label_smoothing: float) -> jax.Array:
        """Cross-entropy with a target of ``1 - s`` at the label plus ``s / V`` everywhere.

        That is the definition of arXiv:1512.00567 §7, PyTorch and Hugging Face. tensor2tensor and
        T5X give the label exactly ``1 - s`` and the V - 1 others ``s / (V - 1)`` each: their s is
        ours times (V - 1) / V. Nothing is subtracted: a perfect model does not reach zero.
        """
        if label_smoothing == 0.0:
            return self.nll
        return (1.0 - label_smoothing) * self.nll + label_smoothing * self.mean_nll


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Scores:
    """Scores float32 [...] of ``logits`` float32 [..., V] and ``labels`` integer [...].

    The label's logit is picked by comparison and not by a gather: over a sharded vocabulary a
    comparison stays on each device, where a gather would collect all logits first.
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


_LANES = 128
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Words(NamedTuple):
    """Some words, or [blocks, ...] of them: t divisions of the vocabulary, v words of each.

    ``table`` float32 [t, v, D], ``bias`` float32 [t, v].
    """

    table: jax.Array
    bias: jax.Array


def word_scores(words: Any, labels_BM: jax.Array, max_logits: int) -> Scores:
    """Scores float32 [B, M] of ``labels_BM``, with at most ``max_logits`` logits on a device.

    ``words`` is the model's ``Unembedding`` of hidden states [B, M, D]. Where the logits of all
    places are more than that, they are made some words at a time, and in the backward pass once
    more. Dividing words and not places, a table that lies divided over the mesh is gathered once in
    each pass, and its gradient reduced once. Equal to the whole up to rounding.
    """
    vocabulary, divisions = len(words.table_VD), parts("vocab")
    places = labels_BM.size // (parts("batch") * parts("length"))
    each = vocabulary // divisions
    if places * each <= max_logits:
        return cross_entropy(words.logits(), labels_BM)
    blocks = -(-each // max(_LANES, max_logits // places // _LANES * _LANES))
    size = -(-each // blocks // _LANES) * _LANES

    def cut(x_V: jax.Array) -> jax.Array:
        """[V, ...] to [blocks, t, v, ...], filled up with zeros."""
        rest = x_V.shape[1:]
        filler = [(0, 0), (0, blocks * size - each), *((0, 0) for _ in rest)]
        x_V = jnp.pad(x_V.reshape(divisions, each, *rest), filler)
        return x_V.reshape(divisions, blocks, size, *rest).swapaxes(0, 1)

    bias_V = jnp.zeros(vocabulary, jnp.float32) if words.bias_V is None else words.bias_V
    number_V = jnp.arange(1, vocabulary + 1, dtype=jnp.int32)
    numbers = cut(jnp.where(number_V <= words.size, number_V, 0)) - 1  # -1 at what only pads
    table = nn.with_logical_constraint(cut(words.table_VD), (None, "vocab", None, "embed"))
    return _by_blocks(words.size, words.hidden_BMD, _Words(table, cut(bias_V)), numbers, labels_BM)


def _block_logits(
    hidden_BMD: jax.Array, words: _Words, number_tv: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [B, M, t, v] of one block, and its whole table in the dtype of ``hidden``."""
    table_tvD = words.table.astype(hidden_BMD.dtype)
    table_tvD = nn.with_logical_constraint(table_tvD, ("vocab", None, None))
    logits = _einsum("BMD,tvD->BMtv", hidden_BMD, table_tvD) + words.bias[None, None]
    logits = jnp.where(number_tv[None, None] >= 0, logits, _LOWEST)
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab", None)), table_tvD


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(
    size: int, hidden_BMD: jax.Array, words: _Words, numbers: jax.Array, labels_BM: jax.Array
) -> Scores:
    """``cross_entropy`` of the logits of all blocks. ``numbers`` int32 [blocks, t, v] are the ids
    of the words, -1 where none is, ``size`` how many there are."""
    zero_BM = jnp.zeros(labels_BM.shape, jnp.float32)

    def add(so_far: Any, block: Any) -> tuple[Any, None]:
        highest, ties, total, label_logit, mean_logit = so_far
        words, number_tv = block
        logits, _ = _block_logits(hidden_BMD, words, number_tv)
        here = jnp.max(logits, axis=(2, 3))
        ties_here = jnp.sum(logits == here[..., None, None], axis=(2, 3))
        ties = jnp.where(here > highest, 0, ties) + jnp.where(here >= highest, ties_here, 0)
        above, highest = highest, jnp.maximum(highest, here)
        total *= jnp.exp(above - highest)
        total += jnp.sum(jnp.exp(logits - highest[..., None, None]), axis=(2, 3))
        chosen = labels_BM[..., None, None] == number_tv[None, None]
        label_logit += jnp.sum(jnp.where(chosen, logits, 0.0), axis=(2, 3))
        mean_logit += (
            jnp.sum(jnp.where(number_tv[None, None] >= 0, logits, 0.0), axis=(2, 3)) / size
        )
        return (highest, ties, total, label_logit, mean_logit), None

    start = (zero_BM + _LOWEST, zero_BM.astype(jnp.int32), zero_BM, zero_BM, zero_BM)
    (highest, ties, total, label_logit, mean_logit), _ = jax.lax.scan(add, start, (words, numbers))
    log_z = highest + jnp.log(total)
    correct = (label_logit == highest) & (ties == 1)
    return Scores(
        log_z - label_logit, correct.astype(jnp.float32), log_z, mean_nll=log_z - mean_logit
    )


def _by_blocks_forward(
    size: int, hidden_BMD: jax.Array, words: _Words, numbers: jax.Array, labels_BM: jax.Array
) -> tuple[Scores, Any]:
    scores = _by_blocks(size, hidden_BMD, words, numbers, labels_BM)
    return scores, (hidden_BMD, words, numbers, labels_BM, scores.log_z)


def _by_blocks_backward(
    size: int, residuals: Any, cotangents: Scores
) -> tuple[jax.Array, _Words, None, None]:
    hidden_BMD, words, numbers, labels_BM, log_z = residuals
    of_nll, of_mean = cotangents.nll[..., None, None], cotangents.mean_nll[..., None, None]
    of_log_z = cotangents.log_z[..., None, None] + of_nll + of_mean

    def add(hidden_gradient: jax.Array, block: Any) -> tuple[jax.Array, _Words]:
        words, number_tv = block
        logits, table_tvD = _block_logits(hidden_BMD, words, number_tv)
        gradient = of_log_z * jnp.exp(logits - log_z[..., None, None])
        gradient -= jnp.where(number_tv[None, None] >= 0, of_mean / size, 0.0)
        gradient -= jnp.where(labels_BM[..., None, None] == number_tv[None, None], of_nll, 0.0)
        bias = jnp.sum(gradient, axis=(0, 1))
        gradient = gradient.astype(hidden_BMD.dtype)
        hidden_gradient += _einsum("BMtv,tvD->BMD", gradient, table_tvD)
        table = jnp.einsum(
            "BMtv,BMD->tvD",
            gradient,
            hidden_BMD,
            preferred_element_type=gradient_dtype(hidden_BMD.dtype),
        )
        table = nn.with_logical_constraint(table, ("vocab", None, "embed")).astype(jnp.float32)
        return hidden_gradient, _Words(table, bias)

    zeros = jnp.zeros(hidden_BMD.shape, jnp.float32)
    hidden_gradient, gradients = jax.lax.scan(add, zeros, (words, numbers))
    return hidden_gradient.astype(hidden_BMD.dtype), gradients, None, None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)
