"""What every model has, and what all that read words have."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.models.layers.embeddings import word_table
from flax_transformers.models.outputs import ModelOutput


class Model(nn.Module):
    """What ``config`` describes, carried out as ``execution`` says.

    It has two halves: ``hidden_states`` runs the layers, and the methods of a head, such as
    ``classify``, take what comes out, so that an objective computes no more than it needs.
    ``__call__`` puts both together. All are deterministic unless called with
    ``deterministic=False`` and ``rngs={"dropout": key}``.
    """

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    inputs: ClassVar[tuple[str, ...]]
    """The names in a batch that ``hidden_states`` takes."""
    output: ClassVar[type[ModelOutput]] = ModelOutput
    """What ``__call__`` gives back."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)


class Tokens(NamedTuple):
    """What hidden states belong to: ``ids`` int32 [B, T], None where a cache holds them; ``mask``
    [B, T], above 0 at tokens, None where all are."""

    ids: Any
    mask: Any


class WordModel(Model):
    """A model over tokens; the parameters begin with the table ``words``."""

    config: TextConfig

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that makes every parameter."""
        return {"input_ids": jnp.zeros((1, 2), jnp.int32)}

    def setup(self) -> None:
        self.words = word_table(self.config, self.dtype)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        """What this architecture adds to its ``output``, by field."""
        return {}
