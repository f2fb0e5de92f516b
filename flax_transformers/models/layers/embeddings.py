"""Embedding tables and the input of the layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_transformers.models.config import DropoutGenerator, TextConfig
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.parallel.partitioning import (
    HIDDEN,
    constrain,
    gradient_dtype,
    mesh_axes_of,
    parts,
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lookup(axes: tuple[str, str], dtype: jnp.dtype, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of ``table`` [rows, features] at ``ids`` [...], rounded to ``dtype``; an id beyond the
    last row gives NaN, and one below 0 counts from the end.

    ``axes`` are the logical names of the table's axes. The gradient of a row is summed over all its
    uses in float32 on each device, and over the mesh in ``partitioning.gradient_dtype``.

    If a mesh divides the features among devices that have different ids, either the table and its
    gradient are communicated, or the vectors: each device looks up its part of the features for
    all ids of its group. The smaller of the two is chosen.
    """
    if not _send_vectors(axes, table, ids):
        return jnp.take(constrain(table.astype(dtype), (axes[0], None)), ids, axis=0)
    return jax.lax.with_sharding_constraint(
        jnp.take(table.astype(dtype), ids, axis=0), _spec(axes, ids)
    )


def _send_vectors(axes: tuple[str, str], table: jax.Array, ids: jax.Array) -> bool:
    """Whether communicating the vectors of ``ids`` [B, T] takes fewer bytes than the table [V, D]:
    two bytes each way, against two for the table and an all-reduce of its float32 gradient."""
    if ids.ndim != 2 or parts(axes[1]) == 1 or ids.shape[0] % parts("batch"):
        return False
    return 2 * ids.size < 5 * len(table) * parts("batch") * parts("length")


def _spec(axes: tuple[str, str], ids: jax.Array) -> PartitionSpec:
    """Vectors [B, T, D] divided along their features as the table is, and along the batch by the
    axes that remain."""
    features = mesh_axes_of(axes[1])
    batch = tuple(axis for axis in mesh_axes_of("batch") if axis not in features)
    return PartitionSpec(batch, mesh_axes_of("length"), features)


def _lookup_forward(
    axes: tuple[str, str], dtype: jnp.dtype, table: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(axes, dtype, table, ids), (table, ids)


def _lookup_backward(
    axes: tuple[str, str],
    dtype: jnp.dtype,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, None]:
    table, ids = operands
    if _send_vectors(axes, table, ids):
        cotangent = jax.lax.with_sharding_constraint(cotangent, _spec(axes, ids))
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(cotangent.astype(jnp.float32))
    total = constrain(total.astype(gradient_dtype(dtype)), axes)
    return total.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


class Embedding(nn.Module):
    """A table of ``rows`` vectors; the parameter is ``embedding`` [rows, features] in float32.

    ``axes`` are the logical names of rows and features. An id beyond the last row gives NaN, and
    one below 0 counts from the end. With ``entries``, the rows that are not padding, NaN is for all
    ids below 0, and from ``entries`` on.
    """

    rows: int
    features: int
    dtype: jnp.dtype
    axes: tuple[str, str] = ("vocab", "embed")
    init_std: float = 0.02
    entries: int | None = None

    def setup(self) -> None:
        init = nn.with_logical_partitioning(truncated_normal(self.init_std), self.axes)
        self.embedding = self.param("embedding", init, (self.rows, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Vectors [..., features] of integer ``ids`` [...]."""
        if self.entries is not None:
            ids = jnp.where((ids >= 0) & (ids < self.entries), ids, self.rows)
        return lookup(self.axes, self.dtype, self.embedding, ids)


def token_table(config: TextConfig, dtype: jnp.dtype) -> Embedding:
    """The table of token embeddings, with padded rows; NaN for ids that are not in the vocabulary,
    such as those of another tokenizer."""
    rows, init_std = config.padded_vocab_size, config.initial_std("words")
    return Embedding(
        rows, config.embedding_width, dtype, init_std=init_std, entries=config.vocab_size
    )


def learned_positions(config: TextConfig, dtype: jnp.dtype) -> nn.Module:
    """The table of position vectors: from position ids [B, T], counted from ``position_offset``,
    to [B, T, E]; NaN beyond the last."""
    rows, axes = (config.max_positions or 0) + config.position_offset, ("positions", "embed")
    return Embedding(rows, config.embedding_width, dtype, axes, config.init_std)


def embedding_projection(config: TextConfig, dtype: jnp.dtype) -> Linear:
    """The map of embeddings [B, T, E] to the width of the layers [B, T, D]."""
    shape = config.embedding_width, config.hidden_size
    return Linear(
        "BTE,ED->BTD", shape, ("features", "embed"), dtype=dtype, init_std=config.init_std
    )


class InputEmbeddings(nn.Module):
    """From token embeddings to the input of the layers: scaled, plus positions and token types,
    and mapped to their width (ALBERT, arXiv:1909.11942 section 3.1) if the config says so.

    ``positions`` makes the module of the position vectors, as ``learned_positions`` does.
    """

    config: TextConfig
    dtype: jnp.dtype
    positions: Callable[[TextConfig, jnp.dtype], nn.Module] = learned_positions
    dropout_generator: DropoutGenerator = "auto"

    def setup(self) -> None:
        c = self.config
        if c.positions == "learned":
            self.position = self.positions(c, self.dtype)
        if c.token_types:
            axes = ("token_types", "embed")
            width = c.embedding_width
            self.token_type = Embedding(c.token_types, width, self.dtype, axes, c.init_std)
        if c.embedding_norm:
            self.norm = make_norm(c, self.dtype)
        if c.project_embeddings:
            self.projection = embedding_projection(c, self.dtype)
        self.dropout = Dropout(c.dropout, self.dropout_generator)

    def __call__(
        self,
        embedded_BTE: jax.Array,
        position_ids: jax.Array,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Input of the layers [B, T, D] for token embeddings [B, T, E] and integer ids [B, T]; NaN
        beyond the last position."""
        x_BTE = self.total(embedded_BTE, position_ids, token_type_ids, deterministic=deterministic)
        x_BTD = self.projection(x_BTE) if self.config.project_embeddings else x_BTE
        return constrain(x_BTD, HIDDEN)

    def total(
        self,
        embedded_BTE: jax.Array,
        position_ids: jax.Array,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """The sum of all embeddings [B, T, E], normalised and with dropout, before the map."""
        c, x_BTE = self.config, embedded_BTE
        if c.scale_embeddings:
            x_BTE = x_BTE * jnp.asarray(c.hidden_size**0.5, x_BTE.dtype)
        if c.token_types:
            types_BT = jnp.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            x_BTE = x_BTE + self.token_type(types_BT)
        if c.positions == "learned":
            x_BTE = x_BTE + self.position(position_ids + c.position_offset)
        if c.embedding_norm:
            x_BTE = self.norm(x_BTE)
        return self.dropout(x_BTE, deterministic=deterministic)


def mask_padded_vocabulary(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Set the logits [..., V] of padding rows to the lowest float32.

    Their probability is then exactly zero in the loss and in decoding.
    """
    if logits.shape[-1] == vocab_size:
        return logits
    real_V = jnp.arange(logits.shape[-1]) < vocab_size
    lowest = jnp.finfo(logits.dtype).min
    return jnp.where(jnp.expand_dims(real_V, tuple(range(logits.ndim - 1))), logits, lowest)
