"""OLMo 2 (arXiv:2501.00656): norms after the sub-layers, and of all queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

from flax_transformers.families import llama
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import WeightTable, norm
from flax_transformers.models.config import QueryKeyNorm, Rope
from flax_transformers.models.layers.block import TransformerBlock
from flax_transformers.models.parts import ModelParts

ARCHITECTURES = {
    name: kind
    for name, kind in llama.architectures("Olmo2").items()
    if name in ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification", "Olmo2Model")
}

OLMO_ROPE = Rope(theta=500000.0)


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(llama.LlamaConfig):
    """Llama with ``x + norm(f(x))`` and an RMS norm of all queries, and of all keys, together; the
    7B by default."""

    architecture: str = "Olmo2ForCausalLM"
    vocab_size: int = 100352
    max_positions: int | None = 4096
    rope: Rope | None = OLMO_ROPE
    norm_eps: float = 1e-6
    pad_id: int = 100277
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (100257,)

    @property
    def query_key_norm(self) -> QueryKeyNorm:
        return "all"


class Olmo2Block(TransformerBlock):
    """A layer that normalises the output of each sub-layer before the residual sum."""

    def pre_norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def residual(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return super().residual(name, x_BTD, self.norm(name)(y_BTD))


_BASE = Olmo2Config()

SIZES: dict[str, Olmo2Config] = {
    "olmo2-1b": llama.sized(_BASE, layers=16, width=2048, heads=16, inner=8192),
    "olmo2-7b": _BASE,
    "olmo2-13b": llama.sized(_BASE, layers=40, width=5120, heads=40, inner=13824),
    "olmo2-32b": llama.sized(_BASE, layers=64, width=5120, heads=40, key_heads=8, inner=27648),
}
"""The published sizes."""

DEFAULTS = replace(
    Olmo2Config(),
    vocab_size=50304,
    max_positions=2048,
    rope=Rope(),
    norm_eps=1e-5,
    pad_id=1,
    eos_ids=(50279,),
)
"""What a config.json means by fields that it leaves out."""


JSON = llama.LlamaFields(
    defaults=DEFAULTS, fixed={"model_type": "olmo2"}, switches=llama.TIED | llama.ATTENTION_BIAS
)


def weights(config: Olmo2Config) -> WeightTable:
    """The names of OLMo 2's tensors."""
    norms = (
        *norm(f"{llama.LAYER}/attention_norm", f"{llama.THEIR_LAYER}.post_attention_layernorm"),
        *norm(f"{llama.LAYER}/mlp_norm", f"{llama.THEIR_LAYER}.post_feedforward_layernorm"),
        *llama.head_norms("NH->(NH)"),
    )
    return llama.decoder_table(config, norms=norms)


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    parts=ModelParts(block=Olmo2Block),
    weights=weights,
)
