"""Command R and R+ (Cohere, 2024): attention and feed-forward side by side behind one norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax

from flax_transformers import ranges
from flax_transformers.families import llama
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import WeightTable, norm
from flax_transformers.models.config import QueryKeyNorm, Rope
from flax_transformers.models.decoder import DecoderForCausalLM
from flax_transformers.models.kernels.kv_cache import LayerCache
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.text import TextModel

ARCHITECTURES = {"CohereForCausalLM": DecoderForCausalLM, "CohereModel": TextModel}

COMMAND_R_ROPE = Rope(theta=8e6, interleaved=True)


@dataclass(frozen=True, kw_only=True)
class CohereConfig(llama.LlamaConfig):
    """Parallel sub-layers behind a layer norm without bias, rotation of adjacent features, tied and
    scaled logits; Command R by default."""

    architecture: str = "CohereForCausalLM"
    vocab_size: int = 256000
    hidden_size: int = 8192
    num_layers: int = 40
    num_heads: int = 64
    intermediate_size: int = 22528
    max_positions: int | None = 8192
    rope: Rope | None = COMMAND_R_ROPE
    norm: Literal["layer", "rms"] = "layer"
    norm_bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_id: int = 0
    bos_id: int | None = 5
    eos_ids: tuple[int, ...] = (255001,)
    logit_scale: float = 0.0625
    """Factor on the logits of the vocabulary."""
    norm_of_heads: bool = False
    """A layer norm of each query and key (R+)."""

    RANGES: ClassVar[ranges.Ranges] = {"logit_scale": ranges.numbers(0, 1e6, above=True)}

    @property
    def query_key_norm(self) -> QueryKeyNorm:
        return "each" if self.norm_of_heads else "none"


class CohereBlock(TransformerBlock):
    """A layer ``x + attention(norm(x)) + mlp(norm(x))``, with one norm (PaLM, arXiv:2204.02311)."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerOutput]:
        y_BTD = self.norm("attention")(x_BTD)
        own = None if cache is None else cache.own
        attended_BTD, own = self.self_attention(y_BTD, inputs, own)
        fed_BTD, auxiliary = self.feed_forward(y_BTD, inputs)
        x_BTD = self.residual("attention", x_BTD, attended_BTD + fed_BTD)
        updated = None if inputs.index is None else LayerCache(own, None)
        return x_BTD, LayerOutput(updated, auxiliary)


SIZES: dict[str, CohereConfig] = {
    "command-r": CohereConfig(),
    "command-r-08-2024": CohereConfig(
        num_key_value_heads=8, intermediate_size=24576, rope=Rope(theta=4e6, interleaved=True)
    ),
    "command-r-plus": CohereConfig(
        hidden_size=12288,
        num_layers=64,
        num_heads=96,
        num_key_value_heads=8,
        intermediate_size=33792,
        rope=Rope(theta=75e6, interleaved=True),
        logit_scale=0.8333333333333334,
        norm_of_heads=True,
    ),
}
"""The published sizes."""

DEFAULTS = replace(CohereConfig(), rope=Rope(theta=500000.0, interleaved=True))
"""What a config.json means by fields that it leaves out."""


JSON = llama.LlamaFields(
    defaults=DEFAULTS,
    fixed={"model_type": "cohere"},
    numbers=llama.NUMBERS | {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
    switches=llama.TIED | llama.ATTENTION_BIAS | {"norm_of_heads": "use_qk_norm"},
)


def from_huggingface(config: Mapping[str, Any]) -> CohereConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    fields = JSON.fields(config)
    rope = replace(fields["rope"], interleaved=True)
    return huggingface.make_config(CohereConfig, fields | {"rope": rope})


def weights(config: CohereConfig) -> WeightTable:
    """The names of Cohere's tensors."""
    norms = (
        *norm(f"{llama.LAYER}/attention_norm", f"{llama.THEIR_LAYER}.input_layernorm"),
        *llama.head_norms("NH->NH"),
    )
    return llama.decoder_table(config, norms=norms)


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    parts=ModelParts(block=CohereBlock),
    from_huggingface=from_huggingface,
    weights=weights,
)
