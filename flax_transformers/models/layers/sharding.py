"""Logical names of activation axes. ``parallel/rules.py`` maps them to a mesh.

Parameters use the names ``vocab embed features heads key_heads head_dim mlp positions token_types
norm labels layers expert router channels patch_height patch_width``;
activations use ``batch length features heads key_heads head_dim mlp vocab``.
"""

from __future__ import annotations

import flax.linen as nn
import jax

HIDDEN = ("batch", "length", "features")
HEADS = ("batch", "length", "heads", "head_dim")
KEY_HEADS = ("batch", "length", "key_heads", "head_dim")
SCORES = ("batch", "heads", "length", None)
INTERMEDIATE = ("batch", "length", "mlp")
LOGITS = ("batch", "length", "vocab")


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrain the sharding of ``x`` to logical ``axes``, replicated along those that are None; a
    no-op without a mesh."""
    return nn.with_logical_constraint(x, axes)
