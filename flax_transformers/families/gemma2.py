"""Gemma 2 (arXiv:2408.00118): bounded scores and logits, norms before and after, windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import llama
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.weights import WeightTable, norm
from flax_transformers.models.config import Activation
from flax_transformers.models.layers.block import TransformerBlock
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.parts import ModelParts

ARCHITECTURES = llama.architectures("Gemma2")
del ARCHITECTURES["Gemma2ForQuestionAnswering"]  # the original has none


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(llama.LlamaConfig):
    """Gemma with bounded attention scores and logits, four norms a layer, and a window in every
    other layer; the 2B by default."""

    architecture: str = "Gemma2ForCausalLM"
    vocab_size: int = 256000
    hidden_size: int = 2304
    num_layers: int = 26
    num_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    intermediate_size: int = 9216
    max_positions: int | None = 8192
    activation: Activation = "gelu_tanh"
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    pad_id: int = 0
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    sliding_window: int | None = 4096
    """Number of tokens that a token attends to in the first, third ... layer; None: all."""
    score_divisor: int = 256
    """Attention scores are divided by its root; the width of a head, except in the 27B."""
    attention_softcap: float | None = 50.0
    """Bound of attention scores; None for none."""
    logit_softcap: float | None = 30.0
    """Bound of the logits of the vocabulary; None for none."""
    norm_offset: ClassVar[float] = 1.0

    RANGES: ClassVar[ranges.Ranges] = {
        "sliding_window": ranges.POSITIONS,
        "score_divisor": ranges.integers(1, 10**6),
        "attention_softcap": ranges.numbers(0, 1e6, above=True),
        "logit_softcap": ranges.numbers(0, 1e6, above=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "rms":
            raise ranges.OutOfRange(f"model.norm is {self.norm!r}; Gemma has only 'rms'")

    @property
    def attention_scale(self) -> float:
        return self.score_divisor**-0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(None if layer % 2 else self.sliding_window for layer in range(self.num_layers))


class Gemma2Block(TransformerBlock):
    """A layer with a norm before and another after each sub-layer."""

    def residual(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        after = make_norm(self.config, self.dtype, name=f"{name}_post_norm")
        return super().residual(name, x_BTD, after(y_BTD))


_BASE = Gemma2Config()
_LARGE = Gemma2Config(head_dim=128, score_divisor=144)

SIZES: dict[str, Gemma2Config] = {
    "gemma2-2b": _BASE,
    "gemma2-9b": llama.sized(_BASE, layers=42, width=3584, heads=16, key_heads=8, inner=14336),
    "gemma2-27b": llama.sized(_LARGE, layers=46, width=4608, heads=32, key_heads=16, inner=36864),
}
"""The published sizes."""

_TYPES = ("sliding_attention", "full_attention")


def _types(num_layers: int) -> list[str]:
    return [_TYPES[layer % 2] for layer in range(num_layers)]


_JSON = llama.LlamaFields(
    defaults=Gemma2Config(),
    fixed={"model_type": "gemma2"},
    numbers=llama.NUMBERS | {"score_divisor": "query_pre_attn_scalar"},
    optional=llama.OPTIONAL
    | {
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
        "sliding_window": "sliding_window",
    },
    switches=llama.TIED | llama.ATTENTION_BIAS,
    whole_heads=True,
)


def from_huggingface(config: Mapping[str, Any]) -> Gemma2Config:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    given = {name: value for name, value in config.items() if value is not None}
    huggingface.refuse_values(given, {"use_bidirectional_attention": False})
    fields = _JSON.fields(config)
    fields["activation"] = huggingface.activation_from(
        given.get("hidden_activation", "gelu_pytorch_tanh")
    )
    if given.get("layer_types", _types(fields["num_layers"])) != _types(fields["num_layers"]):
        raise UserError(
            f"config.json has layer_types {given['layer_types']}; only layers with and without a "
            "window in turn are supported"
        )
    return huggingface.make_config(Gemma2Config, fields)


def to_huggingface(config: Gemma2Config) -> dict[str, Any]:
    """The config.json that `transformers` reads. Raises UserError without a sliding window."""
    written = _JSON.write(config)
    if config.sliding_window is None:
        longest = config.length_limit or config.max_positions
        raise UserError(
            "model.sliding_window is None, with which transformers cannot run Gemma 2; set it to "
            f"{longest}, which is equal for all sequences of up to so many tokens"
        )
    activation = huggingface.activation_to(config.activation)
    if config.activation == "gelu_tanh":
        activation = "gelu_pytorch_tanh"  # as it is published
    return {
        **written,
        "hidden_act": activation,
        "hidden_activation": activation,
        "layer_types": _types(config.num_layers),
    }


def weights(config: Gemma2Config) -> WeightTable:
    """The names of Gemma 2's tensors."""
    norms = (
        *norm(f"{llama.LAYER}/attention_norm", f"{llama.THEIR_LAYER}.input_layernorm"),
        *norm(
            f"{llama.LAYER}/attention_post_norm", f"{llama.THEIR_LAYER}.post_attention_layernorm"
        ),
        *norm(f"{llama.LAYER}/mlp_norm", f"{llama.THEIR_LAYER}.pre_feedforward_layernorm"),
        *norm(f"{llama.LAYER}/mlp_post_norm", f"{llama.THEIR_LAYER}.post_feedforward_layernorm"),
    )
    return llama.decoder_table(config, norms=norms)


FAMILY = llama.family(
    "Gemma2",
    _JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    parts=ModelParts(block=Gemma2Block),
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
