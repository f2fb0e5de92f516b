"""What stands on encoder-decoders: the target's next token, and labels of the source."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.models.base import Tokens
from flax_transformers.models.classification_heads import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
)
from flax_transformers.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from flax_transformers.models.heads import (
    LanguageHead,
    Pooler,
    Unembedding,
    WritesWords,
    last_token,
    take_token,
)


class ShiftedLanguageHead(LanguageHead):
    """A language head that may add the constants of a file to the logits."""

    config: EncoderDecoderConfig

    def word_bias(self, size: int) -> jax.Array | None:
        if not self.config.logits_bias:
            return None
        return jax.lax.stop_gradient(self.make_word_bias(size))


class EncoderDecoderForConditionalGeneration(WritesWords, EncoderDecoder):
    """Predicts the decoder's next token."""

    def setup(self) -> None:
        super().setup()
        self.lm_head = ShiftedLanguageHead(self.config.decoder, self.dtype)

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return self.lm_head(hidden_BMD, self.target_words)

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        logits_BTV = self.unembed(hidden_BTD)
        return {"logits": logits_BTV[..., : self.config.decoder.vocab_size]}


class EncoderDecoderForSequenceClassification(SequenceClassificationHead, EncoderDecoder):
    """Labels the row by the decoder's state at the last end-of-sequence token (arXiv:1910.13461).

    The decoder reads the input, shifted; ``decoder_input_ids`` are left out.
    """

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        ends_BT = jnp.isin(tokens.ids, jnp.asarray(self.config.eos_ids))
        last_B1D = take_token(hidden_BTD, last_token(ends_BT))
        dropped_B1D = self.head_dropout(last_B1D, deterministic=deterministic)
        return self.head_dropout(self.pooler(dropped_B1D), deterministic=deterministic)


class EncoderDecoderForQuestionAnswering(QuestionAnsweringHead, EncoderDecoder):
    """Marks the first and the last token of an answer, on the decoder's states."""
