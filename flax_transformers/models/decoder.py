"""Heads of decoders: next-token prediction, and classification by the last token."""

from __future__ import annotations

import jax

from flax_transformers.models.heads import (
    LanguageModelMixin,
    LMHead,
    Tokens,
    Unembedding,
    last_token,
    take_token,
)
from flax_transformers.models.text import TextForSequenceClassification, TextModel


class DecoderForCausalLM(LanguageModelMixin, TextModel):
    """Predicts the next token."""

    def setup(self) -> None:
        super().setup()
        self.lm_head = LMHead(self.config, self.dtype)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.lm_head(hidden_BMD, self.words)


class DecoderForSequenceClassification(TextForSequenceClassification):
    """Labels each sequence by its last token."""

    label_bias = False

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """The last token. Without a mask, padding is recognised by its id as in transformers (-1:
        no padding)."""
        mask = tokens.ids != self.config.pad_id if tokens.mask is None else tokens.mask
        return take_token(hidden_BTD, last_token(mask))[:, 0]
