"""Models over one sequence of tokens: embeddings, one stack of layers, a final norm.

Encoders and decoders differ in the config's ``causal`` only; ``encoder.py`` and ``decoder.py`` have
the heads of one kind, this file those of both.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig, TextConfig
from flax_transformers.models.heads import (
    QuestionAnsweringMixin,
    TokenClassificationMixin,
    Tokens,
    classify_vectors,
    label_layer,
)
from flax_transformers.models.kernels.kv_cache import (
    Cache,
    causal_mask,
    empty_cache,
    next_positions,
)
from flax_transformers.models.kernels.masks import AttentionMask, combined_segments
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.embeddings import InputEmbeddings, token_table
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.outputs import HiddenStates, ModelOutput, Outputs
from flax_transformers.models.parts import ModelParts


class TextModel(nn.Module):
    """The model without a head (GPT2Model, ModernBertModel), and the base of those with one.

    A model has two halves: ``hidden_states`` runs the layers, and the methods of a head, such as
    ``classify``, take its result, so that an objective computes no more than it needs. ``__call__``
    combines both. All are deterministic unless called with ``deterministic=False`` and
    ``rngs={"dropout": key}``.
    """

    config: TextConfig
    compute: ComputeConfig = ComputeConfig()
    parts: ModelParts = ModelParts()

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "segment_ids",
        "prefix_mask",
    )
    """Names in a batch that ``hidden_states`` takes."""
    output: ClassVar[type[ModelOutput]] = ModelOutput
    """What ``__call__`` returns."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that initialises every parameter."""
        return {"input_ids": jnp.zeros((1, 2), jnp.int32)}

    def setup(self) -> None:
        c = self.config
        self.words = token_table(c, self.dtype)
        generator = self.compute.dropout_generator
        self.embeddings = InputEmbeddings(c, self.dtype, self.parts.positions, generator)
        self.stack = self.parts.stack(c, self.compute, self.parts.block)
        if c.norm_position == "pre":
            self.final_norm = make_norm(c, self.dtype)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        prefix_mask: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> HiddenStates:
        """Last hidden states [B, T, D] of integer inputs [B, T].

        ``attention_mask`` is 1 at tokens and 0 at padding. ``segment_ids`` numbers packed examples
        from 1, with 0 at padding: examples do not attend to each other, and positions restart in
        each unless ``position_ids`` are given. With a ``cache`` (causal models), the inputs are the
        tokens after those in it, ``attention_mask`` is theirs, and the result has the updated
        cache. ``prefix_mask`` (causal models) is 1 at tokens that earlier tokens of their example
        attend to as well (prefix language models). Raises UserError for either on a model that is
        not causal.
        """
        c, parts = self.config, self.parts
        mask, updated = self._mask(
            input_ids, attention_mask, position_ids, segment_ids, prefix_mask, cache
        )
        if position_ids is None:
            position_ids = (
                parts.position_ids(c, input_ids, segment_ids)
                if cache is None
                else next_positions(input_ids.shape, cache)
            )
        x_BTD = self.embeddings(
            self.words(input_ids), position_ids, token_type_ids, deterministic=deterministic
        )
        inputs = LayerInputs(
            mask=mask,
            rotary=parts.rotary(c, position_ids),
            index=None if cache is None else cache.index,
        )
        x_BTD, output = self.stack(
            x_BTD,
            inputs,
            None if cache is None else cache.layers_in_use,
            deterministic=deterministic,
        )
        if c.norm_position == "pre":
            x_BTD = self.final_norm(x_BTD)
        if cache is not None and updated is not None:
            updated = cache.after_call(updated, output.cache)
        return HiddenStates(x_BTD, auxiliary=output.auxiliary, cache=updated)

    def _mask(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        segment_ids: jax.Array | None,
        prefix_mask: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[AttentionMask, Cache | None]:
        if self.config.causal:
            segments = combined_segments(attention_mask, segment_ids)
            return causal_mask(segments, position_ids, input_ids.shape, cache, prefix_mask)
        if cache is not None:
            raise UserError(
                "a cache needs a causal model, such as GPT-2 or Llama; this one attends to the "
                "whole input at once"
            )
        if prefix_mask is not None:
            raise UserError(
                "a prefix language model needs a causal model, such as GPT-2 or Llama; this one "
                "attends to the tokens that it would have to predict"
            )
        segments = combined_segments(attention_mask, segment_ids)
        if segment_ids is None and attention_mask is not None:
            # Padding attends to tokens, as in the originals: with padding on the left, the first
            # position, which poolers read, is padding.
            return AttentionMask(jnp.ones_like(attention_mask), attention_mask), None
        return AttentionMask.within(segments), None

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for ``batch`` sequences of at most ``slots`` tokens."""
        return empty_cache(self.config, batch, slots, self.dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Hidden states and the outputs of the head; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            cache=cache,
            deterministic=deterministic,
        )
        tokens = Tokens(input_ids, combined_segments(attention_mask, segment_ids))
        return self.output(
            last_hidden_state=states.last_hidden_state,
            auxiliary=states.auxiliary,
            cache=states.cache,
            **self.head_outputs(states.last_hidden_state, tokens, deterministic),
        )

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        """The fields that the head adds to ``output``."""
        return {}


class TextForSequenceClassification(TextModel):
    """Labels each sequence, from a vector that ``pool`` returns; subclasses define it."""

    label_bias: ClassVar[bool] = True
    """Whether the last layer has a bias vector."""
    reads_padding: ClassVar[bool] = False
    """Whether the labels depend on the length that a text is padded to."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.classification_head = label_layer(
            c, self.dtype, c.num_labels, use_bias=self.label_bias
        )
        self.head_dropout = Dropout(c.head_dropout, self.compute.dropout_generator)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """Input [B, D] of the last layer."""
        raise NotImplementedError

    def classify(
        self,
        hidden_BTD: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits float32 [B, labels] of hidden states and their inputs [B, T]."""
        pooled_BD = self.pool(hidden_BTD, Tokens(input_ids, attention_mask), deterministic)
        return classify_vectors(self.classification_head, pooled_BD)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"logits": self.classify(hidden_BTD, *tokens, deterministic=deterministic)}


class TextForTokenClassification(TokenClassificationMixin, TextModel):
    """Labels each token."""


class TextForQuestionAnswering(QuestionAnsweringMixin, TextModel):
    """Marks the first and the last token of an answer (BERT, arXiv:1810.04805 §4.2)."""
