"""Layers of heads: logits over the vocabulary, poolers and classifiers."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.config import Activation, TextConfig, TransformerConfig
from flax_transformers.models.kernels.closed_form import soft_capped
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.embeddings import Embedding, mask_padded_vocabulary
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.linear import Linear, feature_map, truncated_normal
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.outputs import Outputs
from flax_transformers.parallel.matmul import weighted
from flax_transformers.parallel.partitioning import LOGITS, constrain


def square_layer(
    config: TransformerConfig,
    dtype: jnp.dtype,
    *,
    use_bias: bool = True,
    width: int | None = None,
) -> Linear:
    """The first layer of a head that has two, [B, T, D] to [B, T, D] or to another ``width``, named
    ``dense``."""
    outputs, std = config.hidden_size if width is None else width, config.initial_std("dense")
    return feature_map(
        config.hidden_size, outputs, dtype, use_bias=use_bias, init_std=std, name="dense"
    )


class Transform(nn.Module):
    """Linear layer, activation and norm, [B, M, D] to [B, M, E]: BERT's layers before logits."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array) -> jax.Array:
        c = self.config
        dense = square_layer(c, self.dtype, use_bias=c.head_bias, width=c.embedding_width)
        hidden_BMD = ACTIVATIONS[c.head_activation](dense(hidden_BMD))
        return make_norm(c, self.dtype, name="norm")(hidden_BMD)


class Unembedding(struct.PyTreeNode):
    """The last affine map of a language model, not evaluated yet.

    Callers evaluate it whole or for a part of the vocabulary at a time. ``hidden_BMD``: hidden
    states. ``table_VD`` float32: one row for each entry of the padded vocabulary, of which the
    first ``size`` are real. ``bias_V`` float32, or None. ``softcap``: bound c of the logits l, as
    c * tanh(l / c), or None.
    """

    hidden_BMD: jax.Array
    table_VD: jax.Array
    bias_V: jax.Array | None
    size: int = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False, default=None)

    def logits(self) -> jax.Array:
        """float32 [B, M, V]; padding entries of the vocabulary get the lowest float32."""
        logits_BMV = weighted(
            "BMD,VD->BMV", ("vocab", "embed"), self.hidden_BMD, self.table_VD, jnp.float32
        )
        logits_BMV = constrain(logits_BMV, LOGITS)
        if self.bias_V is not None:
            logits_BMV = logits_BMV + self.bias_V[None, None, :]
        if self.softcap is not None:
            logits_BMV = soft_capped(logits_BMV, self.softcap)
        return mask_padded_vocabulary(logits_BMV, self.size)


class LMHead(nn.Module):
    """From hidden states [B, M, D] to an ``Unembedding`` by the embedding table or, if embeddings
    are not tied, by a table of its own.

    ``transform``: BERT's ``Transform`` comes first. ``use_bias``: a bias for each vocabulary entry;
    without ``train_bias`` it has no gradient.
    """

    config: TextConfig
    dtype: jnp.dtype
    transform: bool = False
    use_bias: bool = False
    train_bias: bool = True

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array, embeddings: Embedding) -> Unembedding:
        c = self.config
        if self.transform:
            hidden_BMD = Transform(c, self.dtype, name="transform")(hidden_BMD)
        table_VD = embeddings.embedding if c.tie_embeddings else OutputTable(c, name="words")()
        bias_V = None
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
            bias_V = self.param("bias", init, (len(table_VD),), jnp.float32)
            bias_V = bias_V if self.train_bias else jax.lax.stop_gradient(bias_V)
        if c.logit_scale != 1.0:
            hidden_BMD = hidden_BMD * c.logit_scale
        hidden_BMD = hidden_BMD.astype(self.dtype)
        return Unembedding(hidden_BMD, table_VD, bias_V, c.vocab_size, c.logit_softcap)


class OutputTable(nn.Module):
    """The output table of untied logits, float32 [V, E]; the parameter is a kernel [E, V]."""

    config: TextConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c, std = self.config, self.config.initial_std("logits")
        init = nn.with_logical_partitioning(truncated_normal(std), ("embed", "vocab"))
        return self.param("kernel", init, (c.embedding_width, c.padded_vocab_size), jnp.float32).T


class Tokens(NamedTuple):
    """The tokens of hidden states: ``ids`` int32 [B, T], or None if a cache has them; ``mask``
    [B, T], positive at tokens and 0 at padding, or None without padding."""

    ids: Any
    mask: Any


class LanguageModelMixin(nn.Module):
    """Logits over a vocabulary, for models that define ``unembedding``."""

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        """The last map for any chosen hidden states [B, M, D], not evaluated."""
        raise NotImplementedError

    def unembed(self, hidden_BMD: jax.Array) -> jax.Array:
        """Logits float32 [B, M, padded_vocab_size] of any chosen hidden states [B, M, D]."""
        return self.unembedding(hidden_BMD).logits()

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        unembedding = self.unembedding(hidden_BTD)
        return {"logits": unembedding.logits()[..., : unembedding.size]}


class QuestionAnsweringMixin(nn.Module):
    """Marks the first and the last token of an answer (BERT, arXiv:1810.04805 §4.2)."""

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, 2)

    def answer_spans(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T, 2] of the first and of the last token."""
        return self.classification_head(hidden_BTD).astype(jnp.float32)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        logits_BT2 = self.answer_spans(hidden_BTD, deterministic=deterministic)
        return {"start_logits": logits_BT2[..., 0], "end_logits": logits_BT2[..., 1]}


class TokenClassificationMixin(nn.Module):
    """Labels each token."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.classification_head = label_layer(c, self.dtype, c.num_labels)
        self.head_dropout = Dropout(c.head_dropout, self.compute.dropout_generator)

    def tag(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T, labels]."""
        hidden_BTD = self.head_dropout(hidden_BTD, deterministic=deterministic)
        return self.classification_head(hidden_BTD).astype(jnp.float32)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"logits": self.tag(hidden_BTD, deterministic=deterministic)}


class ActivatedLayer(nn.Module):
    """Linear layer and activation, [B, T, D] to [B, T, D]."""

    config: TransformerConfig
    dtype: jnp.dtype
    activation: Activation

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](square_layer(self.config, self.dtype)(hidden_BTD))


class ActivatedPoolingMixin(nn.Module):
    """For classifiers of sequences: a linear layer and an activation of the first token, or of the
    mean of all tokens if the config's ``pooling`` is "mean"."""

    pooler_activation: ClassVar[Activation] = "gelu"

    def setup(self) -> None:
        super().setup()
        self.pooler = ActivatedLayer(self.config, self.dtype, self.pooler_activation)

    def vector(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        """Input [B, D] of the linear layer."""
        mean = self.config.pooling == "mean"
        return mean_of_tokens(hidden_BTD, tokens.mask) if mean else hidden_BTD[:, 0]

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        vector_BD = self.vector(hidden_BTD, tokens, deterministic)
        pooled_BD = self.pooler(vector_BD[:, None])[:, 0]
        return self.head_dropout(pooled_BD, deterministic=deterministic)


class Pooler(nn.Module):
    """BERT's pooler: linear layer and tanh of the first token, [B, T, D] to [B, D]."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        return jnp.tanh(square_layer(self.config, self.dtype)(hidden_BTD[:, :1]))[:, 0]


def mean_of_tokens(hidden_BTD: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Mean [B, D] over the tokens of each sequence; over all positions without a mask, and in a row
    without tokens, which fills the last batch of an evaluation and must stay finite."""
    if attention_mask is None:
        return jnp.mean(hidden_BTD, axis=1)
    token_BT = attention_mask > 0
    token_BT |= ~token_BT.any(axis=1, keepdims=True)
    return jnp.mean(hidden_BTD, axis=1, where=token_BT[:, :, None])


def text_vectors(
    hidden_BTD: jax.Array, attention_mask: jax.Array | None, pool: str, normalize: bool
) -> jax.Array:
    """A vector of each text, float32 [B, D]: the mean of its tokens (``pool`` "mean"), or the first
    token ("cls"); of length 1 if ``normalize``."""
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    mean = pool == "mean"
    vector_BD = mean_of_tokens(hidden_BTD, attention_mask) if mean else hidden_BTD[:, 0]
    if not normalize:
        return vector_BD
    length_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
    return vector_BD / jnp.maximum(length_B1, 1e-12)


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


def classify_vectors(layer: Linear, vector_BD: jax.Array) -> jax.Array:
    """Logits float32 [B, labels] of one vector for each sequence or image."""
    return layer(vector_BD[:, None])[:, 0].astype(jnp.float32)


def last_token(attention_mask: jax.Array) -> jax.Array:
    """Position int32 [B] of the last 1 in each row of a mask [B, T]; 0 if there is none."""
    index_T = jnp.arange(attention_mask.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(attention_mask > 0, index_T[None, :], 0), axis=1)


def take_token(hidden_BTD: jax.Array, position_B: jax.Array) -> jax.Array:
    """Hidden states [B, 1, D] at one position of each sequence."""
    return jnp.take_along_axis(hidden_BTD, position_B[:, None, None], axis=1)
