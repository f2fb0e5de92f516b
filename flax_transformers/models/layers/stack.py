"""A stack of layers that may repeat a pattern, scanned or unrolled.

Parameters are stored stacked in either case. A stack with pattern ``(a, b)`` repeated ``n`` times
has ``layers/block_0`` and ``layers/block_1`` whose leaves have a leading axis of length ``n``,
named "layers". ``first`` and ``remainder`` are layers before and after that do not fit the pattern
(ModernBERT's first layer, a depth that the pattern does not divide); they are stacked too, with a
leading axis of one, so that every layer parameter has the same rank.

For decoding on a CPU, ``separate_layers`` gives each layer parameters of its own instead: a loop
over tokens would copy the slice of every layer for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.kernels.local import ATTENDED
from flax_transformers.models.layers.block import TransformerBlock
from flax_transformers.parallel.matmul import PROJECTION

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
``(hidden_BTD, broadcast, per_layer) -> (hidden_BTD, output)``: ``broadcast`` is a pytree that every
layer gets whole (masks, positions), ``per_layer`` a pytree of this layer's slice (drop rate,
cache), ``output`` a pytree that comes back stacked (updated cache, auxiliary sums), of the same
structure in every layer."""


def separate_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model with those of each layer apart: ``layers_0/block_0`` instead of the
    first slice of ``layers/block_0``. ``Stack`` accepts both; outputs of layers, such as a cache,
    are then tuples in place of arrays with an axis of layers, and so is ``per_layer``."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        if name in _PARTS and isinstance(value, Mapping) and "block_0" in value:
            for i in range(len(jax.tree.leaves(value)[0])):
                found[f"{name}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], dict(value))
        else:
            found[name] = separate_layers(value) if isinstance(value, Mapping) else value
    return found


def are_separate(params: Mapping[str, Any]) -> bool:
    """Whether parameters are those of ``separate_layers``."""
    return any(
        name == "layers_0" or (isinstance(value, Mapping) and are_separate(value))
        for name, value in params.items()
    )


def separate_leaves(stacked: Any) -> Any:
    """A pytree with tuples in place of arrays [L, ...]."""
    return jax.tree.map(lambda leaf: tuple(leaf[i] for i in range(len(leaf))), stacked)


_PARTS = ("first", "layers", "remainder")


def _at(per_layer: Any, index: int | slice) -> Any:
    """Elements of all leaves, which are arrays or tuples."""
    is_leaf = lambda leaf: type(leaf) is tuple  # noqa: E731
    return jax.tree.map(lambda leaf: leaf[index], per_layer, is_leaf=is_leaf)


class _Period(nn.Module):
    """One pass over the pattern; ``per_layer`` has a leading axis over the pattern."""

    pattern: tuple[Block, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, hidden: jax.Array, broadcast: Any, per_layer: Any) -> tuple[jax.Array, Any]:
        outputs = []
        for i, block in enumerate(self.pattern):
            layer = block(deterministic=self.deterministic, name=f"block_{i}")
            hidden, output = layer(hidden, broadcast, _at(per_layer, i))
            outputs.append(output)
        return hidden, tuple(outputs)


def _interleave(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])


class Stack(nn.Module):
    """Layers ``first + pattern * repeats + remainder``, applied in turn.

    ``scan`` compiles one pattern and loops over it; otherwise the loop is unrolled. Results,
    parameters and dropout masks are the same. ``remat`` is "none" or a name in REMAT_POLICIES.
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
        self,
        hidden: jax.Array,
        broadcast: Any = None,
        per_layer: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Run ``hidden`` [B, T, D] through all layers.

        ``per_layer`` is a pytree of arrays [num_layers, ...] or None. Returns the final hidden
        states and the outputs of the layers, a pytree of arrays [num_layers, ...].
        """
        outputs, start = [], 0
        parts = zip(
            _PARTS,
            (self.first, self.pattern, self.remainder),
            (1, self.repeats, 1),
            strict=True,
        )
        if self.has_variable("params", "layers_0"):
            return self._separate(list(parts), hidden, broadcast, per_layer, deterministic)
        for name, pattern, repeats in parts:
            count = len(pattern) * repeats
            if count == 0:
                continue
            rows, grid = slice(start, start + count), (repeats, len(pattern))
            part = jax.tree.map(
                lambda leaf, rows=rows, grid=grid: leaf[rows].reshape(*grid, *leaf.shape[1:]),
                per_layer,
            )
            scanned = self._scanned(pattern, repeats, deterministic, name)
            hidden, output = scanned(hidden, broadcast, part)
            # From one array [repeats, ...] per position in the pattern to the order of layers.
            outputs.append(jax.tree.map(_interleave, *output))
            start += count
        return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    def _separate(
        self,
        parts: list[tuple[str, tuple[Block, ...], int]],
        hidden: jax.Array,
        broadcast: Any,
        per_layer: Any,
        deterministic: bool,
    ) -> tuple[jax.Array, Any]:
        """``__call__`` with the parameters of ``separate_layers``."""
        outputs: list[Any] = []
        for name, pattern, repeats in parts:
            for repeat in range(repeats if pattern else 0):
                period = _Period(pattern, deterministic, name=f"{name}_{repeat}")
                own = _at(per_layer, slice(len(outputs), len(outputs) + len(pattern)))
                hidden, output = period(hidden, broadcast, own)
                outputs.extend(output)
        return hidden, jax.tree.map(lambda *leaves: leaves, *outputs)

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
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=repeats,
            unroll=1 if self.scan else repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(pattern, deterministic, name=name)


def make_stack(
    config: TransformerConfig,
    compute: ComputeConfig,
    block: Block = TransformerBlock,
    *,
    cross_attention: bool = False,
) -> Stack:
    """The layers of a config, which differ in their windows at most."""
    layers = tuple(
        partial(block, config, compute, cross_attention=cross_attention, window=window)
        for window in config.windows
    )
    length = period(config.windows)
    repeats = len(layers) // length
    return Stack(
        pattern=layers[:length],
        repeats=repeats,
        remainder=layers[length * repeats :],
        scan=compute.scan_layers,
        remat=compute.remat,
    )


def period(kinds: tuple[Any, ...]) -> int:
    """Length of the shortest pattern that ``kinds`` repeats, perhaps not whole at the end."""
    lengths = range(1, len(kinds) + 1)
    return next((n for n in lengths if kinds[n:] == kinds[: len(kinds) - n]), 1)
