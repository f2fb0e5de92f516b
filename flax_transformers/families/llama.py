"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783), and what its descendants share with it.

Mistral, Mixtral and Gemma differ from Llama in a few points of layers, config.json and weight
names; their files use the functions here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import flax.linen as nn

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm, tied
from flax_transformers.models.config import Activation, Rope, TextConfig
from flax_transformers.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderWithValueHead,
)
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForTokenClassification,
    TextModel,
)


def value_architecture(name: str) -> str:
    """The language model of a family with a value head; no other library has a class for it."""
    return f"{name}ForCausalLMWithValueHead"


def architectures(name: str) -> dict[str, type[nn.Module]]:
    """The classes of the family that Hugging Face calls ``name``."""
    return {
        f"{name}ForCausalLM": DecoderForCausalLM,
        value_architecture(name): DecoderWithValueHead,
        f"{name}ForSequenceClassification": DecoderForSequenceClassification,
        f"{name}ForTokenClassification": TextForTokenClassification,
        f"{name}ForQuestionAnswering": TextForQuestionAnswering,
        f"{name}Model": TextModel,
    }


PLAIN_ROPE = Rope()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TextConfig):
    """Pre-norm with RMS norm, SwiGLU, rotary positions, no biases; the first 7B by default."""

    architecture: str = "LlamaForCausalLM"
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    intermediate_size: int = 11008
    max_positions: int | None = 2048
    causal: bool = True
    positions: Literal["learned", "none"] = "none"
    rope: Rope | None = PLAIN_ROPE
    norm: Literal["layer", "rms"] = "rms"
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    classifier_dropout: float | None = 0.1
    pad_id: int = -1
    """-1: no padding token, as in the published models."""
    bos_id: int | None = 1
    """Id of the start token, if any."""
    eos_ids: tuple[int, ...] = (2,)
    """Ids of end tokens."""

    RANGES: ClassVar[ranges.Ranges] = {"bos_id": ranges.TOKEN_ID, "eos_ids": ranges.TOKEN_ID}

    def __post_init__(self) -> None:
        super().__post_init__()
        # One spelling only, so that equal models have equal configs.
        if self.num_key_value_heads == self.num_heads:
            object.__setattr__(self, "num_key_value_heads", None)
        if self.head_dim is not None and self.head_dim * self.num_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", None)


L = TypeVar("L", bound=LlamaConfig)


def sized(
    base: L,
    *,
    layers: int,
    width: int,
    heads: int,
    inner: int,
    key_heads: int | None = None,
    head_dim: int | None = None,
) -> L:
    """``base`` with other sizes; ``inner`` is the width of the feed-forward."""
    return replace(
        base,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_key_value_heads=base.num_key_value_heads if key_heads is None else key_heads,
        head_dim=base.head_dim if head_dim is None else head_dim,
        intermediate_size=inner,
    )


def _long(base: LlamaConfig, factor: float) -> LlamaConfig:
    """With the 131,072 positions of Llama 3.1 and 3.2."""
    rope = Rope(
        theta=500000.0,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_max_positions=8192,
    )
    return replace(base, rope=rope, max_positions=131072)


def _70b(base: LlamaConfig) -> LlamaConfig:
    return sized(base, layers=80, width=8192, heads=64, key_heads=8, inner=28672)


_TINY = LlamaConfig(norm_eps=1e-5)
_LLAMA_2 = replace(_TINY, max_positions=4096)
_LLAMA_3 = replace(
    _TINY,
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    rope=Rope(theta=500000.0),
    max_positions=8192,
    bos_id=128000,
    eos_ids=(128001,),
)
_LLAMA_3_1, _LLAMA_3_2 = _long(_LLAMA_3, 8.0), replace(_long(_LLAMA_3, 32.0), tie_embeddings=True)

SIZES: dict[str, LlamaConfig] = {
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": sized(_LLAMA_2, layers=40, width=5120, heads=40, inner=13824),
    "llama-2-70b": _70b(_LLAMA_2),
    # arXiv:2401.02385
    "tinyllama-1.1b": sized(_TINY, layers=22, width=2048, heads=32, key_heads=4, inner=5632),
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": _70b(_LLAMA_3),
    "llama-3.1-8b": _LLAMA_3_1,
    "llama-3.1-70b": _70b(_LLAMA_3_1),
    "llama-3.1-405b": sized(_LLAMA_3_1, layers=126, width=16384, heads=128, inner=53248),
    "llama-3.2-1b": sized(_LLAMA_3_2, layers=16, width=2048, heads=32, inner=8192),
    "llama-3.2-3b": sized(_LLAMA_3_2, layers=28, width=3072, heads=24, inner=8192),
}
"""The published sizes."""

NUMBERS = huggingface.TEXT_NUMBERS | {
    "attention_dropout": "attention_dropout",
    "init_std": "initializer_range",
    "norm_eps": "rms_norm_eps",
}
TIED = {"tie_embeddings": "tie_word_embeddings"}
ATTENTION_BIAS = {"output_bias": "attention_bias", "qkv_bias": "attention_bias"}
OPTIONAL = {"num_key_value_heads": "num_key_value_heads", "head_dim": "head_dim"}


@dataclass(frozen=True, kw_only=True)
class LlamaFields(huggingface.JsonFields[L]):
    """The config.json of Llama and its descendants."""

    numbers: Mapping[str, str] = field(default_factory=lambda: NUMBERS)
    nullable: Mapping[str, str] = field(default_factory=lambda: huggingface.CLASSIFIER_DROPOUT)
    optional: Mapping[str, str] = field(default_factory=lambda: OPTIONAL)
    switches: Mapping[str, str] = field(default_factory=lambda: TIED)
    special_ids: bool = True
    whole_heads: bool = False
    """Whether the class of transformers refuses a width that the number of heads does not divide,
    whatever the width of a head."""

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(config)
        theta = (self.defaults.rope or PLAIN_ROPE).theta
        return fields | {"rope": read_rope(config, theta, fields["max_positions"])}

    def write(self, config: LlamaConfig) -> dict[str, Any]:
        if self.whole_heads and config.hidden_size % config.num_heads:
            raise UserError(
                f"model.hidden_size {config.hidden_size} does not divide by model.num_heads "
                f"{config.num_heads}, as {config.architecture} in Hugging Face format must, even "
                "with model.head_dim; choose such a width, or keep this model in our own "
                "checkpoint format"
            )
        return {
            **super().write(config),
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            **({} if config.rope is None else write_rope(config.rope)),
        }


def read_rope(config: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """Rotary positions from ``rope_parameters`` or, before transformers 5, ``rope_theta`` and
    ``rope_scaling``. ``theta`` is the family's default. Raises UserError for other kinds.
    """
    given: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UserError(
            f"config.json asks for rotary positions of type {kind!r}, which are not supported; "
            "supported are 'default', 'linear', 'dynamic', 'llama3' and 'yarn'"
        )
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    huggingface.refuse_values(
        {"partial_rotary_factor": partial or 1.0}, {"partial_rotary_factor": 1.0}
    )

    def number(name: str, default: float | None = None) -> float:
        value = default if given.get(name) is None else given[name]
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise UserError(
                f"config.json has {name} {value!r} in its rotary positions of type {kind!r}; it "
                "must be a positive number"
            )
        return float(value)

    rope_theta = number("rope_theta", config.get("rope_theta") or theta)
    if kind == "default":
        return Rope(theta=rope_theta)
    if kind == "linear":
        return Rope(theta=rope_theta, scaling="linear", factor=number("factor"))
    if kind == "dynamic":
        return Rope(
            theta=rope_theta,
            scaling="dynamic",
            factor=number("factor"),
            original_max_positions=max_positions,
        )
    # Some files have it at the top level, where it takes precedence.
    original = config.get("original_max_position_embeddings")
    if original is not None:
        given = given | {"original_max_position_embeddings": original}
    if kind == "yarn":
        return _read_yarn(given, rope_theta, number, max_positions)
    return Rope(
        theta=rope_theta,
        scaling="llama3",
        factor=number("factor"),
        low_frequency_factor=number("low_freq_factor"),
        high_frequency_factor=number("high_freq_factor"),
        original_max_positions=int(number("original_max_position_embeddings", max_positions)),
    )


def _read_yarn(
    given: Mapping[str, Any], theta: float, number: Callable[..., float], max_positions: int
) -> Rope:
    """The factors of attention that transformers derives are those of YaRN and of DeepSeek."""
    original = number("original_max_position_embeddings", max_positions)
    stretched = given.get("original_max_position_embeddings") is not None
    factor = number("factor", max_positions / original if stretched else None)
    attention_factor = None
    if given.get("attention_factor") is not None:
        attention_factor = number("attention_factor")
    elif given.get("mscale") and given.get("mscale_all_dim"):
        above, below = (
            1.0 if factor <= 1 else 0.1 * number(name) * math.log(factor) + 1.0
            for name in ("mscale", "mscale_all_dim")
        )
        attention_factor = above / below
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        low_frequency_factor=number("beta_slow", 1.0),
        high_frequency_factor=number("beta_fast", 32.0),
        original_max_positions=int(original),
        attention_factor=attention_factor,
        truncate=given.get("truncate", True) is not False,
    )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The inverse of ``read_rope``, in both spellings."""
    scaling: dict[str, Any] = {}
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    elif rope.scaling == "yarn":
        scaling |= {
            "beta_slow": rope.low_frequency_factor,
            "beta_fast": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "truncate": rope.truncate,
        }
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return {
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
    }


JSON = LlamaFields(
    defaults=LlamaConfig(),
    fixed={"model_type": "llama"},
    switches=TIED | ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    whole_heads=True,
)

LAYER, THEIR_LAYER = "stack/{layer}", "model.layers.{layer}"

FEED_FORWARD = (
    *linear(f"{LAYER}/mlp/gate", f"{THEIR_LAYER}.mlp.gate_proj", "D", "F"),
    *linear(f"{LAYER}/mlp/up", f"{THEIR_LAYER}.mlp.up_proj", "D", "F"),
    *linear(f"{LAYER}/mlp/down", f"{THEIR_LAYER}.mlp.down_proj", "F", "D"),
)
"""The feed-forward of a layer, where it is not a mixture of experts."""

NORMS = (
    *norm(f"{LAYER}/attention_norm", f"{THEIR_LAYER}.input_layernorm"),
    *norm(f"{LAYER}/mlp_norm", f"{THEIR_LAYER}.post_attention_layernorm"),
)
"""The norms of a layer."""


def head_norms(axes: str) -> tuple[Weight, Weight]:
    """The norms of queries and keys; ``axes`` are those of a scale, as in `Weight`."""
    query, key = (
        Weight(
            f"{LAYER}/attention/{name}_norm/scale",
            f"{THEIR_LAYER}.self_attn.{name[0]}_norm.weight",
            axes,
        )
        for name in ("query", "key")
    )
    return query, key


def decoder_table(
    config: LlamaConfig,
    feed_forward: tuple[Weight, ...] = FEED_FORWARD,
    norms: tuple[Weight, ...] = NORMS,
) -> WeightTable:
    """The names of the tensors of Llama and its descendants."""
    head = "qa_outputs" if config.architecture.endswith("QuestionAnswering") else "score"
    table = WeightTable(
        weights=(
            Weight("words/embedding", "model.embed_tokens.weight", "VD"),
            *norms,
            *attention(
                f"{LAYER}/attention", f"{THEIR_LAYER}.self_attn", "q_proj k_proj v_proj o_proj"
            ),
            *feed_forward,
            *norm("final_norm", "model.norm"),
            Weight("lm_head/words/kernel", "lm_head.weight", "DV->VD"),
            *linear("classification_head", head, "D", "C"),
            *linear("value_head", "value_head", "D", "C"),
        ),
        copies=tied(config, "lm_head.weight", "model.embed_tokens.weight"),
        # Frequencies that files of 2023 carry.
        ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        prefix="model.",
    )
    return table.bare() if config.architecture.endswith("Model") else table


def weights(config: LlamaConfig) -> WeightTable:
    """The names of Llama's tensors. For questions they have another prefix than otherwise; either
    is read."""
    return with_prefix_of_questions(config, decoder_table(config))


def with_prefix_of_questions(config: LlamaConfig, table: WeightTable) -> WeightTable:
    """The table in which models for questions have the prefix "transformer."; files may have either
    prefix."""
    if config.architecture.endswith("ForQuestionAnswering"):
        return _renamed(table, "transformer.")
    return dataclasses.replace(table, renames=((r"^transformer\.", table.prefix),))


def _renamed(table: WeightTable, prefix: str) -> WeightTable:
    """The table of names that begin with another prefix; the old one is read too."""
    old = f"^{re.escape(table.prefix)}"
    return dataclasses.replace(
        table,
        weights=tuple(
            dataclasses.replace(weight, theirs=re.sub(old, prefix, weight.theirs))
            for weight in table.weights
        ),
        renames=((old, prefix),),
        ignorable=tuple(name.replace(re.escape(table.prefix), prefix) for name in table.ignorable),
        prefix=prefix,
    )


def family(name: str, table: LlamaFields[Any], **others: Any) -> Family:
    """The family that Hugging Face calls ``name``, with the architectures and tensors of Llama
    where ``others`` do not say otherwise."""
    usual = {
        "architectures": architectures(name),
        "only_here": (value_architecture(name),),
        "weights": decoder_table,
    }
    return Family.of_table(table, **usual | others)


FAMILY = family(
    "Llama",
    JSON,
    sizes=SIZES,
    weights=weights,
)
