"""A stack of layers that may repeat a pattern, scanned or written out.

Parameters are stored stacked in either case. A stack with pattern ``(a, b)`` repeated ``n`` times
has ``layers/block_0`` and ``layers/block_1`` whose leaves have a leading axis of length ``n``,
named "layers". ``first`` and ``remainder`` are the layers before and after that do not fit the
pattern (ModernBERT's first layer, a depth that the pattern does not divide); they are stacked too,
with a leading axis of one, so that every layer parameter has the same rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.kernels.local import ATTENDED
from flax_transformers.models.layers.linear import PROJECTION

REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION, ATTENDED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PROJECTION, ATTENDED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

Block = Callable[..., nn.Module]
"""Makes one layer: ``block(deterministic=bool, name=str)``. The layer's call is
``(hidden_BTD, shared, own) -> (hidden_BTD, out)``: ``shared`` is a pytree that every layer gets
whole (masks, positions), ``own`` a pytree of this layer's slice (drop rate, cache), ``out`` a
pytree that comes back stacked (new cache, auxiliary sums), the same in every layer, or None."""


class _Period(nn.Module):
    """One pass over the pattern; ``own`` has a leading axis over the pattern's positions."""

    pattern: tuple[Block, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, hidden: jax.Array, shared: Any, own: Any) -> tuple[jax.Array, Any]:
        outs = []
        for i, block in enumerate(self.pattern):
            layer = block(deterministic=self.deterministic, name=f"block_{i}")
            hidden, out = layer(hidden, shared, jax.tree.map(lambda leaf, i=i: leaf[i], own))
            outs.append(out)
        return hidden, tuple(outs)


def _interleave(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])


class Stack(nn.Module):
    """Layers ``first + pattern * repeats + remainder``, applied in turn.

    ``scan`` compiles one pattern in a loop; otherwise the loop is written out. The numbers, the
    parameters and the dropout masks are the same. ``remat`` is "none" or a name in REMAT_POLICIES.
    """

    pattern: tuple[Block, ...]
    repeats: int
    first: tuple[Block, ...] = ()
    remainder: tuple[Block, ...] = ()
    scan: bool = True
    remat: str = "none"

    @property
    def num_layers(self) -> int:
        return len(self.first) + len(self.pattern) * self.repeats + len(self.remainder)

    @nn.compact
    def __call__(
        self, hidden: jax.Array, shared: Any = None, own: Any = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, Any]:
        """Runs ``hidden`` [B, T, D] through all layers.

        ``own`` is a pytree of arrays [num_layers, ...] or None. Returns the final hidden states
        and what the layers gave back, a pytree of arrays [num_layers, ...].
        """
        outs, start = [], 0
        for name, pattern, repeats in (
            ("first", self.first, 1),
            ("layers", self.pattern, self.repeats),
            ("remainder", self.remainder, 1),
        ):
            count = len(pattern) * repeats
            if count == 0:
                continue
            rows, grid = slice(start, start + count), (repeats, len(pattern))
            part = jax.tree.map(
                lambda leaf, rows=rows, grid=grid: leaf[rows].reshape(*grid, *leaf.shape[1:]), own
            )
            scanned = self._scanned(pattern, repeats, deterministic, name)
            hidden, out = scanned(hidden, shared, part)
            # From one array [repeats, ...] per place in the pattern to the order of layers.
            outs.append(jax.tree.map(_interleave, *out))
            start += count
        return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)

    def _scanned(
        self, pattern: tuple[Block, ...], repeats: int, deterministic: bool, name: str
    ) -> nn.Module:
        period = _Period
        if self.remat != "none":
            # Inside a loop the compiler cannot merge the recomputation with the first computation;
            # a loop of one pass is no loop.
            in_loop = self.scan and repeats > 1
            period = nn.remat(period, policy=REMAT_POLICIES[self.remat], prevent_cse=not in_loop)
        return nn.scan(
            period,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=repeats,
            unroll=1 if self.scan else repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(pattern, deterministic, name=name)
