"""Mistral (Jiang et al., arXiv:2310.06825): Llama with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.families import llama
from flax_transformers.models.config import Rope


@dataclass(frozen=True, kw_only=True)
class MistralConfig(llama.LlamaConfig):
    """Llama with fewer key heads and a window; the first 7B by default."""

    architecture: str = "MistralForCausalLM"
    num_key_value_heads: int | None = 8
    intermediate_size: int = 14336
    max_positions: int | None = 131072
    sliding_window: int | None = 4096
    """Number of tokens that a token attends to, itself and those before it; None: all."""

    RANGES: ClassVar[ranges.Ranges] = {"sliding_window": ranges.POSITIONS}

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_layers


_V0_1 = MistralConfig(max_positions=32768, norm_eps=1e-5)
_V0_2 = replace(_V0_1, sliding_window=None, rope=Rope(theta=1e6))

SIZES: dict[str, MistralConfig] = {
    "mistral-7b-v0.1": _V0_1,
    "mistral-7b-v0.2": _V0_2,
    "mistral-7b-v0.3": replace(_V0_2, vocab_size=32768),
    "mistral-nemo-12b": replace(
        _V0_2,
        vocab_size=131072,
        hidden_size=5120,
        num_layers=40,
        head_dim=128,
        max_positions=131072,
    ),
}
"""The published sizes."""


OPTIONAL = llama.OPTIONAL | {"sliding_window": "sliding_window"}

JSON = llama.LlamaFields(
    defaults=MistralConfig(), fixed={"model_type": "mistral"}, optional=OPTIONAL
)

FAMILY = llama.family(
    "Mistral",
    JSON,
    sizes=SIZES,
)
