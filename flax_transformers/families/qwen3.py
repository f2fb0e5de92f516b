"""Qwen 3 (arXiv:2505.09388): Llama with a norm of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax_transformers.families import llama
from flax_transformers.families.qwen2 import LONG_ROPE, UpperWindows, WindowFields
from flax_transformers.huggingface.weights import WeightTable
from flax_transformers.models.config import QueryKeyNorm, Rope


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


_BASE = Qwen3Config()
_SMALL = replace(_BASE, tie_embeddings=True)

SIZES: dict[str, Qwen3Config] = {
    "qwen3-0.6b": llama.sized(_SMALL, layers=28, width=1024, heads=16, head_dim=128, inner=3072),
    "qwen3-1.7b": llama.sized(_SMALL, layers=28, width=2048, heads=16, head_dim=128, inner=6144),
    "qwen3-4b": llama.sized(_SMALL, layers=36, width=2560, heads=32, head_dim=128, inner=9728),
    "qwen3-8b": _BASE,
    "qwen3-14b": llama.sized(_BASE, layers=40, width=5120, heads=40, head_dim=128, inner=17408),
    "qwen3-32b": llama.sized(_BASE, layers=64, width=5120, heads=64, head_dim=128, inner=25600),
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


@dataclass(frozen=True, kw_only=True)
class _Fields(WindowFields[Qwen3Config]):
    """The config.json of Qwen 3: heads are 128 wide where it does not say."""

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().own_fields({"head_dim": 128, **config})


JSON = _Fields(
    defaults=DEFAULTS, fixed={"model_type": "qwen3"}, switches=llama.TIED | llama.ATTENTION_BIAS
)


def weights(config: Qwen3Config) -> WeightTable:
    """The names of Qwen 3's tensors."""
    table = llama.decoder_table(config, norms=llama.NORMS + llama.head_norms("H->H"))
    return llama.with_prefix_of_questions(config, table)


FAMILY = llama.family(
    "Qwen3",
    JSON,
    sizes=SIZES,
    weights=weights,
)
