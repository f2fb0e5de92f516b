"""Encoders: embeddings, a stack of layers that see both ways, and a head."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.attention import segment_mask
from flax_transformers.models.block import TransformerBlock
from flax_transformers.models.config import Execution, TransformerConfig
from flax_transformers.models.embeddings import Embedding
from flax_transformers.models.heads import MaskedLMHead
from flax_transformers.models.norms import make_norm
from flax_transformers.models.positions import positions_from_segments, sinusoidal_table
from flax_transformers.models.sharding import HIDDEN, constrain
from flax_transformers.models.stack import Stack


@struct.dataclass
class MaskedLMOutput:
    """``logits`` float32 [B, T, vocab_size] and ``last_hidden_state`` [B, T, D]."""

    logits: jax.Array
    last_hidden_state: jax.Array


class InputEmbeddings(nn.Module):
    """Sum of word, position and token-type vectors, then an optional norm, then dropout."""

    config: TransformerConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        c = self.config
        table = partial(Embedding, features=c.hidden_size, dtype=self.dtype, init_std=c.init_std)
        self.word = table(c.padded_vocab_size)
        if c.positions == "learned":
            self.position = table(c.max_positions, axes=("positions", "embed"))
        if c.token_types:
            self.token_type = table(c.token_types, axes=("token_types", "embed"))
        if c.embedding_norm:
            self.norm = make_norm(c.norm, c.norm_eps, self.dtype, use_bias=c.use_bias)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        token_type_ids: jax.Array | None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        c = self.config
        x_BTD = self.word(input_ids)
        if c.token_types:
            types_BT = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x_BTD = x_BTD + self.token_type(types_BT)
        if c.positions == "learned":
            x_BTD = x_BTD + self.position(position_ids)
        else:
            table = jnp.asarray(sinusoidal_table(c.max_positions, c.hidden_size), self.dtype)
            x_BTD = x_BTD + table[position_ids]
        if c.embedding_norm:
            x_BTD = self.norm(x_BTD)
        return constrain(self.dropout(x_BTD, deterministic=deterministic), HIDDEN)


class EncoderForMaskedLM(nn.Module):
    """A bidirectional encoder with a masked-language-model head (BERT, arXiv:1810.04805).

    Deterministic unless called with ``deterministic=False`` and ``rngs={"dropout": key}``.
    """

    config: TransformerConfig
    execution: Execution = Execution()

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "segment_ids",
    )
    """The names in a batch that ``hidden_states`` takes."""

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.execution.dtype)
        self.embeddings = InputEmbeddings(c, dtype)
        self.encoder = Stack(
            pattern=(partial(TransformerBlock, c, dtype),),
            repeats=c.num_layers,
            scan=self.execution.scan_layers,
            remat=self.execution.remat,
        )
        if c.norm_place == "pre":
            self.final_norm = make_norm(c.norm, c.norm_eps, dtype, use_bias=c.use_bias)
        self.mlm_head = MaskedLMHead(c, dtype)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Last hidden states [B, T, D] of integer inputs [B, T].

        ``attention_mask`` is 1 at tokens and 0 at padding. ``segment_ids`` instead numbers packed
        examples from 1, with 0 at padding: examples do not see each other, and positions restart
        in each unless ``position_ids`` are given.
        """
        mask_BTS = None
        if segment_ids is not None:
            mask_BTS = segment_mask(segment_ids, segment_ids)
        elif attention_mask is not None:
            mask_BTS = segment_mask(attention_mask, attention_mask)
        if position_ids is None:
            one_segment = jnp.ones_like(input_ids)
            position_ids = positions_from_segments(
                one_segment if segment_ids is None else segment_ids
            )
        x_BTD = self.embeddings(
            input_ids, position_ids, token_type_ids, deterministic=deterministic
        )
        x_BTD, _ = self.encoder(x_BTD, {"mask_BTS": mask_BTS}, deterministic=deterministic)
        return self.final_norm(x_BTD) if self.config.norm_place == "pre" else x_BTD

    def unembed(self, hidden_BMD: jax.Array) -> jax.Array:
        """Logits float32 [B, M, padded_vocab_size] of any chosen hidden states [B, M, D]."""
        return self.mlm_head(hidden_BMD, self.embeddings.word)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> MaskedLMOutput:
        """Both halves at once, for every position; see ``hidden_states`` for the inputs."""
        hidden_BTD = self.hidden_states(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            deterministic=deterministic,
        )
        logits_BTV = self.unembed(hidden_BTD)
        return MaskedLMOutput(logits_BTV[..., : self.config.vocab_size], hidden_BTD)
