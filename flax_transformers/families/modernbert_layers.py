"""The layers and heads of ModernBERT (arXiv:2412.13663)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import flax.linen as nn
import jax

from flax_transformers.models.base import Tokens
from flax_transformers.models.classification_heads import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from flax_transformers.models.encoder import EncoderForMaskedLM
from flax_transformers.models.heads import LanguageHead, MaskedLMHead, Transform, mean_of_tokens
from flax_transformers.models.layers.attention import KeyValues
from flax_transformers.models.layers.block import LayerInputs, TransformerBlock
from flax_transformers.models.layers.masks import AttentionMask
from flax_transformers.models.layers.sharding import HIDDEN, constrain
from flax_transformers.models.text import TextModel

if TYPE_CHECKING:
    from flax_transformers.families.modernbert import ModernBertConfig

Kind = Literal["full_attention", "sliding_attention"]
FULL: Kind = "full_attention"
SLIDING: Kind = "sliding_attention"


class ModernBertBlock(TransformerBlock):
    """Pre-norm, but for attention in the ``first`` layer; of a kind of attention."""

    config: ModernBertConfig
    kind: Kind = FULL
    first: bool = False

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        mask = AttentionMask() if inputs.mask is None else inputs.mask
        if self.kind == SLIDING:
            side = self.config.local_attention // 2
            mask = mask.replace(window=(side, side))
        own = inputs.replace(mask=mask, rotary=inputs.rotary[self.kind])
        return super().self_attention(x_BTD, own, cache)

    def residual(
        self, x_BTD: jax.Array, f: Callable[[jax.Array], jax.Array], name: str
    ) -> jax.Array:
        c = self.config
        attention = name == "attention"
        bare = self.first and attention
        y_BTD = f(x_BTD if bare else c.make_norm(self.dtype, name=f"{name}_norm")(x_BTD))
        if attention:
            y_BTD = nn.Dropout(c.attention_dropout, deterministic=self.deterministic)(y_BTD)
        return constrain(x_BTD + y_BTD, HIDDEN)


class ModernBertTransform(Transform):
    """What every head begins with."""

    config: ModernBertConfig

    @property
    def use_bias(self) -> bool:
        return self.config.head_bias


class ModernBertMaskedLMHead(MaskedLMHead):
    """A transform and the word table; the bias per word can be left out."""

    config: ModernBertConfig

    def make_transform(self) -> Transform:
        c = self.config
        return ModernBertTransform(c, self.dtype, c.head_activation, name="transform")

    def word_bias(self, size: int) -> jax.Array | None:
        return super().word_bias(size) if self.config.decoder_bias else None


class ModernBertForMaskedLM(EncoderForMaskedLM):
    """Fills gaps."""

    config: ModernBertConfig

    def make_mlm_head(self) -> LanguageHead:
        return ModernBertMaskedLMHead(self.config, self.dtype)


class ModernBertWithTransform(TextModel):
    """What the classifiers below have in common."""

    config: ModernBertConfig

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.transform_head = ModernBertTransform(c, self.dtype, c.head_activation)


class ModernBertForTokenClassification(TokenClassificationHead, ModernBertWithTransform):
    """Labels every token, after a transform."""

    def tag(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return super().tag(self.transform_head(hidden_BTD), deterministic=deterministic)


class ModernBertForQuestionAnswering(QuestionAnsweringHead, ModernBertWithTransform):
    """Marks the first and the last token of an answer, after a transform and dropout."""

    def setup(self) -> None:
        super().setup()
        self.head_dropout = nn.Dropout(self.config.head_dropout)

    def answer_spans(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        hidden_BTD = self.transform_head(hidden_BTD)
        return super().answer_spans(self.head_dropout(hidden_BTD, deterministic=deterministic))


class ModernBertForSequenceClassification(SequenceClassificationHead, ModernBertWithTransform):
    """Labels the row by its first token or the mean of all tokens, after a transform."""

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        if self.config.pooling == "cls":
            pooled_B1D = hidden_BTD[:, :1]
        else:
            pooled_B1D = mean_of_tokens(hidden_BTD, tokens.mask)[:, None]
        transformed_B1D = self.transform_head(pooled_B1D)
        return self.head_dropout(transformed_B1D, deterministic=deterministic)[:, 0]
