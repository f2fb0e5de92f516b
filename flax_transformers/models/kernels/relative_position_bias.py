"""Attention bias by the distance between query and key.

B batch, T length of queries, S of keys, N heads, R largest distance with a bias of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.parallel.partitioning import parts


class RelativePositionBias(struct.PyTreeNode):
    """A bias for each head and distance, in symbolic form (arXiv:1910.10683 §2.1).

    ``values_ND`` float32 [N, 2 * R + 1] is added to the scores of keys from R positions before the
    query to R positions after it; larger distances count as R.
    """

    values_ND: jax.Array

    @property
    def reach(self) -> int:
        """R."""
        return self.values_ND.shape[1] // 2

    def at(self, distance: np.ndarray | jax.Array) -> jax.Array:
        """float32 [N, ...] at distances [...], key position minus query position."""
        index = distance.clip(-self.reach, self.reach) + self.reach
        return jnp.take(self.values_ND, index, axis=1)

    def dense(self, mask: AttentionMask, queries: int, keys: int) -> jax.Array:
        """float32 [B or 1, N, T, S], with the distances of the mask."""
        if mask.has_positions or parts("length") > 1:
            # Entry by entry: any mesh can divide this.
            return jnp.swapaxes(self.at(mask.distance(queries, keys)), 0, 1)
        return by_difference(self.at(np.arange(1 - queries, keys)), queries)[None]

    def blocks(self, size: int) -> jax.Array:
        """float32 [N, 2 * n + 1, size, size]: all distinct blocks of the bias of any length.

        Block n + o is for keys o blocks after the queries; larger offsets equal offset n.
        """
        away = self.blocks_away(size)
        starts = np.arange(-away, away + 1)[:, None] * size
        values_NOX = self.at(starts + np.arange(1 - size, size)[None, :])
        return by_difference(values_NOX, size)

    def blocks_away(self, size: int) -> int:
        """n of ``blocks``: a block that begins at distance R or more has one value throughout."""
        return -(-(self.reach - 1) // size) + 1


def by_difference(values: jax.Array, rows: int) -> jax.Array:
    """[..., rows + columns - 1] to [..., rows, columns], where entry (i, j) is the value at
    ``j - i + rows - 1``.

    Only copies, forward and backward: each row of a table that is one entry narrower than its
    content begins one entry earlier than the row above.
    """
    *rest, width = values.shape
    values = jnp.pad(values, [(0, 0)] * len(rest) + [(0, 1)])
    flat = jnp.broadcast_to(values[..., None, :], (*rest, rows, width + 1))
    flat = flat.reshape(*rest, rows * (width + 1))[..., : rows * width]
    return flat.reshape(*rest, rows, width)[..., rows - 1 :]
