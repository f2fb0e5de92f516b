"""Qwen 3 (arXiv:2505.09388): Llama with a norm of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flax_transformers.families import llama
from flax_transformers.families.qwen2 import LONG_ROPE, UpperWindows, WindowFields
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import WeightTable
from flax_transformers.models.config import QueryKeyNorm, Rope

ARCHITECTURES = llama.architectures("Qwen3")


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(UpperWindows, llama.LlamaConfig):
    """Llama with an RMS norm of each query and key, heads 128 wide; 8B by default."""

    architecture: str = "Qwen3ForCausalLM"
    vocab_size: int = 151936
    hidden_size: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    intermediate_size: int = 12288
    max_positions: int | None = 40960
    rope: Rope | None = LONG_ROPE
    norm_eps: float = 1e-6
    bos_id: int | None = 151643
    eos_ids: tuple[int, ...] = (151645,)

    @property
    def query_key_norm(self) -> QueryKeyNorm:
        return "shared"


_SMALL: dict[str, Any] = {"tie_embeddings": True}
SIZES: dict[str, Qwen3Config] = {
    "qwen3-0.6b": Qwen3Config(
        **_SMALL, hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=3072
    ),
    "qwen3-1.7b": Qwen3Config(
        **_SMALL, hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144
    ),
    "qwen3-4b": Qwen3Config(**_SMALL, hidden_size=2560, intermediate_size=9728),
    "qwen3-8b": Qwen3Config(),
    "qwen3-14b": Qwen3Config(
        hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=17408
    ),
    "qwen3-32b": Qwen3Config(
        hidden_size=5120, num_layers=64, num_heads=64, intermediate_size=25600
    ),
}
"""The published sizes."""

DEFAULTS = replace(
    Qwen3Config(),
    num_layers=32,
    num_key_value_heads=32,
    intermediate_size=22016,
    max_positions=32768,
    rope=Rope(),
    bos_id=None,
    eos_ids=(),
)
"""What a config.json means by fields that it leaves out."""


JSON = WindowFields(
    defaults=DEFAULTS, fixed={"model_type": "qwen3"}, switches=llama.TIED | llama.ATTENTION_BIAS
)
from_huggingface, to_huggingface = JSON.read, JSON.write


def weights(config: Qwen3Config) -> WeightTable:
    """The names of Qwen 3's tensors."""
    table = llama.decoder_table(config, norms=llama.NORMS + llama.head_norms("H->H"))
    return llama.with_prefix_of_questions(config, table)


FAMILY = Family(
    config=Qwen3Config,
    model_types=("qwen3",),
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    only_here=(llama.value_architecture("Qwen3"),),
)
