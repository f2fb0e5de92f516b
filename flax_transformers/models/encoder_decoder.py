"""Models that read one sequence of tokens and write another (arXiv:1706.03762).

The parameters are ``words``; ``decoder_words``, if the two sides do not share a table; ``encoder``
and ``decoder``, each with ``embeddings``, ``stack`` and, in pre-norm models, ``norm``; and the
heads, ``lm_head`` or ``classification_head`` (``encoder_decoder_heads.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.models.base import Tokens, WordModel
from flax_transformers.models.config import ComputeConfig, InputLimit, TextConfig
from flax_transformers.models.layers.block import LayerCache, LayerInputs
from flax_transformers.models.layers.embeddings import Embedding, InputEmbeddings, word_table
from flax_transformers.models.layers.kv_cache import Cache, causal_inputs, empty_cache
from flax_transformers.models.layers.masks import AttentionMask, combined_segments
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.ranges import Ranges

IGNORED = -100
"""The label of places that are not predicted, by Hugging Face's convention."""


def shift_right(ids: jax.Array, first_id: int, pad_id: int) -> jax.Array:
    """What a decoder reads to predict ``ids`` int [B, T]: ``first_id``, then all but the last one.

    Labels that are ignored become padding.
    """
    ids = jnp.where(ids == IGNORED, pad_id, ids)
    return jnp.concatenate([jnp.full_like(ids[:, :1], first_id), ids[:, :-1]], axis=1)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TextConfig):
    """An encoder, and a decoder that looks at what it made.

    The fields of ``TextConfig`` are those of the encoder, and of the decoder where None leaves it
    at that.
    """

    num_decoder_layers: int | None = None
    num_decoder_heads: int | None = None
    decoder_intermediate_size: int | None = None
    share_embeddings: bool = True
    """Both sides look words up in one table. ``tie_embeddings`` speaks of the decoder's."""
    logits_bias: bool = False
    """A constant for each word is added to the logits; it is read from files and not trained."""
    decoder_start_id: int | None = None
    """Id that the decoder begins with, where it is always the same."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (1,)
    """Ids that begin and end a sequence."""

    RANGES: ClassVar[Ranges] = {
        "num_decoder_layers": ranges.LAYERS,
        "num_decoder_heads": ranges.WIDTH,
        "decoder_intermediate_size": ranges.WIDTH,
        "decoder_start_id": ranges.integers(0, 2**24),
        "bos_id": ranges.TOKEN_ID,
        "eos_ids": ranges.TOKEN_ID,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model")
        if self.causal:
            raise ValueError(
                "model.causal is True, but an encoder sees all of its text; leave it out, the "
                "decoder looks back alone as it is"
            )
        if self.architecture.endswith("ForQuestionAnswering"):  # a first and a last token
            object.__setattr__(self, "num_labels", 2)
            object.__setattr__(self, "label_names", ())
        super().__post_init__()
        for ours, of_encoder in (
            ("num_decoder_layers", self.num_layers),
            ("num_decoder_heads", self.num_heads),
            ("decoder_intermediate_size", self.intermediate_size),
        ):
            value = getattr(self, ours)
            if value == of_encoder:  # one spelling for one model
                object.__setattr__(self, ours, None)
        sizes = self.decoder_sizes()
        if any(getattr(self, name) != value for name, value in sizes.items()):
            replace(self, **sizes)  # which checks them
        else:
            self._check_ids()

    def _check_ids(self) -> None:
        for name in ("pad_id", "decoder_start_id"):
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                raise ValueError(
                    f"model.{name} is {value}, but the decoder has words for ids below "
                    f"{self.vocab_size} only; choose one of these"
                )

    def input_limits(self) -> Mapping[str, InputLimit]:
        limits = dict(super().input_limits())
        if not self.causal:
            field = "model.vocab_size"
            if self.decoder.vocab_size != self.vocab_size:
                field = "model.decoder_vocab_size"
            words = self.decoder.input_limits()["input_ids"]
            limits["decoder_input_ids"] = replace(words, below_field=field)
        return limits

    def decoder_sizes(self) -> dict[str, Any]:
        """Fields that the decoder has of its own, under the names that the encoder has them."""
        return {
            "num_layers": self.num_decoder_layers or self.num_layers,
            "num_heads": self.num_decoder_heads or self.num_heads,
            "intermediate_size": self.decoder_intermediate_size or self.intermediate_size,
            "num_decoder_layers": None,
            "num_decoder_heads": None,
            "decoder_intermediate_size": None,
        }

    @property
    def decoder(self) -> Self:
        """The same config with the decoder's sizes in the place of the encoder's."""
        if self.causal:
            return self
        decoder = replace(self, **self.decoder_sizes())
        object.__setattr__(decoder, "causal", True)  # as only this one may be
        return decoder

    def decoder_inputs(self, labels: jax.Array) -> jax.Array:
        """What the decoder reads to predict ``labels`` int [B, T]."""
        first_id = self.pad_id if self.decoder_start_id is None else self.decoder_start_id
        return shift_right(labels, first_id, self.pad_id)

    def initial_std(self, name: str) -> float:
        # Tables start so that scaled vectors are of size one, and the logits with them.
        if name in ("words", "logits") and self.scale_embeddings:
            return self.hidden_size**-0.5
        return super().initial_std(name)

    def make_side(self, compute: ComputeConfig, *, cross_attention: bool = False) -> Side:
        """The encoder of this config, or of ``self.decoder`` the decoder."""
        return Side(self, compute, cross_attention)


class Side(nn.Module):
    """One of the two: embeddings, layers, and a last norm if they are pre-norm."""

    config: EncoderDecoderConfig
    compute: ComputeConfig
    cross_attention: bool = False

    def setup(self) -> None:
        c = self.config
        self.embeddings = InputEmbeddings(c, jnp.dtype(self.compute.dtype))
        self.stack = c.make_stack(self.compute, cross_attention=self.cross_attention)
        if c.norm_position == "pre":
            self.norm = c.make_norm(jnp.dtype(self.compute.dtype))

    def __call__(
        self,
        words_BTD: jax.Array,
        position_ids: jax.Array,
        inputs: LayerInputs,
        own: LayerCache | None = None,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Hidden states [B, T, D] of word vectors, and what the layers gave back by the way."""
        c = self.config
        x_BTD = self.embeddings(words_BTD, position_ids, deterministic=deterministic)
        inputs = inputs.replace(rotary=c.rotary_tables(position_ids))
        x_BTD, out = self.stack(x_BTD, inputs, own, deterministic=deterministic)
        return self.norm(x_BTD) if c.norm_position == "pre" else x_BTD, out


class WithEncoder(WordModel):
    """The encoder that the models below have."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        super().setup()
        self.encoder = self.config.make_side(self.compute)

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

        ``attention_mask`` is 1 at tokens and 0 at padding. ``segment_ids`` numbers packed
        examples from 1, with 0 at padding; positions restart in each unless given.
        """
        segments = combined_segments(attention_mask, segment_ids)
        if position_ids is None:
            position_ids = self.config.position_ids(input_ids, segment_ids)
        inputs = LayerInputs(mask=AttentionMask.within(segments))
        words_BSD = self.words(input_ids)
        return self.encoder(words_BSD, position_ids, inputs, deterministic=deterministic)[0]


class EncoderDecoder(WithEncoder):
    """Both sides with no head (BartModel, T5Model)."""

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

    def setup(self) -> None:
        super().setup()
        decoder = self.config.decoder
        if not self.config.share_embeddings:
            self.decoder_words = word_table(decoder, self.dtype)
        self.decoder = decoder.make_side(self.compute, cross_attention=True)

    @property
    def target_words(self) -> Embedding:
        """The table that the decoder looks words up in."""
        return self.words if self.config.share_embeddings else self.decoder_words

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
        examples from 1, with 0 at padding: the decoder sees what the encoder made of the example
        with the same number. Without ``decoder_input_ids`` the decoder reads the input itself,
        shifted.

        With a ``cache``, the decoder's inputs are those after what it holds,
        ``decoder_attention_mask`` is theirs, and the result has the new cache. The first call gives
        ``input_ids``; later ones leave them out, and the encoder is not run again.
        """
        encoded_BSD: jax.Array | None = None
        if input_ids is None:
            context_segments = _remembered(cache)
        else:
            encoded_BSD = self.encode(
                input_ids, attention_mask, position_ids, segment_ids, deterministic=deterministic
            )
            context_segments = combined_segments(attention_mask, segment_ids)
        ids = self._decoder_ids(decoder_input_ids, input_ids)
        places = decoder_position_ids
        if places is None:
            places = self.config.decoder.next_position_ids(ids, decoder_segment_ids, cache)
        segments = combined_segments(decoder_attention_mask, decoder_segment_ids)
        inputs, cache = causal_inputs(segments, decoder_position_ids, ids.shape, cache)
        if not (segments is None and context_segments is None and cache is None):
            segments = _or_ones(segments, ids)
            context_segments = _or_ones(context_segments, input_ids)
        inputs = inputs.replace(
            context_BSD=encoded_BSD, context_mask=AttentionMask(segments, context_segments)
        )
        own = None if cache is None else cache.layers
        x_BTD, out = self.decoder(
            self.target_words(ids), places, inputs, own, deterministic=deterministic
        )
        if cache is not None:
            cache = cache.replace(layers=out["cache"], context_segments=context_segments)
        return HiddenStates(x_BTD, encoded_BSD, auxiliary=out.get("auxiliary"), cache=cache)

    def _decoder_ids(
        self, decoder_input_ids: jax.Array | None, input_ids: jax.Array | None
    ) -> jax.Array:
        if decoder_input_ids is not None:
            return decoder_input_ids
        if input_ids is None:
            raise ValueError("decoder_input_ids are needed in every call after the first")
        return self.config.decoder_inputs(input_ids)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for generation, of ``batch`` rows of at most ``slots`` tokens of the decoder."""
        decoder = self.config.decoder
        return empty_cache(decoder, decoder.num_layers, batch, slots, self.dtype)

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
        """Both halves at once; see ``hidden_states`` for the inputs."""
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
        return self.output(
            last_hidden_state=states.last_hidden_state,
            encoder_last_hidden_state=states.encoder_last_hidden_state,
            auxiliary=states.auxiliary,
            cache=states.cache,
            **self.head_outputs(
                states.last_hidden_state, Tokens(input_ids, attention_mask), deterministic
            ),
        )


def _remembered(cache: Cache | None) -> jax.Array | None:
    if cache is None or cache.context_segments is None:
        raise ValueError("input_ids are needed, in the first call at least")
    return cache.context_segments


def _or_ones(segments: jax.Array | None, ids: jax.Array | None) -> jax.Array | None:
    return jnp.ones_like(ids) if segments is None and ids is not None else segments
