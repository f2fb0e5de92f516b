"""What models give back: Hugging Face's names, as dataclasses that jax can carry."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct


class HiddenStates(struct.PyTreeNode):
    """The first half of a model, which objectives build on.

    ``last_hidden_state`` [B, T, D] after the final norm; in encoder-decoders the decoder's, beside
    ``encoder_last_hidden_state`` [B, S, D]. ``auxiliary``: sums that layers add up for objectives,
    arrays [num_layers, B, ...] by name (a mixture of experts has some), or None. ``cache``: the
    renewed cache, where one was given.
    """

    last_hidden_state: jax.Array
    encoder_last_hidden_state: jax.Array | None = None
    auxiliary: Any = None
    cache: Any = None


class ModelOutput(struct.PyTreeNode):
    """What ``__call__`` of a model returns; what an architecture does not have is None.

    ``logits`` float32: [B, T, vocab_size] of language models, [B, T, labels] of taggers,
    [B, labels] of classifiers. ``start_logits`` and ``end_logits`` [B, T] of span predictors.
    ``pooler_output`` [B, D]. ``cache`` where one was given. A family that has more to give adds
    fields in a subclass.
    """

    last_hidden_state: jax.Array | None = None
    encoder_last_hidden_state: jax.Array | None = None
    logits: jax.Array | None = None
    pooler_output: jax.Array | None = None
    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    auxiliary: Any = None
    cache: Any = None
