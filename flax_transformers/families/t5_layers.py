"""What T5 and its kin do in their own way: relative positions, and a step before the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.base import Tokens
from flax_transformers.models.classification_heads import TokenClassificationHead
from flax_transformers.models.encoder_decoder import Side, WithEncoder
from flax_transformers.models.encoder_decoder_heads import EncoderDecoderForConditionalGeneration
from flax_transformers.models.heads import Unembedding
from flax_transformers.models.layers.attention import KeyValues
from flax_transformers.models.layers.block import LayerCache, LayerInputs, TransformerBlock
from flax_transformers.models.layers.embeddings import Embedding
from flax_transformers.models.layers.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.sharding import constrain
from flax_transformers.models.outputs import HiddenStates, ModelOutput

if TYPE_CHECKING:
    from flax_transformers.families.t5 import T5Config


def buckets_by_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance from 0 to ``max_distance``, int32 (arXiv:1910.10683 §2.1).

    Half of the buckets hold one distance each; the other half grow in equal ratios, and the last
    one holds ``max_distance`` and all beyond. Counted in integers: where a ratio is met exactly,
    logarithms in floating point may fall on either side.
    """
    exact = num_buckets // 2
    ratios = num_buckets - exact
    buckets = np.arange(max_distance + 1, dtype=np.int32)
    bucket = 0
    for distance in range(exact, max_distance + 1):
        # distance / exact >= (max_distance / exact) ** ((bucket + 1) / ratios)
        while bucket < ratios - 1 and distance**ratios * exact ** (
            bucket + 1
        ) >= exact**ratios * max_distance ** (bucket + 1):
            bucket += 1
        buckets[distance] = exact + bucket
    return buckets


class RelativeBias(nn.Module):
    """What distances add to the scores of each head; a table over ``buckets_by_distance``."""

    config: T5Config

    @nn.compact
    def __call__(self) -> RelativePositionBias:
        c = self.config
        table = Embedding(
            c.relative_buckets,
            c.num_heads,
            jnp.dtype(jnp.float32),
            axes=("positions", "heads"),
            init_std=c.initial_std("bias"),
            name="table",
        )
        distance = np.arange(-c.relative_max_distance, c.relative_max_distance + 1)
        # An encoder looks both ways and spends half of its buckets on what comes after.
        one_way = c.relative_buckets if c.causal else c.relative_buckets // 2
        before = np.maximum(-distance, 0) if c.causal else np.abs(distance)
        bucket = buckets_by_distance(one_way, c.relative_max_distance)[before]
        if not c.causal:
            bucket = bucket + np.where(distance > 0, one_way, 0)
        return RelativePositionBias(constrain(table(jnp.asarray(bucket)).T, ("heads", None)))


class UMT5Block(TransformerBlock):
    """A layer with relative positions of its own."""

    config: T5Config

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        bias = RelativeBias(self.config, name="relative_bias")()
        return super().self_attention(x_BTD, inputs.replace(bias=bias), cache)


class T5Side(Side):
    """Relative positions for all layers, and dropout after the last norm too."""

    config: T5Config

    def setup(self) -> None:
        super().setup()
        if not self.config.bias_in_every_layer:
            self.relative_bias = RelativeBias(self.config)
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(
        self,
        words_BTD: jax.Array,
        position_ids: jax.Array,
        inputs: LayerInputs,
        own: LayerCache | None = None,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:
        if not self.config.bias_in_every_layer:
            inputs = inputs.replace(bias=self.relative_bias())
        x_BTD, out = super().__call__(
            words_BTD, position_ids, inputs, own, deterministic=deterministic
        )
        return self.dropout(x_BTD, deterministic=deterministic), out


class T5EncoderModel(WithEncoder):
    """The encoder alone."""

    inputs = ("input_ids", "attention_mask", "position_ids", "segment_ids")

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> HiddenStates:
        """``encode`` as other models have it."""
        hidden_BTD = self.encode(
            input_ids, attention_mask, position_ids, segment_ids, deterministic=deterministic
        )
        return HiddenStates(hidden_BTD)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Both halves at once; see ``encode`` for the inputs."""
        hidden_BTD = self.encode(
            input_ids, attention_mask, position_ids, segment_ids, deterministic=deterministic
        )
        return self.output(
            last_hidden_state=hidden_BTD,
            **self.head_outputs(hidden_BTD, Tokens(input_ids, attention_mask), deterministic),
        )


class T5ForConditionalGeneration(EncoderDecoderForConditionalGeneration):
    """Predicts the decoder's next token; T5 1.0 makes hidden states small before that."""

    config: T5Config

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        c = self.config
        scale = c.hidden_size**-0.5 if c.scale_logits else 1.0
        return super().unembedding(hidden_BMD * jnp.asarray(scale, hidden_BMD.dtype))


class T5ForTokenClassification(TokenClassificationHead, T5EncoderModel):
    """Labels every token, by the encoder alone."""
