"""Models that label rows and tokens, encoders, decoders and encoder-decoders alike.

Each class is a head alone. A model that inherits it before the model without head has both, such as
``class TextForTokenClassification(TokenClassificationHead, TextModel)``.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.base import Tokens, WordModel
from flax_transformers.models.heads import label_layer, label_rows


class SequenceClassificationHead(WordModel):
    """Labels the row, by a vector that ``pool`` makes of it."""

    label_bias: ClassVar[bool] = True
    """Whether the last layer has a bias vector."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.classification_head = label_layer(
            c, self.dtype, c.num_labels, use_bias=self.label_bias
        )
        self.head_dropout = nn.Dropout(c.head_dropout)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """[B, D]: what the last layer gets of each row."""
        raise NotImplementedError

    def classify(
        self,
        hidden_BTD: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits float32 [B, labels] of hidden states and the inputs [B, T] they belong to."""
        pooled_BD = self.pool(hidden_BTD, Tokens(input_ids, attention_mask), deterministic)
        return label_rows(self.classification_head, pooled_BD)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        if tokens.ids is None:
            raise ValueError("a classifier of rows needs their input_ids")
        return {"logits": self.classify(hidden_BTD, *tokens, deterministic=deterministic)}


class TokenClassificationHead(WordModel):
    """Labels every token."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.classification_head = label_layer(c, self.dtype, c.num_labels)
        self.head_dropout = nn.Dropout(c.head_dropout)

    def tag(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T, labels]."""
        hidden_BTD = self.head_dropout(hidden_BTD, deterministic=deterministic)
        return self.classification_head(hidden_BTD).astype(jnp.float32)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"logits": self.tag(hidden_BTD, deterministic=deterministic)}


class QuestionAnsweringHead(WordModel):
    """Marks the first and the last token of an answer (BERT, arXiv:1810.04805 §4.2)."""

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, 2)

    def answer_spans(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T, 2] of the first and of the last token."""
        return self.classification_head(hidden_BTD).astype(jnp.float32)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        logits_BT2 = self.answer_spans(hidden_BTD, deterministic=deterministic)
        return {"start_logits": logits_BT2[..., 0], "end_logits": logits_BT2[..., 1]}
