"""ModernBERT (Warner et al., arXiv:2412.13663): sizes, configuration and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families.bert import TextForMultipleChoice
from flax_transformers.families.llama import read_rope, write_rope
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import (
    Weight,
    WeightTable,
    fused_linear,
    linear,
    norm,
    tied,
)
from flax_transformers.models.config import Activation, ComputeConfig, Rope, TextConfig
from flax_transformers.models.encoder import EncoderForMaskedLM, EncoderModel
from flax_transformers.models.heads import Transform, mean_of_tokens, take_token
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.layers.block import LayerInputs, TransformerBlock
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.positions import rotary_tables
from flax_transformers.models.layers.stack import Block, Stack, period
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForSequenceClassification,
    TextForTokenClassification,
    Tokens,
)
from flax_transformers.parallel.partitioning import HIDDEN, constrain

Kind = Literal["full_attention", "sliding_attention"]
FULL: Kind = "full_attention"
SLIDING: Kind = "sliding_attention"


class ModernBertForTokenClassification(TextForTokenClassification):
    """Labels each token, after a transform."""

    def setup(self) -> None:
        super().setup()
        self.transform_head = Transform(self.config, self.dtype)

    def tag(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return super().tag(self.transform_head(hidden_BTD), deterministic=deterministic)


class ModernBertForQuestionAnswering(TextForQuestionAnswering):
    """Marks the first and the last token of an answer, after a transform and dropout."""

    def setup(self) -> None:
        super().setup()
        self.transform_head = Transform(self.config, self.dtype)
        self.head_dropout = Dropout(self.config.head_dropout, self.compute.dropout_generator)

    def answer_spans(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        hidden_BTD = self.transform_head(hidden_BTD)
        return super().answer_spans(self.head_dropout(hidden_BTD, deterministic=deterministic))


class ModernBertForSequenceClassification(TextForSequenceClassification):
    """Labels each sequence by its first token or the mean of all tokens, after a transform."""

    def setup(self) -> None:
        super().setup()
        self.transform_head = Transform(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        if self.config.pooling == "cls":
            pooled_B1D = hidden_BTD[:, :1]
        else:
            pooled_B1D = mean_of_tokens(hidden_BTD, tokens.mask)[:, None]
        transformed_B1D = self.transform_head(pooled_B1D)
        return self.head_dropout(transformed_B1D, deterministic=deterministic)[:, 0]


class ModernBertForMultipleChoice(TextForMultipleChoice):
    """Scores each choice by its first token or the mean of all tokens, after a transform.

    The first token is the first that is no padding, on which side padding may be."""

    def setup(self) -> None:
        super().setup()
        self.transform_head = Transform(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        if self.config.pooling == "mean":
            pooled_B1D = mean_of_tokens(hidden_BTD, tokens.mask)[:, None]
        elif tokens.mask is None:
            pooled_B1D = hidden_BTD[:, :1]
        else:
            pooled_B1D = take_token(hidden_BTD, jnp.argmax(tokens.mask > 0, axis=1))
        return self.transform_head(pooled_B1D)[:, 0]


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ModernBertForMaskedLM": EncoderForMaskedLM,
    "ModernBertForSequenceClassification": ModernBertForSequenceClassification,
    "ModernBertForTokenClassification": ModernBertForTokenClassification,
    "ModernBertForQuestionAnswering": ModernBertForQuestionAnswering,
    "ModernBertForMultipleChoice": ModernBertForMultipleChoice,
    "ModernBertModel": EncoderModel,
}

_GLOBAL_ROPE, _LOCAL_ROPE = Rope(theta=160000.0), Rope(theta=10000.0)


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(TextConfig):
    """The published ModernBERT: pre-norm, rotary positions, GeGLU, no biases; base by default.

    ``dropout`` applies to the embeddings; inside layers ``attention_dropout`` also applies to the
    output of attention, and ``activation_dropout`` inside the feed-forward.
    """

    architecture: str = "ModernBertForMaskedLM"
    vocab_size: int = 50368
    hidden_size: int = 768
    num_layers: int = 22
    num_heads: int = 12
    intermediate_size: int = 1152
    max_positions: int | None = 8192
    positions: Literal["learned", "none"] = "none"
    rope: Rope | None = _GLOBAL_ROPE
    """Rotary positions of global layers."""
    local_rope: Rope = _LOCAL_ROPE
    """Rotary positions of local layers."""
    local_attention: int = 128
    """Window of local layers: half of it to each side."""
    global_every: int = 3
    """In each group of this many layers, the first is global and the others are local."""
    layer_types: tuple[Kind, ...] = ()
    """The kind of each layer, if it is not such a pattern; otherwise empty."""
    norm_eps: float = 1e-5
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    embedding_norm: bool = True
    scaled_residual_init: bool = True
    pad_id: int = 50283
    decoder_bias: bool = True
    """A bias for each token on the logits."""
    head_activation: Activation = "gelu"
    """Activation of the transform at the start of every head."""
    head_bias: bool = False
    """Bias vector of the linear layer in this transform."""
    pooling: Literal["cls", "mean"] = "cls"
    """Input of sequence classifiers: the first token or the mean of all."""
    normalize_embeddings: bool | None = None
    """Whether sentence embeddings have length 1; None: not a sentence encoder."""
    classifier_dropout: float | None = 0.0

    RANGES: ClassVar[ranges.Ranges] = {
        "local_attention": ranges.POSITIONS,
        "global_every": ranges.LAYERS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_position != "pre":
            raise ranges.OutOfRange(
                f"model.norm_position is {self.norm_position!r}; ModernBERT has only 'pre'"
            )
        if self.rope is None:
            raise ranges.OutOfRange("model.rope is None; ModernBERT has no other positions")
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ranges.OutOfRange(
                f"model.layer_types names {len(self.layer_types)} layers, but model.num_layers is "
                f"{self.num_layers}"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return self.layer_types or every(self.global_every, self.num_layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        side = self.local_attention // 2
        return tuple(side if kind == SLIDING else None for kind in self.kinds)


class ModernBertBlock(TransformerBlock):
    """A pre-norm layer of one kind of attention; the ``first`` layer has no norm before
    attention."""

    config: ModernBertConfig
    first: bool = False

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        kind = FULL if self.window is None else SLIDING
        return super().self_attention(x_BTD, inputs.replace(rotary=inputs.rotary[kind]), cache)

    def pre_norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.first and name == "attention" else self.norm(name)(x_BTD)

    def residual(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        if name == "attention":
            rate = self.config.attention_dropout
            y_BTD = Dropout(rate, self.compute.dropout_generator)(y_BTD, self.deterministic)
        return constrain(x_BTD + y_BTD, HIDDEN)


def rotary(config: ModernBertConfig, position_ids: jax.Array) -> dict[Kind, Any]:
    """Tables of rotary positions by kind of layer."""
    ropes = {FULL: config.rope, SLIDING: config.local_rope}
    return {
        kind: rotary_tables(rope, config.head_width, position_ids)
        for kind, rope in ropes.items()
        if rope is not None
    }


def stack(config: ModernBertConfig, compute: ComputeConfig, block: Block) -> Stack:
    """The first layer, which has no norm before attention, then a pattern as short as possible."""
    first, *others = (
        partial(block, config, compute, window=window, first=layer == 0)
        for layer, window in enumerate(config.windows)
    )
    length = period(config.kinds[1:])
    repeats = len(others) // length
    return Stack(
        first=(first,),
        pattern=tuple(others[:length]),
        repeats=repeats,
        remainder=tuple(others[length * repeats :]),
        scan=compute.scan_layers,
        remat=compute.remat,
    )


def every(n: int, layers: int) -> tuple[Kind, ...]:
    """The published pattern: layers 0, n, 2n ... are global."""
    return tuple(SLIDING if layer % n else FULL for layer in range(layers))


SIZES: dict[str, ModernBertConfig] = {
    "modernbert-base": ModernBertConfig(),
    "modernbert-large": ModernBertConfig(
        hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=2624
    ),
}
"""The published sizes."""

_JSON = huggingface.JsonFields(
    defaults=ModernBertConfig(),
    fixed={"model_type": "modernbert"},
    numbers=huggingface.TEXT_NUMBERS
    | {
        "norm_eps": "norm_eps",
        "local_attention": "local_attention",
        "dropout": "embedding_dropout",
        "attention_dropout": "attention_dropout",
        "activation_dropout": "mlp_dropout",
        "classifier_dropout": "classifier_dropout",
        "init_std": "initializer_range",
        "pad_id": "pad_token_id",
    },
    switches={
        "mlp_bias": "mlp_bias",
        "norm_bias": "norm_bias",
        "decoder_bias": "decoder_bias",
        "head_bias": "classifier_bias",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
    },
    activations={
        "activation": "hidden_activation",
        "head_activation": "classifier_activation",
    },
)


def from_huggingface(config: Mapping[str, Any]) -> ModernBertConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    fields = _JSON.fields(config)
    fields["pooling"] = config.get("classifier_pooling", "cls")
    if fields["pooling"] not in ("cls", "mean"):
        raise UserError(
            f"config.json has classifier_pooling {fields['pooling']!r}, which is not supported; "
            "only 'cls' and 'mean' are"
        )
    if config.get("sliding_window") is not None:  # of one side; transformers 5 derives it
        huggingface.refuse_values(config, {"sliding_window": fields["local_attention"] // 2})
    fields |= _read_layers(config, fields["num_layers"])
    fields |= _read_ropes(config, fields["max_positions"])
    return huggingface.make_config(ModernBertConfig, fields)


def _read_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Global layers: a list takes precedence over the number in older files."""
    number = {"global_every": "global_attn_every_n_layers"}
    older = huggingface.read_numbers(config, number, ModernBertConfig())
    types = config.get("layer_types")
    if types is None:
        return older
    if unknown := sorted(set(types) - {FULL, SLIDING}):
        raise UserError(
            f"config.json has layer_types {unknown[0]!r}, which is not supported; only "
            f"{FULL!r} and {SLIDING!r} are"
        )
    second = next((layer for layer, kind in enumerate(types) if layer and kind == FULL), layers)
    for n in (older["global_every"], second):
        n = max(n, 1)
        if tuple(types) == every(n, layers):
            return {"global_every": n}
    return {"layer_types": tuple(types)}


def _read_ropes(config: Mapping[str, Any], max_positions: int) -> dict[str, Rope]:
    """Both kinds of rotary positions, in the spelling of transformers 4 or 5."""
    scaling, given = config.get("rope_scaling"), config.get("rope_parameters") or {}
    # Older files have null if local layers use the global theta.
    global_theta = config.get("global_rope_theta", _GLOBAL_ROPE.theta)
    local_theta = config.get("local_rope_theta", _LOCAL_ROPE.theta) or global_theta

    def read(kind: Kind, theta: float) -> Rope:
        one = {"rope_parameters": (given.get(kind) or {}) | (scaling or {})}
        rope = read_rope(one, theta, max_positions)
        if rope.scaling == "dynamic":
            raise UserError(
                "config.json asks for rotary positions of type 'dynamic', which are not supported "
                "for ModernBERT; choose a model with another type"
            )
        return rope

    return {"rope": read(FULL, global_theta), "local_rope": read(SLIDING, local_theta)}


def to_huggingface(config: ModernBertConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads, where possible version 4 too."""
    ropes = {FULL: config.rope or config.local_rope, SLIDING: config.local_rope}
    every_n = {} if config.layer_types else {"global_attn_every_n_layers": config.global_every}
    return {
        **_JSON.write(config),
        # They are the tokenizer's. Without them `transformers` takes those of the published one,
        # and warns if the vocabulary is smaller.
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")),
        "classifier_pooling": config.pooling,
        "layer_types": list(config.kinds),
        **every_n,
        "rope_parameters": {
            kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()
        },
        "global_rope_theta": ropes[FULL].theta,
        "local_rope_theta": ropes[SLIDING].theta,
    }


def weights(config: ModernBertConfig) -> WeightTable:
    """The names of ModernBERT's tensors."""
    layer, theirs = "stack/{layer}", "model.layers.{layer}"
    qkv = tuple(f"{layer}/attention/{part}" for part in ("query", "key", "value"))
    # The half with the activation comes first.
    halves = tuple(f"{layer}/mlp/{part}" for part in ("gate", "up"))
    head = "mlm_head/transform" if config.architecture.endswith("MaskedLM") else "transform_head"
    table = WeightTable(
        weights=(
            Weight("words/embedding", "model.embeddings.tok_embeddings.weight", "VD"),
            *norm("embeddings/norm", "model.embeddings.norm"),
            *norm(f"{layer}/attention_norm", f"{theirs}.attn_norm"),
            *fused_linear(qkv, f"{theirs}.attn.Wqkv", "D", "NH"),
            *linear(f"{layer}/attention/output", f"{theirs}.attn.Wo", "NH", "D"),
            *norm(f"{layer}/mlp_norm", f"{theirs}.mlp_norm"),
            *fused_linear(halves, f"{theirs}.mlp.Wi", "D", "F"),
            *linear(f"{layer}/mlp/down", f"{theirs}.mlp.Wo", "F", "D"),
            *norm("final_norm", "model.final_norm"),
            *linear(f"{head}/dense", "head.dense", "D", "E"),
            *norm(f"{head}/norm", "head.norm"),
            Weight("mlm_head/words/kernel", "decoder.weight", "DV->VD"),
            Weight("mlm_head/bias", "decoder.bias", "V"),
            *linear("classification_head", "classifier", "D", "C"),
        ),
        copies=tied(config, "decoder.weight", "model.embeddings.tok_embeddings.weight"),
        prefix="model.",
    )
    return table.bare() if config.architecture == "ModernBertModel" else table


FAMILY = Family(
    config=ModernBertConfig,
    model_types=("modernbert",),
    architectures=ARCHITECTURES,
    parts=ModelParts(block=ModernBertBlock, stack=stack, rotary=rotary),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
