"""Mixtral (Jiang et al., arXiv:2401.04088): Mistral with a mixture of experts in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax

from flax_transformers import ranges
from flax_transformers.families import llama
from flax_transformers.families.mistral import OPTIONAL
from flax_transformers.huggingface.weights import Weight, WeightTable
from flax_transformers.models.config import Rope
from flax_transformers.models.layers.block import LayerInputs, TransformerBlock
from flax_transformers.models.layers.mixture_of_experts import Balance, MixtureOfExperts, balance_of
from flax_transformers.models.parts import ModelParts

_ROPE = Rope(theta=1e6)


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(llama.LlamaConfig):
    """Mistral with a mixture of experts; 8x7B by default."""

    architecture: str = "MixtralForCausalLM"
    num_key_value_heads: int | None = 8
    intermediate_size: int = 14336
    max_positions: int | None = 131072
    norm_eps: float = 1e-5
    rope: Rope | None = _ROPE
    sliding_window: int | None = None
    """Number of tokens that a token attends to, itself and those before it; None: all."""
    experts: int = 8
    """Number of experts in each layer."""
    experts_per_token: int = 2
    balance_coefficient: float = 0.001
    """Coefficient of the load-balancing loss in config.json; training uses the objective's
    ``balance_weight``."""

    RANGES: ClassVar[ranges.Ranges] = {
        "sliding_window": ranges.POSITIONS,
        "experts": ranges.integers(1, 2**16),
        "experts_per_token": ranges.integers(1, 2**16),
        "balance_coefficient": ranges.COEFFICIENT,
    }

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_layers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts_per_token > self.experts:
            raise ranges.OutOfRange(
                f"model.experts_per_token is {self.experts_per_token}; it must be between 1 and "
                f"model.experts, {self.experts}"
            )


class MixtralBlock(TransformerBlock):
    """A layer with a mixture of experts; its auxiliary sums are the balance of the experts."""

    config: MixtralConfig

    def feed_forward(self, x_BTD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, Balance]:
        c = self.config
        experts = MixtureOfExperts(c, self.dtype, c.experts, c.experts_per_token, name="mlp")
        y_BTD, routing = experts(x_BTD)
        segments_BT = None if inputs.mask is None else inputs.mask.query_segments
        return y_BTD, balance_of(routing, segments_BT)


_SMALL = MixtralConfig(max_positions=32768, balance_coefficient=0.02)
_LARGE = MixtralConfig(max_positions=65536)

SIZES: dict[str, MixtralConfig] = {
    "mixtral-8x7b": _SMALL,
    "mixtral-8x22b": llama.sized(_LARGE, layers=56, width=6144, heads=48, inner=16384),
}
"""The published sizes."""

JSON = llama.LlamaFields(
    defaults=MixtralConfig(),
    fixed={"model_type": "mixtral", "router_jitter_noise": 0.0},
    numbers=llama.NUMBERS
    | {
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "balance_coefficient": "router_aux_loss_coef",
    },
    optional=OPTIONAL,
    aliases={"num_experts": "num_local_experts"},
)

_EXPERTS = f"{llama.THEIR_LAYER}.block_sparse_moe"

FEED_FORWARD = (
    Weight(f"{llama.LAYER}/mlp/router/kernel", f"{_EXPERTS}.gate.weight", "DE->ED"),
    Weight(f"{llama.LAYER}/mlp/gate/kernel", f"{_EXPERTS}.experts.{{expert}}.w1.weight", "DF->FD"),
    Weight(f"{llama.LAYER}/mlp/down/kernel", f"{_EXPERTS}.experts.{{expert}}.w2.weight", "FD->DF"),
    Weight(f"{llama.LAYER}/mlp/up/kernel", f"{_EXPERTS}.experts.{{expert}}.w3.weight", "DF->FD"),
)
"""The router and the experts of a layer."""


def weights(config: MixtralConfig) -> WeightTable:
    """The names of Mixtral's tensors, as they are saved."""
    return llama.decoder_table(config, FEED_FORWARD)


FAMILY = llama.family(
    "Mixtral",
    JSON,
    parts=ModelParts(block=MixtralBlock),
    sizes=SIZES,
    weights=weights,
)
