"""Heads of encoders: masked language modelling, and classification or choice by a pooled vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.models.heads import (
    LanguageModelMixin,
    LMHead,
    Pooler,
    Tokens,
    Unembedding,
    classify_vectors,
    label_layer,
    mean_of_tokens,
)
from flax_transformers.models.kernels.kv_cache import Cache
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.outputs import ModelOutput
from flax_transformers.models.text import TextForSequenceClassification, TextModel


class EncoderOutput(ModelOutput):
    """``sentence_embedding`` float32 [B, D] for sentence encoders."""

    sentence_embedding: jax.Array | None = None


class EncoderModel(TextModel):
    """The layers, and sentence embeddings (arXiv:1908.10084 §3) if the config's
    ``normalize_embeddings`` is not None."""

    output = EncoderOutput

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        c = self.config
        if c.normalize_embeddings is None:
            return {}
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        mean = c.pooling == "mean"
        vector_BD = mean_of_tokens(hidden_BTD, tokens.mask) if mean else hidden_BTD[:, 0]
        if c.normalize_embeddings:
            length_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
            vector_BD = vector_BD / jnp.maximum(length_B1, 1e-12)
        return {"sentence_embedding": vector_BD}


class EncoderWithPooler(EncoderModel):
    """The layers and BERT's pooler (BertModel)."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
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


class TextForMultipleChoice(TextModel):
    """Scores each choice of an answer, with its question, from a vector that ``pool`` returns;
    subclasses define it (BERT, arXiv:1810.04805 §4.4)."""

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, 1)
        self.head_dropout = Dropout(self.config.head_dropout, self.compute.dropout_generator)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        """Input [B, D] of the last layer, before dropout."""
        raise NotImplementedError

    def choose(
        self,
        hidden_BTD: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Scores float32 [B] of choices, one in each sequence, by hidden states and inputs [B, T].

        The softmax over the scores of one question gives probabilities."""
        vector_BD = self.pool(hidden_BTD, Tokens(input_ids, attention_mask))
        vector_BD = self.head_dropout(vector_BD, deterministic=deterministic)
        return classify_vectors(self.classification_head, vector_BD)[:, 0]

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"logits": self.choose(hidden_BTD, *tokens, deterministic=deterministic)}

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
        """Of inputs [B, C, T], with C choices for each question: ``logits`` float32 [B, C] and
        ``last_hidden_state`` [B * C, T, D]. Of inputs [B, T]: ``logits`` [B]."""
        others = (attention_mask, token_type_ids, position_ids, segment_ids)
        output = super().__call__(
            _rows(input_ids),
            *(None if one is None else _rows(one) for one in others),
            cache=cache,
            deterministic=deterministic,
        )
        assert output.logits is not None
        return output.replace(logits=output.logits.reshape(input_ids.shape[:-1]))


def _rows(array: jax.Array) -> jax.Array:
    """All sequences of an array [..., T] as rows."""
    return array.reshape(-1, array.shape[-1])


class EncoderForMultipleChoice(TextForMultipleChoice):
    """Scores each choice by its pooled first token."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        return self.pooler(hidden_BTD)
