"""What stands on encoders alone: gaps to fill, rows summed up by a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.models.base import Tokens
from flax_transformers.models.classification_heads import SequenceClassificationHead
from flax_transformers.models.heads import (
    LanguageHead,
    MaskedLMHead,
    Pooler,
    Unembedding,
    WritesWords,
    mean_of_tokens,
)
from flax_transformers.models.outputs import ModelOutput
from flax_transformers.models.text import TextModel


class EncoderOutput(ModelOutput):
    """``sentence_embedding`` float32 [B, D] where the config says how it is made."""

    sentence_embedding: jax.Array | None = None


class EncoderWithoutHead(TextModel):
    """The layers, and the embedding of a sentence (arXiv:1908.10084 §3) where the config's
    ``normalize_embeddings`` is not None."""

    output = EncoderOutput

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        normalize: bool | None = getattr(self.config, "normalize_embeddings", None)
        if normalize is None:
            return {}
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        if getattr(self.config, "pooling", "cls") == "mean":
            vector_BD = mean_of_tokens(hidden_BTD, tokens.mask)
        else:
            vector_BD = hidden_BTD[:, 0]
        if normalize:
            length_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
            vector_BD = vector_BD / jnp.maximum(length_B1, 1e-12)
        return {"sentence_embedding": vector_BD}


class EncoderWithPooler(EncoderWithoutHead):
    """The layers and a summary of the row (BertModel)."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        embedding = super().head_outputs(hidden_BTD, tokens, deterministic)
        return {"pooler_output": self.pooler(hidden_BTD), **embedding}


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
    """Labels the row by its pooled first token, or by the mean of all tokens where the config's
    ``pooling`` is "mean"."""

    def setup(self) -> None:
        super().setup()
        if self.pools_first:
            self.pooler = Pooler(self.config, self.dtype)

    @property
    def pools_first(self) -> bool:
        """Whether the row is labelled by its first token."""
        return getattr(self.config, "pooling", "cls") == "cls"

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        if not self.pools_first:
            mean_BD = mean_of_tokens(hidden_BTD, tokens.mask)
            return self.head_dropout(mean_BD, deterministic=deterministic)
        return self.head_dropout(self.pooler(hidden_BTD), deterministic=deterministic)
