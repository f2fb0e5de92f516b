"""Outputs of models: Hugging Face's names, as pytrees."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Outputs = dict[str, jax.Array]
"""What a head adds to a model's output, by the names of its fields."""


class HiddenStates(struct.PyTreeNode):
    """The result of ``hidden_states``, the input of heads and objectives.

    ``last_hidden_state`` [B, T, D] after the final norm; in encoder-decoders the decoder's, beside
    ``encoder_last_hidden_state`` [B, S, D]. ``auxiliary``: sums of the layers for auxiliary
    losses, a pytree of arrays [num_layers, B, ...] (of a mixture of experts), or None. ``cache``:
    the updated cache, if one was given.
    """

    last_hidden_state: jax.Array
    encoder_last_hidden_state: jax.Array | None = None
    auxiliary: Any = None
    cache: Any = None


class ModelOutput(struct.PyTreeNode):
    """The result of a model's ``__call__``; None for what an architecture does not have.

    ``logits`` float32: [B, T, vocab_size] of language models, [B, T, labels] of taggers,
    [B, labels] of classifiers, [B, choices] of multiple choice. ``start_logits`` and ``end_logits``
    [B, T] of span predictors. ``values`` float32 [B, T] of a value head. ``pooler_output`` [B, D].
    ``cache`` if one was given.
    A family with further outputs adds fields in a subclass.
    """

    last_hidden_state: jax.Array | None = None
    encoder_last_hidden_state: jax.Array | None = None
    logits: jax.Array | None = None
    pooler_output: jax.Array | None = None
    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    values: jax.Array | None = None
    auxiliary: Any = None
    cache: Any = None
