"""A family as a program of a user's own defines it, with parameter names unlike the package's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.huggingface import fields
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable
from flax_transformers.models.config import ComputeConfig, TextConfig
from flax_transformers.models.heads import Unembedding
from flax_transformers.models.outputs import HiddenStates, ModelOutput

NORMAL, ONES, ZEROS = (
    nn.initializers.normal(0.1),
    nn.initializers.ones_init(),
    nn.initializers.zeros_init(),
)


@dataclass(frozen=True, kw_only=True)
class BagConfig(TextConfig):
    """Each token is mixed with the mean of all."""

    architecture: str = "BagForCausalLM"
    vocab_size: int = 96
    hidden_size: int = 8
    num_layers: int = 3
    num_heads: int = 2
    intermediate_size: int = 12
    max_positions: int | None = 64
    causal: bool = True
    tie_embeddings: bool = False
    speed: float = 1.0
    """A field that only this family has."""


class Mixer(nn.Module):
    """All layers at once, with axes of layers of its own."""

    config: BagConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        sizes = {
            "layers": c.num_layers, "embed": c.hidden_size, "mlp": c.intermediate_size,
            "norm": c.hidden_size,
        }  # fmt: skip

        def own(name: str, init: Any, *axes: str) -> jax.Array:
            init = nn.with_logical_partitioning(init, axes)
            return self.param(name, init, tuple(sizes[axis] for axis in axes), jnp.float32)

        weights = (
            own("gain", ONES, "layers", "norm"),
            own("w_in", NORMAL, "layers", "embed", "mlp"),
            own("b_in", ZEROS, "layers", "mlp"),
            own("w_out", NORMAL, "layers", "mlp", "embed"),
        )

        def layer(x_BTD: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            gain_D, in_DF, in_F, out_FD = weights
            mixed_BTD = gain_D * (x_BTD + x_BTD.mean(axis=1, keepdims=True))
            return x_BTD + c.speed * jnp.tanh(mixed_BTD @ in_DF + in_F) @ out_FD, None

        with jax.numpy_rank_promotion("allow"):
            return jax.lax.scan(layer, x_BTD, weights)[0]


class Lookup(nn.Module):
    """A table of vectors."""

    rows: int
    width: int

    def setup(self) -> None:
        init = nn.with_logical_partitioning(NORMAL, ("vocab", "embed"))
        self.vectors = self.param("vectors", init, (self.rows, self.width), jnp.float32)


class Readout(nn.Module):
    """From hidden states to logits."""

    config: BagConfig

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(NORMAL, ("embed", "vocab"))
        shape = (c.hidden_size, c.padded_vocab_size)
        self.out = self.param("out", init, shape, jnp.float32)


class BagForCausalLM(nn.Module):
    """The model with its head."""

    config: BagConfig
    compute: ComputeConfig = ComputeConfig()

    inputs: ClassVar = ("input_ids", "attention_mask", "segment_ids")

    def example_inputs(self) -> dict[str, jax.Array]:
        return {"input_ids": jnp.zeros((1, 2), jnp.int32)}

    def setup(self) -> None:
        c = self.config
        self.lookup = Lookup(c.padded_vocab_size, c.hidden_size)
        self.mixer = Mixer(c)
        self.readout = Readout(c)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> HiddenStates:
        return HiddenStates(self.mixer(self.lookup.vectors[input_ids]))

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        return Unembedding(hidden_BMD, self.readout.out.T, None, self.config.vocab_size)

    def unembed(self, hidden_BMD: jax.Array) -> jax.Array:
        return self.unembedding(hidden_BMD).logits()

    def __call__(self, input_ids: jax.Array, *, deterministic: bool = True) -> ModelOutput:
        hidden_BTD = self.hidden_states(input_ids).last_hidden_state
        logits_BTV = self.unembed(hidden_BTD)[..., : self.config.vocab_size]
        return ModelOutput(last_hidden_state=hidden_BTD, logits=logits_BTV)


class BagModel(BagForCausalLM):
    """The model without a head."""

    def __call__(self, input_ids: jax.Array, *, deterministic: bool = True) -> ModelOutput:
        return ModelOutput(last_hidden_state=self.hidden_states(input_ids).last_hidden_state)


NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_layers": "depth",
    "intermediate_size": "inner",
    "speed": "speed",
}


def from_huggingface(described: Any) -> BagConfig:
    found = fields.common_fields(described, BagConfig())
    found |= {ours: described[theirs] for ours, theirs in NUMBERS.items() if theirs in described}
    return fields.make_config(BagConfig, found)


def to_huggingface(config: BagConfig) -> dict[str, Any]:
    return {
        "model_type": "bag",
        **fields.common_json(config),
        **fields.write_fields(config, NUMBERS),
    }


def weights(config: BagConfig) -> WeightTable:
    return WeightTable(
        weights=(
            Weight("lookup/vectors", "bag.lookup.weight", "VD"),
            Weight("mixer/gain", "bag.gain"),
            Weight("mixer/w_in", "bag.in.weight", "LDF->LFD"),
            Weight("mixer/b_in", "bag.in.bias"),
            Weight("mixer/w_out", "bag.out.weight"),
            Weight("readout/out", "readout.weight", "DV->VD"),
        ),
        prefix="bag.",
    )


FAMILY = Family(
    config=BagConfig,
    architectures={"BagForCausalLM": BagForCausalLM, "BagModel": BagModel},
    model_types=("bag",),
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
