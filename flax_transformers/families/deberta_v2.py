"""DeBERTa version 2 and 3 (He et al., arXiv:2006.03654, arXiv:2111.09543): disentangled attention.

Attention scores add, to content with content, the query's content with the relative position of the
key, and the key's content with that of the query. Both terms depend on the content, so they are no
bias that an attention kernel could take: attention here is plain operations on every platform,
whatever ``compute.attention`` says, and holds float32 scores [B, N, T, 2 T - 1]. No gather by pairs
is needed: scores with all 2 T - 1 distances are computed, and shifted row by row.

Not here: projections of positions of their own (version 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families.bert import BertConfig, word_weights
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm, tied
from flax_transformers.models.config import Activation, ComputeConfig
from flax_transformers.models.encoder import EncoderForMaskedLM, EncoderModel
from flax_transformers.models.heads import ActivatedPoolingMixin
from flax_transformers.models.kernels.dropout import dropout
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.embeddings import Embedding
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.linear import Linear
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.stack import Block, Stack, make_stack
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForSequenceClassification,
    TextForTokenClassification,
)
from flax_transformers.parallel.partitioning import HEADS, SCORES, constrain

Term = Literal["c2p", "p2c"]


class DebertaInputs(struct.PyTreeNode):
    """What all layers share: their ``inputs``, ``allowed`` bool [B or 1, T, T] or None, and
    ``relative_XD``, the vectors of the distances from -(T - 1) to T - 1, X = 2 T - 1."""

    inputs: LayerInputs
    allowed: jax.Array | None
    relative_XD: jax.Array


def relative_rows(length: int, span: int, buckets: int, longest: int) -> np.ndarray:
    """Rows int32 [2 length - 1] of the table of ``2 span`` relative positions, for the distances
    (query less key) from ``1 - length`` to ``length - 1``.

    With ``buckets``, distances above half of them share a row with others on a logarithmic scale up
    to ``longest``.
    """
    distance = np.arange(1 - length, length)
    if buckets:
        half = buckets // 2
        # In float32 as in the original, for the sake of distances at the edge of a bucket.
        far = np.maximum(np.abs(distance), half).astype(np.float32) / np.float32(half)
        scale = np.log(np.float32((longest - 1) / half))
        coarse = np.ceil(np.log(far) / scale * np.float32(half - 1)) + half
        distance = np.where(np.abs(distance) <= half, distance, coarse * np.sign(distance))
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def shifted(x_BNTX: jax.Array) -> jax.Array:
    """Elements [t, s - t + T - 1] of each [T, 2 T - 1], as [B, N, T, T]."""
    length = x_BNTX.shape[2]
    if length == 1:
        return x_BNTX
    flat = x_BNTX.reshape(*x_BNTX.shape[:2], -1)[..., length - 1 : -1]
    return flat.reshape(*x_BNTX.shape[:3], 2 * length - 2)[..., :length]


class DisentangledAttention(nn.Module):
    """Multi-head self-attention with relative positions (arXiv:2006.03654 section 3.1), whose
    projections are those of the content."""

    config: DebertaV2Config
    compute: ComputeConfig
    deterministic: bool

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: DebertaInputs) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        project = {name: self._projection(name) for name in ("query", "key", "value")}
        q_BTNH, k_BSNH, v_BSNH = (constrain(one(x_BTD), HEADS) for one in project.values())
        dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores_BNTS = dot("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
        positions = Dropout(c.dropout, self.compute.dropout_generator)
        relative_1XD = positions(shared.relative_XD, self.deterministic)[None]
        if "c2p" in c.position_terms:
            # Shifting needs distances from the query to the key, the other way round.
            pk_XNH = project["key"](relative_1XD)[0, ::-1]
            scores_BNTS += shifted(dot("BTNH,XNH->BNTX", q_BTNH, pk_XNH))
        if "p2c" in c.position_terms:
            pq_XNH = project["query"](relative_1XD)[0]
            scores_BNTS += shifted(dot("BSNH,XNH->BNSX", k_BSNH, pq_XNH)).swapaxes(2, 3)
        scores_BNTS = constrain(scores_BNTS * c.attention_scale, SCORES)
        if shared.allowed is not None:
            lowest = jnp.finfo(jnp.float32).min
            scores_BNTS = jnp.where(shared.allowed[:, None], scores_BNTS, lowest)
        probs_BNTS = jax.nn.softmax(scores_BNTS)
        self.sow("intermediates", "probabilities", probs_BNTS)
        probs_BNTS = probs_BNTS.astype(self.dtype)
        if c.attention_dropout > 0.0 and not self.deterministic:
            key, generator = self.make_rng("dropout"), self.compute.dropout_generator
            probs_BNTS = dropout(probs_BNTS, c.attention_dropout, key, generator)
        attended_BTNH = dot("BNTS,BSNH->BTNH", probs_BNTS, v_BSNH).astype(self.dtype)
        output = Linear(
            "BTNH,NHD->BTD",
            (c.num_heads, c.head_width, c.hidden_size),
            ("heads", "head_dim", "embed"),
            dtype=self.dtype,
            init_std=c.initial_std("output"),
            name="output",
        )
        return output(constrain(attended_BTNH, HEADS))

    def _projection(self, name: str) -> Linear:
        c = self.config
        return Linear(
            "BTD,DNH->BTNH",
            (c.hidden_size, c.num_heads, c.head_width),
            ("embed", "heads", "head_dim"),
            dtype=self.dtype,
            init_std=c.initial_std(name),
            name=name,
        )


class TokenConvolution(nn.Module):
    """A convolution over the tokens of each example, and an activation."""

    config: DebertaV2Config
    compute: ComputeConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] to [B, T, D]; ``segments_BT`` numbers examples from 1, with 0 at padding."""
        c, length = self.config, x_BTD.shape[1]
        reach = c.conv_kernel_size // 2
        starts = range(c.conv_kernel_size)
        padded_BSD = jnp.pad(x_BTD, ((0, 0), (reach, reach), (0, 0)))
        x_BTKD = jnp.stack([padded_BSD[:, k : k + length] for k in starts], axis=2)
        if segments_BT is not None:
            padded_BS = jnp.pad(segments_BT, ((0, 0), (reach, reach)))
            near_BTK = jnp.stack([padded_BS[:, k : k + length] for k in starts], axis=2)
            x_BTKD = jnp.where((near_BTK == segments_BT[:, :, None])[..., None], x_BTKD, 0)
        convolve = Linear(
            "BTKC,KCD->BTD",
            (c.conv_kernel_size, c.hidden_size, c.hidden_size),
            ("patch_width", "embed", "features"),
            dtype=jnp.dtype(self.compute.dtype),
            init_std=c.init_std,
            name="taps",
        )
        y_BTD = convolve(x_BTKD)
        if segments_BT is not None:
            y_BTD = jnp.where((segments_BT > 0)[:, :, None], y_BTD, 0)
        dropout = Dropout(c.dropout, self.compute.dropout_generator)
        activation = jnp.tanh if c.conv_activation == "tanh" else ACTIVATIONS[c.conv_activation]
        return activation(dropout(y_BTD, self.deterministic))


class DebertaBlock(TransformerBlock):
    """BERT's layer with disentangled attention. ``convolves``: its output is added to a convolution
    of its input, and is zero at padding."""

    convolves: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: Any, cache: Any) -> tuple[jax.Array, LayerOutput]:
        """Hidden states [B, T, D] to hidden states; ``shared`` are ``DebertaInputs``."""
        c = self.config
        assert isinstance(c, DebertaV2Config)
        entry_BTD = x_BTD
        attend = DisentangledAttention(c, self.compute, self.deterministic, name="attention")
        x_BTD = self.residual("attention", x_BTD, attend(x_BTD, shared))
        y_BTD, _ = self.feed_forward(x_BTD, shared.inputs)
        x_BTD = self.residual("mlp", x_BTD, y_BTD)
        if not self.convolves:
            return x_BTD, LayerOutput()
        mask = shared.inputs.mask
        segments_BT = None if mask is None else mask.key_segments
        convolve = TokenConvolution(c, self.compute, self.deterministic, name="convolution")
        x_BTD = self.norm("convolution")(x_BTD + convolve(entry_BTD, segments_BT))
        if segments_BT is not None:
            x_BTD = jnp.where((segments_BT > 0)[:, :, None], x_BTD, 0)
        return x_BTD, LayerOutput()


class DebertaStack(nn.Module):
    """The layers, and the table of relative positions with its norm, which they share."""

    config: DebertaV2Config
    compute: ComputeConfig
    block: Block

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        rows, axes = 2 * c.relative_span, ("positions", "embed")
        self.relative = Embedding(rows, c.hidden_size, dtype, axes, c.init_std)
        self.relative_norm = make_norm(c, dtype, axis="input_norm")
        if not c.conv_kernel_size:
            self.encoder = make_stack(c, self.compute, self.block)
            return
        layer = partial(self.block, c, self.compute)
        self.encoder = Stack(
            first=(partial(layer, convolves=True),),
            pattern=(layer,),
            repeats=c.num_layers - 1,
            scan=self.compute.scan_layers,
            remat=self.compute.remat,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: LayerInputs,
        per_layer: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerOutput]:
        """As ``Stack``. Vectors of padding are zero, and padding attends to all alike."""
        c, length, mask = self.config, x_BTD.shape[1], inputs.mask
        rows = relative_rows(length, c.relative_span, c.position_buckets, c.longest_distance)
        relative_XD = self.relative_norm(self.relative(jnp.asarray(rows)))
        allowed = None if mask is None else mask.dense(length, length)
        if mask is not None and mask.key_segments is not None:
            real_BT = mask.key_segments > 0
            x_BTD = x_BTD * real_BT[:, :, None].astype(x_BTD.dtype)
            allowed = real_BT[:, :, None] if allowed is None else allowed & real_BT[:, :, None]
        shared = DebertaInputs(inputs, allowed, relative_XD)
        return self.encoder(x_BTD, shared, per_layer, deterministic=deterministic)


class DebertaV2ForSequenceClassification(ActivatedPoolingMixin, TextForSequenceClassification):
    """Labels each sequence by its first token, or by the mean of all, after a layer with GELU."""


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "DebertaV2ForMaskedLM": EncoderForMaskedLM,
    "DebertaV2ForSequenceClassification": DebertaV2ForSequenceClassification,
    "DebertaV2ForTokenClassification": TextForTokenClassification,
    "DebertaV2ForQuestionAnswering": TextForQuestionAnswering,
    "DebertaV2Model": EncoderModel,
}


@dataclass(frozen=True, kw_only=True)
class DebertaV2Config(BertConfig):
    """The published DeBERTa-v3, base size by default: post-norm, positions in attention alone."""

    architecture: str = "DebertaV2ForMaskedLM"
    vocab_size: int = 128100
    norm_eps: float = 1e-7
    positions: Literal["learned", "none"] = "none"
    token_types: int = 0
    position_buckets: int = 256
    """Number of relative positions to each side, of which half are on a logarithmic scale; 0: one
    for each distance."""
    max_relative_positions: int | None = None
    """Distance from which on the last relative position counts; None: ``max_positions``."""
    position_terms: tuple[Term, ...] = ("p2c", "c2p")
    """Terms with positions: content to position, position to content."""
    conv_kernel_size: int = 0
    """Tokens of the convolution beside the first layer, an odd number (the xlarge and xxlarge sizes
    of version 2); 0: there is none."""
    conv_activation: Activation | Literal["tanh"] = "gelu"
    """After the convolution."""
    legacy_head: bool = True
    """The masked-LM head has the names of transformers' ``legacy`` head in files."""

    RANGES: ClassVar[ranges.Ranges] = {
        "position_buckets": ranges.integers(0, 2**20),
        "max_relative_positions": ranges.POSITIONS,
        "conv_kernel_size": ranges.integers(0, 2**10),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_kernel_size and not self.conv_kernel_size % 2:
            raise ranges.OutOfRange(
                f"model.conv_kernel_size is {self.conv_kernel_size}; it must be odd, or 0 for none"
            )
        if self.position_buckets == 1 or self.longest_distance <= self.position_buckets // 2 + 1:
            raise ranges.OutOfRange(
                f"model.position_buckets {self.position_buckets} does not go with a longest "
                f"distance of {self.longest_distance}; half of the buckets must be fewer"
            )

    @property
    def attention_width(self) -> int:
        """Each term with positions has the products of scores, half of those of attention."""
        return super().attention_width * (2 + len(self.position_terms)) // 2

    @property
    def longest_distance(self) -> int:
        """Distance at the end of the logarithmic scale."""
        return self.max_relative_positions or self.max_positions or 0

    @property
    def relative_span(self) -> int:
        """Number of relative positions to each side."""
        return self.position_buckets or self.longest_distance

    @property
    def attention_scale(self) -> float:
        return ((1 + len(self.position_terms)) * self.head_width) ** -0.5


def _size(
    layers: int, width: int, heads: int, vocab_size: int = 128100, conv_kernel_size: int = 0
) -> DebertaV2Config:
    return DebertaV2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * width,
        conv_kernel_size=conv_kernel_size,
    )


SIZES: dict[str, DebertaV2Config] = {
    "deberta-v3-base": _size(12, 768, 12),
    "deberta-v3-xsmall": _size(12, 384, 6),
    "deberta-v3-small": _size(6, 768, 12),
    "deberta-v3-large": _size(24, 1024, 16),
    "mdeberta-v3-base": _size(12, 768, 12, 251000),
    "deberta-v2-xlarge": _size(24, 1536, 24, conv_kernel_size=3),
    "deberta-v2-xxlarge": _size(48, 1536, 24, conv_kernel_size=3),
}
"""The published sizes of versions 3 and 2."""

_WRITTEN = {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_act": "gelu",
}
"""Fields of the kind of model that is here."""
_ABSENT = {
    "relative_attention": False,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
}
"""What transformers takes where a config.json leaves these out; its sizes are then those of
deberta-v2-xlarge without the convolution."""

_JSON = huggingface.JsonFields(
    defaults=replace(SIZES["deberta-v2-xlarge"], conv_kernel_size=0, position_buckets=0),
    numbers=huggingface.TEXT_NUMBERS
    | {
        "norm_eps": "layer_norm_eps",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "init_std": "initializer_range",
        "pad_id": "pad_token_id",
        "conv_kernel_size": "conv_kernel_size",
    },
    nullable={"classifier_dropout": "cls_dropout"},
    switches={"tie_embeddings": "tie_word_embeddings", "legacy_head": "legacy"},
)


def from_huggingface(config: Mapping[str, Any]) -> DebertaV2Config:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    huggingface.refuse_values(config, {**_WRITTEN, "conv_groups": 1})
    for name in _ABSENT.keys() - config.keys():
        raise UserError(
            f"config.json has no {name}, which means {_ABSENT[name]!r}; only {_WRITTEN[name]!r} is "
            "supported"
        )
    fields = _JSON.fields(config)
    width, heads = fields["hidden_size"], fields["num_heads"]
    derived = {"embedding_size": width, "pooler_hidden_size": width}
    derived |= {"attention_head_size": width // heads if heads else width}
    huggingface.refuse_values(config, {k: v for k, v in derived.items() if config.get(k)})
    if fields["conv_kernel_size"]:
        activation = config.get("conv_act", "tanh")
        tanh = activation == "tanh"
        fields["conv_activation"] = "tanh" if tanh else huggingface.activation_from(activation)
    if not fields["legacy_head"]:
        huggingface.refuse_values(config, {"tie_word_embeddings": True})
    for name, none in (("position_buckets", 0), ("max_relative_positions", None)):
        value = config.get(name, -1)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"config.json has {name} {value!r}; it must be a whole number")
        fields[name] = value if value > 0 else none
    fields["position_terms"] = _terms(config.get("pos_att_type"))
    return huggingface.make_config(DebertaV2Config, fields)


def _terms(value: Any) -> tuple[str, ...]:
    """The field ``pos_att_type``: a list, or names separated by "|"."""
    names = value.lower().split("|") if isinstance(value, str) else value or []
    names = [name.strip() if isinstance(name, str) else name for name in names]
    if not set(names) <= {"c2p", "p2c"}:
        raise UserError(
            f"config.json has pos_att_type {value!r}, which is not supported; its terms may be "
            "'c2p' and 'p2c'"
        )
    return tuple(names)


def to_huggingface(config: DebertaV2Config) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    written, conv = _JSON.write(config), config.conv_activation
    if config.classifier_dropout is None:
        del written["cls_dropout"]
    if config.conv_kernel_size:
        written["conv_act"] = "tanh" if conv == "tanh" else huggingface.activation_to(conv)
    return {
        **_WRITTEN,
        **written,
        "position_buckets": config.position_buckets or -1,
        "max_relative_positions": config.max_relative_positions or -1,
        "pos_att_type": list(config.position_terms),
    }


def weights(config: DebertaV2Config) -> WeightTable:
    """The names of DeBERTa's tensors."""
    layer, theirs = "stack/encoder/{layer}", "deberta.encoder.layer.{layer}"
    conv = "deberta.encoder.conv"  # once, beside the first layer
    spans = config.architecture.endswith("QuestionAnswering")
    tokens, head = "deberta.embeddings.word_embeddings.weight", "cls.predictions"
    transform = f"{head}.transform"
    if not config.legacy_head:
        head = transform = "lm_predictions.lm_head"
    table = WeightTable(
        weights=(
            Weight("words/embedding", tokens, "VD"),
            *norm("embeddings/norm", "deberta.embeddings.LayerNorm"),
            Weight("stack/relative/embedding", "deberta.encoder.rel_embeddings.weight"),
            *norm("stack/relative_norm", "deberta.encoder.LayerNorm"),
            *attention(
                f"{layer}/attention",
                f"{theirs}.attention",
                "self.query_proj self.key_proj self.value_proj output.dense",
            ),
            *norm(f"{layer}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
            *linear(f"{layer}/mlp/up", f"{theirs}.intermediate.dense", "D", "F"),
            *linear(f"{layer}/mlp/down", f"{theirs}.output.dense", "F", "D"),
            *norm(f"{layer}/mlp_norm", f"{theirs}.output.LayerNorm"),
            Weight(f"{layer}/convolution/taps/kernel", f"{conv}.conv.weight", "KCD->DCK"),
            Weight(f"{layer}/convolution/taps/bias", f"{conv}.conv.bias"),
            *norm(f"{layer}/convolution_norm", f"{conv}.LayerNorm"),
            *linear("mlm_head/transform/dense", f"{transform}.dense", "D", "E"),
            *norm("mlm_head/transform/norm", f"{transform}.LayerNorm"),
            *word_weights(head, config.tie_embeddings),
            *linear("pooler/dense", "pooler.dense", "D", "E"),
            *linear("classification_head", "qa_outputs" if spans else "classifier", "D", "C"),
        ),
        # Published files of version 3 have the other head, and that of the discriminator.
        renames=(
            (
                (
                    r"^lm_predictions\.lm_head\.(dense|LayerNorm)\.",
                    r"cls.predictions.transform.\1.",
                ),
                (r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"),
            )
            if config.legacy_head
            else ()
        ),
        copies=tied(config, f"{head}.decoder.weight", tokens)
        | {f"{head}.decoder.bias": f"{head}.bias"},
        ignorable=(
            r"deberta\.embeddings\.position_ids",
            r"deberta\.embeddings\.position_embeddings\.weight",
            r"mask_predictions\..*",
        ),
        prefix="deberta.",
    )
    return table.bare() if config.architecture == "DebertaV2Model" else table


FAMILY = Family(
    config=DebertaV2Config,
    model_types=("deberta-v2",),
    architectures=ARCHITECTURES,
    parts=ModelParts(block=DebertaBlock, stack=DebertaStack),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
