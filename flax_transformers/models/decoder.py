"""Heads of decoders: next-token prediction, with values too, and labels by the last token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.models.heads import (
    LanguageModelMixin,
    LMHead,
    Tokens,
    Unembedding,
    label_layer,
    last_token,
    take_token,
)
from flax_transformers.models.outputs import Outputs
from flax_transformers.models.text import TextForSequenceClassification, TextModel


class DecoderForCausalLM(LanguageModelMixin, TextModel):
    """Predicts the next token."""

    def setup(self) -> None:
        super().setup()
        self.lm_head = LMHead(self.config, self.dtype)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.lm_head(hidden_BMD, self.words)


class DecoderWithValueHead(DecoderForCausalLM):
    """Predicts the next token, and at each token the reward to come (PPO, arXiv:1707.06347)."""

    def setup(self) -> None:
        super().setup()
        self.value_head = label_layer(self.config, self.dtype, 1)

    def values(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Rewards to come, float32 [B, T]."""
        return self.value_head(hidden_BTD)[..., 0].astype(jnp.float32)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        logits = super().head_outputs(hidden_BTD, tokens, deterministic)
        return logits | {"values": self.values(hidden_BTD)}


class DecoderForSequenceClassification(TextForSequenceClassification):
    """Labels each sequence by its last token."""

    label_bias = False

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """The last token. Without a mask, padding is recognised by its id as in transformers (-1:
        no padding)."""
        mask = tokens.ids != self.config.pad_id if tokens.mask is None else tokens.mask
        return take_token(hidden_BTD, last_token(mask))[:, 0]
