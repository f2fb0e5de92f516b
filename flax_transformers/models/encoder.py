"""Heads of encoders: masked language modelling, and classification by a pooled vector."""

from __future__ import annotations

import jax

from flax_transformers.models.heads import (
    LanguageModelMixin,
    LMHead,
    Pooler,
    Tokens,
    Unembedding,
    mean_of_tokens,
    text_vectors,
)
from flax_transformers.models.outputs import ModelOutput, Outputs
from flax_transformers.models.text import TextForSequenceClassification, TextModel


class EncoderOutput(ModelOutput):
    """``sentence_embedding`` float32 [B, D] for sentence encoders."""

    sentence_embedding: jax.Array | None = None


class EncoderModel(TextModel):
    """The layers, and sentence embeddings (arXiv:1908.10084 §3) if the config's
    ``normalize_embeddings`` is not None."""

    output = EncoderOutput

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        c = self.config
        if c.normalize_embeddings is None:
            return {}
        vector_BD = text_vectors(hidden_BTD, tokens.mask, c.pooling, c.normalize_embeddings)
        return {"sentence_embedding": vector_BD}


class EncoderWithPooler(EncoderModel):
    """The layers and BERT's pooler (BertModel)."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        embedding = super().head_outputs(hidden_BTD, tokens, deterministic)
        return {"pooler_output": self.pooler(hidden_BTD), **embedding}


class EncoderForMaskedLM(LanguageModelMixin, TextModel):
    """Predicts masked tokens (BERT, arXiv:1810.04805 §3.1)."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.mlm_head = LMHead(c, self.dtype, transform=True, use_bias=c.decoder_bias)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.mlm_head(hidden_BMD, self.words)


class EncoderForSequenceClassification(TextForSequenceClassification):
    """Labels each sequence by its pooled first token, or by the mean of all tokens if the config's
    ``pooling`` is "mean"."""

    def setup(self) -> None:
        super().setup()
        if self.config.pooling == "cls":
            self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        if self.config.pooling == "mean":
            pooled_BD = mean_of_tokens(hidden_BTD, tokens.mask)
        else:
            pooled_BD = self.pooler(hidden_BTD)
        return self.head_dropout(pooled_BD, deterministic=deterministic)
