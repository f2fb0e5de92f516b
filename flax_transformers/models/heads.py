"""What stands on top of a stack.

By convention the parameters of a head lie at the top of the tree under ``pooler`` or a name that
ends in ``_head``: these are what fine-tuning starts afresh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.embeddings import Embedding, mask_padded_vocabulary
from flax_transformers.models.feed_forward import ACTIVATIONS, Activation
from flax_transformers.models.linear import Linear, einsum, truncated_normal
from flax_transformers.models.sharding import LOGITS, constrain

if TYPE_CHECKING:
    from flax_transformers.models.config import TextConfig, TransformerConfig


def is_head(name: str) -> bool:
    """Whether the top-level parameters ``name`` belong to a head."""
    return name == "pooler" or name.endswith("_head")


def square_layer(
    config: TransformerConfig, dtype: jnp.dtype, *, use_bias: bool = True, name: str | None = None
) -> Linear:
    """The first layer of a head that has two, [B, T, D] to [B, T, D]."""
    return Linear(
        "BTD,DE->BTE",
        (config.hidden_size, config.hidden_size),
        ("embed", "features"),
        dtype=dtype,
        use_bias=use_bias,
        init_std=config.initial_std("dense"),
        name=name,
    )


class Transform(nn.Module):
    """Linear, activation, norm, [B, M, D] to [B, M, D]: what BERT and its kin put before logits."""

    config: TransformerConfig
    dtype: jnp.dtype
    activation: Activation

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array) -> jax.Array:
        dense = square_layer(self.config, self.dtype, use_bias=self.use_bias, name="dense")
        hidden_BMD = ACTIVATIONS[self.activation](dense(hidden_BMD))
        return self.config.make_norm(self.dtype, name="norm")(hidden_BMD)

    @property
    def use_bias(self) -> bool:
        """Whether the linear layer has a bias vector."""
        return True


class LanguageHead(nn.Module):
    """Hidden states to logits, by the word table or, where that is not tied, by one of its own.

    [B, M, D] to float32 [B, M, V]; padded vocabulary entries get the lowest float32. Heads that
    do more override one of the methods.
    """

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array, words: Embedding) -> jax.Array:
        c = self.config
        hidden_BMD = self.before_words(hidden_BMD)
        if c.tie_embeddings:
            logits_BMV = words.attend(hidden_BMD)
        else:
            logits_BMV = WordProjection(c, self.dtype, name="words")(hidden_BMD)
        return mask_padded_vocabulary(self.after_words(logits_BMV), c.vocab_size)

    def before_words(self, hidden_BMD: jax.Array) -> jax.Array:
        """What stands before the word table: nothing."""
        return hidden_BMD

    def after_words(self, logits_BMV: jax.Array) -> jax.Array:
        """What stands after it: nothing, or ``word_bias``."""
        return logits_BMV

    def word_bias(self, size: int) -> jax.Array:
        """A number for each word, float32 [1, 1, V]; it starts at zero."""
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
        return self.param("bias", init, (size,), jnp.float32)[None, None, :]


class MaskedLMHead(LanguageHead):
    """BERT's: a transform before the word table, and a bias per word after it."""

    def before_words(self, hidden_BMD: jax.Array) -> jax.Array:
        return self.make_transform()(hidden_BMD)

    def make_transform(self) -> Transform:
        """What stands before the word table, under the name ``transform``."""
        return Transform(self.config, self.dtype, self.config.activation, name="transform")

    def after_words(self, logits_BMV: jax.Array) -> jax.Array:
        return logits_BMV + self.word_bias(logits_BMV.shape[-1])


class WordProjection(nn.Module):
    """A word table of its own for the logits: [B, M, D] to float32 [B, M, V], nothing masked."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array) -> jax.Array:
        c, std = self.config, self.config.initial_std("logits")
        init = nn.with_logical_partitioning(truncated_normal(std), ("embed", "vocab"))
        kernel = self.param("kernel", init, (c.hidden_size, c.padded_vocab_size), jnp.float32)
        kernel_DV, hidden_BMD = kernel.astype(self.dtype), hidden_BMD.astype(self.dtype)
        return constrain(einsum("BMD,DV->BMV", hidden_BMD, kernel_DV, jnp.float32), LOGITS)


class Pooler(nn.Module):
    """BERT's summary of a row: linear and tanh of the first token, [B, T, D] to [B, D]."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        dense = square_layer(self.config, self.dtype, name="dense")
        return jnp.tanh(dense(hidden_BTD[:, :1]))[:, 0]


def label_layer(
    config: TransformerConfig, dtype: jnp.dtype, outputs: int, *, use_bias: bool = True
) -> Linear:
    """The last layer of a classifier, [B, T, D] to [B, T, outputs]."""
    return Linear(
        "BTD,DC->BTC",
        (config.hidden_size, outputs),
        ("embed", "labels"),
        dtype=dtype,
        use_bias=use_bias,
        init_std=config.initial_std("labels"),
    )


def label_rows(layer: Linear, vector_BD: jax.Array) -> jax.Array:
    """Logits float32 [B, labels] of one vector for each row."""
    return layer(vector_BD[:, None])[:, 0].astype(jnp.float32)


def last_token(attention_mask: jax.Array) -> jax.Array:
    """Place int32 [B] of the last 1 in each row of a mask [B, T]; 0 where there is none."""
    index_T = jnp.arange(attention_mask.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(attention_mask > 0, index_T[None, :], 0), axis=1)


def take_token(hidden_BTD: jax.Array, place_B: jax.Array) -> jax.Array:
    """The hidden states [B, 1, D] at one place of each row."""
    return jnp.take_along_axis(hidden_BTD, place_B[:, None, None], axis=1)
