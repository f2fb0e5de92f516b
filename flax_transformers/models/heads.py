"""What stands on top of a stack."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.embeddings import Embedding, mask_padded_vocabulary
from flax_transformers.models.feed_forward import ACTIVATIONS
from flax_transformers.models.linear import Linear
from flax_transformers.models.norms import make_norm


class MaskedLMHead(nn.Module):
    """BERT's head: linear, activation, norm, then the word table again and a bias per word.

    [B, M, D] to logits float32 [B, M, V]; padded vocabulary entries get the lowest float32.
    """

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_BMD: jax.Array, words: Embedding) -> jax.Array:
        c = self.config
        width = c.hidden_size
        transform = Linear(
            "BMD,DE->BME",
            (width, width),
            ("embed", "features"),
            dtype=self.dtype,
            init_std=c.init_std,
            name="transform",
        )
        hidden_BMD = ACTIVATIONS[c.activation](transform(hidden_BMD))
        hidden_BMD = make_norm(c.norm, c.norm_eps, self.dtype, name="norm")(hidden_BMD)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
        bias_V = self.param("bias", bias_init, (c.padded_vocab_size,), jnp.float32)
        logits_BMV = words.attend(hidden_BMD) + bias_V[None, None, :]
        return mask_padded_vocabulary(logits_BMV, c.vocab_size)
