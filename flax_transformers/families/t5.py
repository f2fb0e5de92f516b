"""T5 and its kin: sizes, configuration and weight names.

T5 1.0 (arXiv:1910.10683) ties the logits to the embedding table and scales them; T5 1.1, mT5
(arXiv:2010.11934), ByT5 (arXiv:2105.13626) and umT5 (arXiv:2304.09151) have a gated feed-forward
and an untied output table. umT5 has relative positions in every layer, the others one table that
all layers share.

The published umT5 files have an untied output table and were trained without the scaling: they are
read so here, as in transformers 4. transformers 5.23 overrides their ``tie_word_embeddings`` and
scales the logits by ``hidden_size ** -0.5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear
from flax_transformers.models.config import Activation, ComputeConfig, EncoderDecoderConfig
from flax_transformers.models.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderForQuestionAnswering,
    EncoderDecoderForSequenceClassification,
    TransformerStack,
)
from flax_transformers.models.heads import TokenClassificationMixin, Tokens, Unembedding
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.block import LayerInputs, TransformerBlock
from flax_transformers.models.layers.embeddings import Embedding, token_table
from flax_transformers.models.outputs import HiddenStates, ModelOutput, Outputs
from flax_transformers.models.parts import ModelParts
from flax_transformers.parallel.partitioning import constrain


def buckets_by_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance from 0 to ``max_distance``, int32 (arXiv:1910.10683 §2.1).

    Half of the buckets hold one distance each; the other half grow in equal ratios, and the last
    one holds ``max_distance`` and all beyond. Counted in integers: where a ratio is met exactly,
    logarithms in floating point may fall on either side.
    """
    exact = num_buckets // 2
    ratios = num_buckets - exact
    buckets = np.arange(max_distance + 1, dtype=np.int32)
    bucket = 0
    for distance in range(exact, max_distance + 1):
        # distance / exact >= (max_distance / exact) ** ((bucket + 1) / ratios)
        while bucket < ratios - 1 and distance**ratios * exact ** (
            bucket + 1
        ) >= exact**ratios * max_distance ** (bucket + 1):
            bucket += 1
        buckets[distance] = exact + bucket
    return buckets


class T5EncoderModel(nn.Module):
    """The encoder alone. See ``TextModel`` for the two halves of a model."""

    config: T5Config
    compute: ComputeConfig = ComputeConfig()
    parts: ModelParts = ModelParts()

    inputs: ClassVar = ("input_ids", "attention_mask", "position_ids", "segment_ids")
    output: ClassVar = ModelOutput

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that initialises every parameter."""
        return {"input_ids": jnp.zeros((1, 2), jnp.int32)}

    def setup(self) -> None:
        self.words = token_table(self.config, self.dtype)
        self.encoder = TransformerStack(self.config, self.compute, self.parts)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> HiddenStates:
        """Last hidden states [B, T, D]; see ``EncoderDecoder.encode`` for the inputs."""
        hidden_BTD = self.encoder.encode(
            self.words,
            input_ids,
            attention_mask,
            position_ids,
            segment_ids,
            deterministic=deterministic,
        )
        return HiddenStates(hidden_BTD)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Hidden states and the outputs of the head; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            input_ids, attention_mask, position_ids, segment_ids, deterministic=deterministic
        )
        hidden_BTD, tokens = states.last_hidden_state, Tokens(input_ids, attention_mask)
        return self.output(
            last_hidden_state=hidden_BTD, **self.head_outputs(hidden_BTD, tokens, deterministic)
        )

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        """The fields that the head adds to ``output``."""
        return {}


class T5ForConditionalGeneration(EncoderDecoderForConditionalGeneration):
    """Predicts the decoder's next token; T5 1.0 scales hidden states before the logits."""

    config: T5Config

    def unembedding(self, hidden_BMD: jax.Array) -> Unembedding:
        c = self.config
        scale = c.hidden_size**-0.5 if c.scale_logits else 1.0
        return super().unembedding(hidden_BMD * jnp.asarray(scale, hidden_BMD.dtype))


class T5ForTokenClassification(TokenClassificationMixin, T5EncoderModel):
    """Labels each token, by the encoder alone."""


_CLASSES: dict[str, type[nn.Module]] = {
    "ForConditionalGeneration": T5ForConditionalGeneration,
    "ForSequenceClassification": EncoderDecoderForSequenceClassification,
    "ForQuestionAnswering": EncoderDecoderForQuestionAnswering,
    "ForTokenClassification": T5ForTokenClassification,
    "EncoderModel": T5EncoderModel,
    "Model": EncoderDecoder,
}
_PREFIXES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
"""Model types and the prefixes of their architectures' names."""

ARCHITECTURES: dict[str, type[nn.Module]] = {
    f"{prefix}{head}": kind for prefix in _PREFIXES.values() for head, kind in _CLASSES.items()
}


@dataclass(frozen=True, kw_only=True)
class T5Config(EncoderDecoderConfig):
    """T5 1.0, of small size by default."""

    architecture: str = "T5ForConditionalGeneration"
    vocab_size: int = 32128
    hidden_size: int = 512
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int | None = 64
    intermediate_size: int = 2048
    positions: Literal["learned", "none"] = "none"
    norm: Literal["layer", "rms"] = "rms"
    activation: Activation = "relu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    classifier_dropout: float | None = 0.0
    init_std: float = 1.0
    """A factor on the standard deviation of each kernel."""
    decoder_start_id: int | None = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    output_dropout: ClassVar[bool] = True
    bias_in_every_layer: bool = False
    """A relative position table in every layer, instead of one for the whole stack (umT5)."""
    scale_logits: bool = True
    """Multiply hidden states by ``hidden_size ** -0.5`` before the logits."""

    RANGES: ClassVar[ranges.Ranges] = {
        "relative_buckets": ranges.integers(4, 2**20),
        "relative_max_distance": ranges.POSITIONS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:  # always a number in a config.json
            object.__setattr__(self, "head_dim", self.head_width)
        if self.relative_buckets % 2:
            raise ranges.OutOfRange(
                f"model.relative_buckets is {self.relative_buckets}; it must be even and at least 4"
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise ranges.OutOfRange(
                f"model.relative_max_distance is {self.relative_max_distance}; it must be more "
                f"than half of model.relative_buckets, {self.relative_buckets // 2}"
            )

    @property
    def framing(self) -> str:
        return "t5"

    @property
    def attention_scale(self) -> float:
        return 1.0  # compensated by the initial scale of queries

    def initial_std(self, name: str) -> float:
        """As in mesh-tensorflow: queries start small, because scores are not scaled."""
        inner = self.num_heads * self.head_width
        fan_in = {
            "words": 1,
            "query": self.hidden_size * self.head_width,
            "output": inner,
            "down": self.intermediate_size,
        }
        return self.init_std * fan_in.get(name, self.hidden_size) ** -0.5


class RelativeBias(nn.Module):
    """The relative position bias of each head, from a table over ``buckets_by_distance``."""

    config: T5Config

    @nn.compact
    def __call__(self) -> RelativePositionBias:
        c = self.config
        table = Embedding(
            c.relative_buckets,
            c.num_heads,
            jnp.dtype(jnp.float32),
            axes=("positions", "heads"),
            init_std=c.initial_std("bias"),
            name="table",
        )
        distance = np.arange(-c.relative_max_distance, c.relative_max_distance + 1)
        # An encoder attends in both directions and uses half of its buckets for later keys.
        one_way = c.relative_buckets if c.causal else c.relative_buckets // 2
        before = np.maximum(-distance, 0) if c.causal else np.abs(distance)
        bucket = buckets_by_distance(one_way, c.relative_max_distance)[before]
        if not c.causal:
            bucket = bucket + np.where(distance > 0, one_way, 0)
        return RelativePositionBias(constrain(table(jnp.asarray(bucket)).T, ("heads", None)))


class UMT5Block(TransformerBlock):
    """A layer with its own relative position bias."""

    config: T5Config

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        bias = RelativeBias(self.config, name="relative_bias")()
        return super().self_attention(x_BTD, inputs.replace(bias=bias), cache)


def block(config: T5Config, compute: ComputeConfig, **options: Any) -> TransformerBlock:
    """The layer: with relative positions of its own in umT5."""
    kind = UMT5Block if config.bias_in_every_layer else TransformerBlock
    return kind(config, compute, **options)


def relative_bias(config: T5Config) -> RelativeBias | None:
    """The relative positions of a whole encoder or decoder; umT5 has none."""
    return None if config.bias_in_every_layer else RelativeBias(config)


def _size(
    base: T5Config, width: int, inner: int, layers: int, heads: int, **changes: Any
) -> T5Config:
    return replace(
        base,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        **changes,
    )


_1_0 = T5Config()
_1_1 = T5Config(gated=True, activation="gelu_tanh", tie_embeddings=False, scale_logits=False)

_NEWER = {
    "small": _size(_1_1, 512, 1024, 8, 6),
    "base": _size(_1_1, 768, 2048, 12, 12),
    "large": _size(_1_1, 1024, 2816, 24, 16),
    "xl": _size(_1_1, 2048, 5120, 24, 32),
    "xxl": _size(_1_1, 4096, 10240, 24, 64),
}
_BYTES = {
    "small": _size(_1_1, 1472, 3584, 12, 6, num_decoder_layers=4),
    "base": _size(_1_1, 1536, 3968, 18, 12, num_decoder_layers=6),
    "large": _size(_1_1, 1536, 3840, 36, 16, num_decoder_layers=12),
    "xl": _size(_1_1, 2560, 6720, 36, 32, num_decoder_layers=12),
    "xxl": _size(_1_1, 4672, 12352, 36, 64, num_decoder_layers=12),
}

SIZES: dict[str, T5Config] = {
    "t5-small": _size(_1_0, 512, 2048, 6, 8),
    "t5-base": _size(_1_0, 768, 3072, 12, 12),
    "t5-large": _size(_1_0, 1024, 4096, 24, 16),
    "t5-3b": _size(_1_0, 1024, 16384, 24, 32, head_dim=128),
    "t5-11b": _size(_1_0, 1024, 65536, 24, 128, head_dim=128),
    **{f"t5-v1_1-{name}": size for name, size in _NEWER.items()},
    **{
        f"mt5-{name}": replace(size, architecture="MT5ForConditionalGeneration", vocab_size=250112)
        for name, size in _NEWER.items()
    },
    **{
        f"umt5-{name}": replace(
            _NEWER[name],
            architecture="UMT5ForConditionalGeneration",
            vocab_size=256384,
            bias_in_every_layer=True,
        )
        for name in ("small", "base", "xl", "xxl")
    },
    **{f"byt5-{name}": replace(size, vocab_size=384) for name, size in _BYTES.items()},
}
"""The published sizes, with the published number of vocabulary rows (some are unused)."""

_ORIGINAL = T5Config()

_JSON = huggingface.JsonFields(
    defaults=_ORIGINAL,
    numbers={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "num_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_heads",
        "intermediate_size": "d_ff",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "dropout_rate",
        "classifier_dropout": "classifier_dropout",
        "init_std": "initializer_factor",
    },
    activations={},
    special_ids=True,
    aliases={
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    },
)


def _model_type(config: T5Config) -> str:
    return next(
        kind for kind, prefix in _PREFIXES.items() if config.architecture.startswith(prefix)
    )


def from_huggingface(config: Mapping[str, Any]) -> T5Config:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    model_type = huggingface.model_type_of(config, _PREFIXES)
    default = replace(
        T5Config() if model_type == "t5" else _NEWER["small"],
        architecture=f"{_PREFIXES[model_type]}ForConditionalGeneration",
        vocab_size=32128 if model_type == "t5" else 250112,
    )
    fields = replace(_JSON, defaults=default).fields(config)
    fields |= dict.fromkeys(("attention_dropout", "activation_dropout"), fields["dropout"])
    if config.get("decoder_start_token_id") is not None:
        fields["decoder_start_id"] = huggingface.read_decoder_start(config, None)
    fields["gated"], fields["activation"] = _read_feed_forward(config, default)
    tied = huggingface.read_switches(config, {"tie_embeddings": "tie_word_embeddings"}, _ORIGINAL)
    fields |= tied
    # mT5 never scales. Files of transformers 5 call all these models tied, and have a field for the
    # scaling of logits.
    scaled = replace(_ORIGINAL, scale_logits=fields["tie_embeddings"] and model_type != "mt5")
    fields |= huggingface.read_switches(config, {"scale_logits": "scale_decoder_outputs"}, scaled)
    fields["bias_in_every_layer"] = model_type == "umt5"
    return huggingface.make_config(T5Config, fields)


def _read_feed_forward(config: Mapping[str, Any], default: T5Config) -> tuple[bool, Activation]:
    kind = config.get("feed_forward_proj", "gated-gelu" if default.gated else "relu")
    gate, _, name = str(kind).rpartition("-")
    if kind == "gated-gelu":  # GELU in its tanh form
        name = "gelu_new"
    if gate not in ("", "gated"):
        name = str(kind)
    named = replace(_ORIGINAL, gated=gate == "gated")
    gated = huggingface.read_switches(config, {"gated": "is_gated_act"}, named)["gated"]
    return gated, huggingface.activation_from(config.get("dense_act_fn", name))


def to_huggingface(config: T5Config) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    activation = huggingface.activation_to(config.activation)
    proj = "gelu" if config.gated and activation == "gelu_new" else activation
    return {
        "model_type": _model_type(config),
        "is_encoder_decoder": _reads_and_writes(config),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        "feed_forward_proj": f"gated-{proj}" if config.gated else proj,
        "is_gated_act": config.gated,
        "dense_act_fn": activation,
        "decoder_start_token_id": config.decoder_start_id,
        **_JSON.write(config),
        "num_decoder_layers": config.decoder.num_layers,
    }


def _reads_and_writes(config: T5Config) -> bool:
    return issubclass(ARCHITECTURES[config.architecture], EncoderDecoder)


def settle(config: T5Config, tensors: Mapping[str, Any]) -> T5Config:
    """The config of a file with these tensors. Its config.json may be wrong about tied logits:
    transformers 5 calls them tied even when they are not. A model without a head keeps the
    answer."""
    table, head = tensors.get("shared.weight"), tensors.get("lm_head.weight")
    if head is None or table is None or not config.tie_embeddings or table.shape != head.shape:
        return config
    return replace(config, tie_embeddings=np.array_equal(np.asarray(table), np.asarray(head)))


_HEADS = {
    "SequenceClassification": "classification_head.out_proj",
    "TokenClassification": "classifier",
    "QuestionAnswering": "qa_outputs",
}
"""Names of the last layer by architecture."""


def _side(side: str, cross_attention: bool, bias_in_every_layer: bool) -> tuple[Weight, ...]:
    ours, theirs = f"{side}/stack/{{layer}}", f"transformer.{side}.block.{{layer}}.layer"
    last = 2 if cross_attention else 1
    parts = {"attention": f"{theirs}.0.SelfAttention"}
    if cross_attention:
        parts["cross_attention"] = f"{theirs}.1.EncDecAttention"
    rows: list[Weight] = []
    for index, (part, name) in enumerate(parts.items()):
        rows += attention(f"{ours}/{part}", name, "q k v o")
        rows.append(Weight(f"{ours}/{part}_norm/scale", f"{theirs}.{index}.layer_norm.weight"))
    bias = "SelfAttention.relative_attention_bias.weight"
    if bias_in_every_layer:
        rows.append(Weight(f"{ours}/relative_bias/table/embedding", f"{theirs}.0.{bias}"))
    else:
        first = theirs.replace("{layer}", "0")
        rows.append(Weight(f"{side}/relative_bias/table/embedding", f"{first}.0.{bias}"))
    dense = f"{theirs}.{last}.DenseReluDense"
    for our_kernel, their_kernel, axes in (
        ("gate", "wi_0", "DF"),
        ("up", "wi_1", "DF"),
        ("up", "wi", "DF"),
        ("down", "wo", "FD"),
    ):
        rows += linear(f"{ours}/mlp/{our_kernel}", f"{dense}.{their_kernel}", *axes)
    return (
        *rows,
        Weight(f"{ours}/mlp_norm/scale", f"{theirs}.{last}.layer_norm.weight"),
        Weight(f"{side}/norm/scale", f"transformer.{side}.final_layer_norm.weight"),
    )


def weights(config: T5Config) -> WeightTable:
    """The names of T5's tensors."""
    kind = config.architecture.partition("For")[2]
    absent = "wi" if config.gated else "wi_1"
    tokens = "transformer.shared.weight"
    rows = (
        Weight("words/embedding", tokens, "VD"),
        *_side("encoder", False, config.bias_in_every_layer),
        *_side("decoder", True, config.bias_in_every_layer),
        Weight("lm_head/words/kernel", "lm_head.weight", "DV->VD"),
        *linear("pooler/dense", "classification_head.dense", "D", "E"),
        *linear("classification_head", _HEADS.get(kind, ""), "D", "C"),
    )
    copies = {f"transformer.{side}.embed_tokens.weight": tokens for side in ("encoder", "decoder")}
    if kind == "ConditionalGeneration" and config.tie_embeddings:
        copies["lm_head.weight"] = tokens
    # A table that cross-attention does not use, and what an encoder model does not have.
    cross = (
        r"transformer\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\..*"
    )
    decoder = () if _reads_and_writes(config) else (r"transformer\.decoder\..*", r"lm_head\..*")
    table = WeightTable(
        weights=tuple(row for row in rows if f"Dense.{absent}." not in row.theirs),
        copies=copies,
        ignorable=(cross, *decoder),
        prefix="transformer.",
    )
    return table if kind in ("SequenceClassification", "TokenClassification") else table.bare()


FAMILY = Family(
    config=T5Config,
    model_types=tuple(_PREFIXES),
    architectures=ARCHITECTURES,
    parts=ModelParts(block=block, relative_bias=relative_bias),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    older_names={"T5WithLMHeadModel": "T5ForConditionalGeneration"},
    settle=settle,
    aliases=_JSON.aliases,
)
