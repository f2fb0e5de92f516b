"""What stands on encoders alone: gaps to fill, rows summed up by a token."""

from __future__ import annotations

import jax

from flax_transformers.models.heads import (
    LanguageHead,
    MaskedLMHead,
    Pooler,
    Unembedding,
    WritesWords,
)
from flax_transformers.models.labels import SequenceClassificationHead
from flax_transformers.models.model import Tokens
from flax_transformers.models.text import TextModel


class EncoderWithPooler(TextModel):
    """The layers and a summary of the row (BertModel)."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"pooler_output": self.pooler(hidden_BTD)}


class EncoderForMaskedLM(WritesWords, TextModel):
    """Fills gaps (BERT, arXiv:1810.04805 §3.1)."""

    def setup(self) -> None:
        super().setup()
        self.mlm_head = self.make_mlm_head()

    def make_mlm_head(self) -> LanguageHead:
        return MaskedLMHead(self.config, self.dtype)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.mlm_head(hidden_BMD, self.words)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"logits": self.unembed(hidden_BTD)[..., : self.config.vocab_size]}


class EncoderForSequenceClassification(SequenceClassificationHead, TextModel):
    """Labels the row by its pooled first token."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        return self.head_dropout(self.pooler(hidden_BTD), deterministic=deterministic)
