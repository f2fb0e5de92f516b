"""Encoder-decoder models (arXiv:1706.03762).

Parameters: ``words``; ``decoder_words``, if encoder and decoder do not share a table; ``encoder``
and ``decoder``, each with ``embeddings``, ``stack`` and, in pre-norm models, ``norm``; and those of
the head.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import ComputeConfig, EncoderDecoderConfig
from flax_transformers.models.heads import (
    LanguageModelMixin,
    LMHead,
    Pooler,
    QuestionAnsweringMixin,
    Tokens,
    Unembedding,
    classify_vectors,
    label_layer,
    last_token,
    take_token,
)
from flax_transformers.models.kernels.kv_cache import (
    Cache,
    LayerCache,
    causal_mask,
    empty_cache,
    next_positions,
)
from flax_transformers.models.kernels.masks import AttentionMask, combined_segments
from flax_transformers.models.layers.block import LayerInputs, LayerOutput
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.embeddings import Embedding, InputEmbeddings, token_table
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.outputs import HiddenStates, ModelOutput, Outputs
from flax_transformers.models.parts import ModelParts

IGNORED = -100
"""Label of positions that are not predicted, as in transformers."""


def decoder_inputs(config: EncoderDecoderConfig, labels: jax.Array) -> jax.Array:
    """Decoder inputs for ``labels`` int [B, T]: a first id, then the labels but for the last.

    Ignored labels become padding. The first id is ``decoder_start_id`` (by default that of padding)
    or, if ``target_starts_with_language``, the last label that is not padding.
    """
    labels = jnp.where(labels == IGNORED, config.pad_id, labels)
    if config.target_starts_with_language:
        last_B = last_token((labels != config.pad_id).astype(jnp.int32))
        first_B1 = jnp.take_along_axis(labels, last_B[:, None], axis=1)
    else:
        first_id = config.pad_id if config.decoder_start_id is None else config.decoder_start_id
        first_B1 = jnp.full_like(labels[:, :1], first_id)
    return jnp.concatenate([first_B1, labels[:, :-1]], axis=1)


class TransformerStack(nn.Module):
    """An encoder or a decoder: embeddings, layers, and a final norm in pre-norm models."""

    config: EncoderDecoderConfig
    compute: ComputeConfig
    parts: ModelParts = ModelParts()
    cross_attention: bool = False

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        generator = self.compute.dropout_generator
        self.embeddings = InputEmbeddings(c, dtype, self.parts.positions, generator)
        self.stack = self.parts.stack(
            c, self.compute, self.parts.block, cross_attention=self.cross_attention
        )
        if c.norm_position == "pre":
            self.norm = make_norm(c, dtype)
        self.relative_bias = self.parts.relative_bias(c)
        self.dropout = Dropout(c.dropout if c.output_dropout else 0.0, generator)

    def __call__(
        self,
        embedded_BTD: jax.Array,
        position_ids: jax.Array,
        inputs: LayerInputs,
        cache: LayerCache | None = None,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, LayerOutput]:
        """Hidden states [B, T, D] of token embeddings, and the outputs of the layers."""
        c = self.config
        x_BTD = self.embeddings(embedded_BTD, position_ids, deterministic=deterministic)
        inputs = inputs.replace(rotary=self.parts.rotary(c, position_ids))
        if self.relative_bias is not None:
            inputs = inputs.replace(bias=self.relative_bias())
        x_BTD, output = self.stack(x_BTD, inputs, cache, deterministic=deterministic)
        if c.norm_position == "pre":
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD, deterministic=deterministic), output

    def encode(
        self,
        table: Embedding,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        segment_ids: jax.Array | None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Hidden states [B, S, D] of an encoder; see ``EncoderDecoder.encode``."""
        if position_ids is None:
            position_ids = self.parts.position_ids(self.config, input_ids, segment_ids)
        inputs = LayerInputs(
            mask=AttentionMask.within(combined_segments(attention_mask, segment_ids))
        )
        return self(table(input_ids), position_ids, inputs, deterministic=deterministic)[0]


class EncoderDecoder(nn.Module):
    """Encoder and decoder without a head (BartModel, T5Model), and the base of those with one.

    See ``TextModel`` for the two halves of a model.
    """

    config: EncoderDecoderConfig
    compute: ComputeConfig = ComputeConfig()
    parts: ModelParts = ModelParts()

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
        "position_ids",
        "decoder_position_ids",
        "segment_ids",
        "decoder_segment_ids",
    )
    output: ClassVar[type[ModelOutput]] = ModelOutput

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that initialises every parameter."""
        return {"input_ids": jnp.zeros((1, 2), jnp.int32)}

    def setup(self) -> None:
        c, decoder = self.config, self.config.decoder
        self.words = token_table(c, self.dtype)
        self.encoder = TransformerStack(c, self.compute, self.parts)
        if not c.share_embeddings:
            self.decoder_words = token_table(decoder, self.dtype)
        self.decoder = TransformerStack(decoder, self.compute, self.parts, cross_attention=True)

    @property
    def target_table(self) -> Embedding:
        """The embedding table of the decoder."""
        return self.words if self.config.share_embeddings else self.decoder_words

    def encode(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """The encoder's hidden states [B, S, D] of integer inputs [B, S].

        ``attention_mask`` is 1 at tokens and 0 at padding. ``segment_ids`` numbers packed examples
        from 1, with 0 at padding; positions restart in each unless given.
        """
        return self.encoder.encode(
            self.words,
            input_ids,
            attention_mask,
            position_ids,
            segment_ids,
            deterministic=deterministic,
        )

    def hidden_states(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> HiddenStates:
        """The decoder's hidden states [B, T, D], and the encoder's [B, S, D].

        Inputs are integers, [B, S] of the encoder and [B, T] of the decoder. The masks are 1 at
        tokens and 0 at padding. ``segment_ids`` and ``decoder_segment_ids`` instead number packed
        examples from 1, with 0 at padding: the decoder attends to the encoder's output for the
        example of the same number. Without ``decoder_input_ids`` the decoder reads the encoder's
        input, shifted.

        With a ``cache``, the decoder's inputs are the tokens after those in it,
        ``decoder_attention_mask`` is theirs, and the result has the updated cache. The first call
        gives ``input_ids``; later calls leave them out, and the encoder does not run again.
        """
        c = self.config
        encoded_BSD: jax.Array | None = None
        if input_ids is None:
            context_segments = _cached_context(cache)
        else:
            encoded_BSD = self.encode(
                input_ids, attention_mask, position_ids, segment_ids, deterministic=deterministic
            )
            context_segments = combined_segments(attention_mask, segment_ids)
        if decoder_input_ids is None:
            if input_ids is None:
                raise ValueError("decoder_input_ids are needed in every call after the first")
            decoder_input_ids = decoder_inputs(c, input_ids)
        shape = decoder_input_ids.shape
        segments = combined_segments(decoder_attention_mask, decoder_segment_ids)
        mask, updated = causal_mask(segments, decoder_position_ids, shape, cache)
        if decoder_position_ids is None:
            decoder_position_ids = (
                self.parts.position_ids(c.decoder, decoder_input_ids, decoder_segment_ids)
                if cache is None
                else next_positions(shape, cache)
            )
        if not (segments is None and context_segments is None and cache is None):
            segments = _or_ones(segments, decoder_input_ids)
            context_segments = _or_ones(context_segments, input_ids)
        inputs = LayerInputs(
            mask=mask,
            context_BSD=encoded_BSD,
            context_mask=AttentionMask(segments, context_segments),
            index=None if cache is None else cache.index,
        )
        x_BTD, output = self.decoder(
            self.target_table(decoder_input_ids),
            decoder_position_ids,
            inputs,
            None if cache is None else cache.layers_in_use,
            deterministic=deterministic,
        )
        if cache is not None and updated is not None:
            updated = cache.after_call(updated, output.cache)
            updated = updated.replace(context_segments=context_segments)
        return HiddenStates(x_BTD, encoded_BSD, auxiliary=output.auxiliary, cache=updated)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for ``batch`` sequences of at most ``slots`` tokens of the decoder."""
        return empty_cache(self.config.decoder, batch, slots, self.dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Hidden states and the outputs of the head; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            position_ids,
            decoder_position_ids,
            segment_ids,
            decoder_segment_ids,
            cache=cache,
            deterministic=deterministic,
        )
        tokens = Tokens(input_ids, attention_mask)
        return self.output(
            last_hidden_state=states.last_hidden_state,
            encoder_last_hidden_state=states.encoder_last_hidden_state,
            auxiliary=states.auxiliary,
            cache=states.cache,
            **self.head_outputs(states.last_hidden_state, tokens, deterministic),
        )

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        """The fields that the head adds to ``output``; ``tokens`` are the encoder's."""
        return {}


def _cached_context(cache: Cache | None) -> jax.Array | None:
    if cache is None or cache.context_segments is None:
        raise ValueError("input_ids are needed, in the first call at least")
    return cache.context_segments


def _or_ones(segments: jax.Array | None, ids: jax.Array | None) -> jax.Array | None:
    return jnp.ones_like(ids) if segments is None and ids is not None else segments


class EncoderDecoderForConditionalGeneration(LanguageModelMixin, EncoderDecoder):
    """Predicts the decoder's next token."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.lm_head = LMHead(c.decoder, self.dtype, use_bias=c.logits_bias, train_bias=False)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.lm_head(hidden_BMD, self.target_table)


class EncoderDecoderForSequenceClassification(EncoderDecoder):
    """Labels each sequence by the decoder's state at its last end-of-sequence token
    (arXiv:1910.13461).

    The decoder reads the input, shifted; ``decoder_input_ids`` are left out.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.pooler = Pooler(c, self.dtype)
        self.classification_head = label_layer(c, self.dtype, c.num_labels)
        self.head_dropout = Dropout(c.head_dropout, self.compute.dropout_generator)

    def classify(
        self,
        hidden_BTD: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits float32 [B, labels] of hidden states and their inputs [B, T]."""
        ends_BT = jnp.isin(input_ids, jnp.asarray(self.config.eos_ids))
        last_B1D = take_token(hidden_BTD, last_token(ends_BT))
        dropped_B1D = self.head_dropout(last_B1D, deterministic=deterministic)
        pooled_BD = self.head_dropout(self.pooler(dropped_B1D), deterministic=deterministic)
        return classify_vectors(self.classification_head, pooled_BD)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        if tokens.ids is None:
            raise ValueError("a sequence classifier needs input_ids")
        return {"logits": self.classify(hidden_BTD, tokens.ids, deterministic=deterministic)}


class EncoderDecoderForQuestionAnswering(QuestionAnsweringMixin, EncoderDecoder):
    """Marks the first and the last token of an answer, on the decoder's states."""
