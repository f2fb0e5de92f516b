"""What stands on top of a stack.

By convention the parameters of a head lie at the top of the tree under ``pooler`` or a name that
ends in ``_head``: these are what fine-tuning starts afresh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.layers.embeddings import Embedding, mask_padded_vocabulary
from flax_transformers.models.layers.feed_forward import ACTIVATIONS, Activation
from flax_transformers.models.layers.linear import Linear, truncated_normal, weighted
from flax_transformers.models.layers.sharding import LOGITS, constrain

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


class Unembedding(struct.PyTreeNode):
    """The last affine map of a language model, not carried out yet.

    Whoever needs logits can have them whole, or so many words at a time. ``hidden_BMD`` is what
    the words are compared with, ``table_VD`` float32 has a row for each entry of the padded
    vocabulary, of which the first ``size`` are real, and ``bias_V`` float32 is None where there is
    none.
    """

    hidden_BMD: jax.Array
    table_VD: jax.Array
    bias_V: jax.Array | None
    size: int = struct.field(pytree_node=False)

    def logits(self) -> jax.Array:
        """float32 [B, M, V]; entries that only pad the vocabulary get the lowest float32."""
        logits_BMV = weighted(
            "BMD,VD->BMV", ("vocab", "embed"), self.hidden_BMD, self.table_VD, jnp.float32
        )
        logits_BMV = constrain(logits_BMV, LOGITS)
        if self.bias_V is not None:
            logits_BMV = logits_BMV + self.bias_V[None, None, :]
        return mask_padded_vocabulary(logits_BMV, self.size)


class LanguageHead(nn.Module):
    """From hidden states [B, M, D] to an ``Unembedding`` by the word table or, where that is not
    tied, by one of its own. Heads that do more override one of the methods."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array, words: Embedding) -> Unembedding:
        c = self.config
        hidden_BMD = self.before_words(hidden_BMD).astype(self.dtype)
        table_VD = words.embedding if c.tie_embeddings else WordProjection(c, name="words")()
        return Unembedding(hidden_BMD, table_VD, self.word_bias(len(table_VD)), c.vocab_size)

    def before_words(self, hidden_BMD: jax.Array) -> jax.Array:
        """What stands before the word table: nothing."""
        return hidden_BMD

    def word_bias(self, size: int) -> jax.Array | None:
        """A number for each word, float32 [V]: none, or ``make_word_bias``."""
        return None

    def make_word_bias(self, size: int) -> jax.Array:
        """The parameter ``bias`` float32 [V]; it starts at zero."""
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
        return self.param("bias", init, (size,), jnp.float32)


class MaskedLMHead(LanguageHead):
    """BERT's: a transform before the word table, and a bias per word after it."""

    def before_words(self, hidden_BMD: jax.Array) -> jax.Array:
        return self.make_transform()(hidden_BMD)

    def make_transform(self) -> Transform:
        """What stands before the word table, under the name ``transform``."""
        return Transform(self.config, self.dtype, self.config.activation, name="transform")

    def word_bias(self, size: int) -> jax.Array | None:
        return self.make_word_bias(size)


class WordProjection(nn.Module):
    """A word table of its own for the logits, float32 [V, D]; the parameter is a kernel [D, V]."""

    config: TextConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c, std = self.config, self.config.initial_std("logits")
        init = nn.with_logical_partitioning(truncated_normal(std), ("embed", "vocab"))
        return self.param("kernel", init, (c.hidden_size, c.padded_vocab_size), jnp.float32).T


class WritesWords(nn.Module):
    """What models with a language head have in common."""

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        """What any chosen hidden states [B, M, D] say of the words, not carried out."""
        raise NotImplementedError

    def unembed(self, hidden_BMD: jax.Array) -> jax.Array:
        """Logits float32 [B, M, padded_vocab_size] of any chosen hidden states [B, M, D]."""
        return self.unembedding(hidden_BMD).logits()


class Pooler(nn.Module):
    """BERT's summary of a row: linear and tanh of the first token, [B, T, D] to [B, D]."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        dense = square_layer(self.config, self.dtype, name="dense")
        return jnp.tanh(dense(hidden_BTD[:, :1]))[:, 0]


def mean_of_tokens(hidden_BTD: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """The mean [B, D] over the tokens of each row; over all positions without a mask."""
    token_BT1 = None if attention_mask is None else (attention_mask > 0)[:, :, None]
    return jnp.mean(hidden_BTD, axis=1, where=token_BT1)


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
