"""What stands on decoders alone: the next token, and rows summed up by their last token."""

from __future__ import annotations

import jax

from flax_transformers.models.base import Tokens
from flax_transformers.models.classification_heads import SequenceClassificationHead
from flax_transformers.models.heads import (
    LanguageHead,
    Unembedding,
    WritesWords,
    last_token,
    take_token,
)
from flax_transformers.models.text import TextModel


class DecoderForCausalLM(WritesWords, TextModel):
    """Predicts the next token."""

    def setup(self) -> None:
        super().setup()
        self.lm_head = LanguageHead(self.config, self.dtype)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.lm_head(hidden_BMD, self.words)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"logits": self.unembed(hidden_BTD)[..., : self.config.vocab_size]}


class DecoderForSequenceClassification(SequenceClassificationHead, TextModel):
    """Labels the row by its last token."""

    label_bias = False

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """The last token, which Hugging Face knows by its id where no mask says where padding is;
        -1 is nowhere."""
        mask = tokens.ids != self.config.pad_id if tokens.mask is None else tokens.mask
        return take_token(hidden_BTD, last_token(mask))[:, 0]
