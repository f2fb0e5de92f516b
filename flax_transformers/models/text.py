"""Models over one sequence of tokens: words, positions, one stack of layers, a final norm.

Encoders and decoders are the same here but for the config's ``causal``; ``encoder.py`` and
``decoder.py`` hold the heads that only one of them can carry.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError
from flax_transformers.models.base import Tokens, WordModel
from flax_transformers.models.classification_heads import (
    QuestionAnsweringHead,
    TokenClassificationHead,
)
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.embeddings import InputEmbeddings
from flax_transformers.models.layers.kv_cache import Cache, causal_inputs, empty_cache
from flax_transformers.models.layers.masks import AttentionMask, combined_segments
from flax_transformers.models.outputs import HiddenStates, ModelOutput


def _encoder_mask(attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> AttentionMask:
    """Who sees whom without causality: segments see themselves, and everything sees the tokens."""
    if segment_ids is None and attention_mask is not None:
        # Padding too, as in the originals: padded on the left, a row's first place, which poolers
        # read, is padding.
        return AttentionMask(jnp.ones_like(attention_mask), attention_mask)
    return AttentionMask.within(segment_ids)


def _refuse_to_look_back(cache: Cache | None, prefix_mask: jax.Array | None) -> None:
    if cache is not None:
        raise UserError(
            "a cache is for models that look back, such as GPT-2 or Llama; this one sees the whole "
            "text, and has to be given it"
        )
    if prefix_mask is not None:
        raise UserError(
            "a prefix language model needs a model that looks back, such as GPT-2 or Llama; this "
            "one sees the text that it would have to predict"
        )


class TextModel(WordModel):
    """The layers alone, with no head (GPT2Model, ModernBertModel)."""

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "segment_ids",
        "prefix_mask",
    )

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.embeddings = InputEmbeddings(c, self.dtype)
        self.stack = c.make_stack(self.compute)
        if c.norm_position == "pre":
            self.final_norm = c.make_norm(self.dtype)

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
        from 1, with 0 at padding: examples do not see each other, and positions restart
        in each unless ``position_ids`` are given. With a ``cache`` (causal models), the inputs are
        those after what it holds, ``attention_mask`` is theirs, and the result has the new cache.
        ``prefix_mask`` (causal models) is 1 at tokens that all of their example see, those before
        them too: a prefix language model's. Raises UserError for one on a model that sees all.
        """
        c = self.config
        segments = combined_segments(attention_mask, segment_ids)
        if not c.causal:
            _refuse_to_look_back(cache, prefix_mask)
        places = position_ids
        if places is None:
            places = c.next_position_ids(input_ids, segment_ids, cache)
        if c.causal:
            inputs, cache = causal_inputs(
                segments, position_ids, input_ids.shape, cache, prefix_mask
            )
        else:
            inputs = LayerInputs(mask=_encoder_mask(attention_mask, segment_ids))
        x_BTD = self.embeddings(
            self.words(input_ids), places, token_type_ids, deterministic=deterministic
        )
        inputs = inputs.replace(rotary=c.rotary_tables(places))
        own = None if cache is None else cache.layers
        x_BTD, out = self.stack(x_BTD, inputs, own, deterministic=deterministic)
        if c.norm_position == "pre":
            x_BTD = self.final_norm(x_BTD)
        if cache is not None:
            cache = cache.replace(layers=out["cache"])
        return HiddenStates(x_BTD, auxiliary=out.get("auxiliary"), cache=cache)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for generation, of ``batch`` rows of at most ``slots`` tokens."""
        return empty_cache(self.config, self.config.num_layers, batch, slots, self.dtype)

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
        """Both halves at once; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            cache=cache,
            deterministic=deterministic,
        )
        return self.output(
            last_hidden_state=states.last_hidden_state,
            auxiliary=states.auxiliary,
            cache=states.cache,
            **self.head_outputs(
                states.last_hidden_state,
                Tokens(input_ids, combined_segments(attention_mask, segment_ids)),
                deterministic,
            ),
        )


class TextForTokenClassification(TokenClassificationHead, TextModel):
    """Labels every token."""


class TextForQuestionAnswering(QuestionAnsweringHead, TextModel):
    """Marks the first and the last token of an answer."""
