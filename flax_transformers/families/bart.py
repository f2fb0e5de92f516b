"""BART (arXiv:1910.13461) and mBART (arXiv:2001.08210): sizes, configuration and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import flax.linen as nn

from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm
from flax_transformers.models.config import EncoderDecoderConfig
from flax_transformers.models.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderForQuestionAnswering,
    EncoderDecoderForSequenceClassification,
)

_CLASSES: dict[str, type[nn.Module]] = {
    "ForConditionalGeneration": EncoderDecoderForConditionalGeneration,
    "ForSequenceClassification": EncoderDecoderForSequenceClassification,
    "ForQuestionAnswering": EncoderDecoderForQuestionAnswering,
    "Model": EncoderDecoder,
}
_PREFIXES = {"bart": "Bart", "mbart": "MBart"}
ARCHITECTURES: dict[str, type[nn.Module]] = {
    f"{prefix}{head}": kind for prefix in _PREFIXES.values() for head, kind in _CLASSES.items()
}


@dataclass(frozen=True, kw_only=True)
class BartConfig(EncoderDecoderConfig):
    """BART, large by default: post-norm, learned positions from row 2, a norm after embeddings.

    mBART is pre-norm. Its decoder starts with the language id of the target.
    """

    architecture: str = "BartForConditionalGeneration"
    vocab_size: int = 50265
    hidden_size: int = 1024
    num_layers: int = 12
    num_heads: int = 16
    intermediate_size: int = 4096
    max_positions: int | None = 1024
    position_offset: int = 2
    norm_position: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-5
    embedding_norm: bool = True
    logits_bias: bool = True
    dropout: float = 0.1
    classifier_dropout: float | None = 0.0
    num_labels: int = 3
    pad_id: int = 1
    bos_id: int | None = 0
    eos_ids: tuple[int, ...] = (2,)
    decoder_start_id: int | None = 2

    @property
    def framing(self) -> str:
        return "roberta"

    @property
    def target_starts_with_language(self) -> bool:
        return self.architecture.startswith("MBart")


_MBART = BartConfig(
    architecture="MBartForConditionalGeneration",
    norm_position="pre",
    num_labels=2,
    decoder_start_id=None,
)

SIZES: dict[str, BartConfig] = {
    "bart-base": BartConfig(hidden_size=768, num_layers=6, num_heads=12, intermediate_size=3072),
    "bart-large": BartConfig(),
    "mbart-large-cc25": replace(_MBART, vocab_size=250027, scale_embeddings=True),
    "mbart-large-50": replace(_MBART, vocab_size=250054, scale_embeddings=True),
}
"""The published sizes."""


NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "encoder_attention_heads",
    "num_decoder_heads": "decoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "decoder_intermediate_size": "decoder_ffn_dim",
    "max_positions": "max_position_embeddings",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "classifier_dropout": "classifier_dropout",
    "init_std": "init_std",
}

_SWITCHES = {"scale_embeddings": "scale_embedding", "tie_embeddings": "tie_word_embeddings"}

ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
}

_PLAIN = BartConfig()


E = TypeVar("E", bound=EncoderDecoderConfig)


@dataclass(frozen=True, kw_only=True)
class BartFields(huggingface.JsonFields[E]):
    """A config.json like BART's (also Marian's)."""

    numbers: Mapping[str, str] = field(default_factory=lambda: NUMBERS)
    activations: Mapping[str, str] = field(
        default_factory=lambda: {"activation": "activation_function"}
    )
    special_ids: bool = True
    aliases: Mapping[str, str] = field(default_factory=lambda: ALIASES)

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        huggingface.refuse_values(config, {"is_decoder": False})
        fields = super().own_fields(_decoder_json(self.defaults) | dict(config))
        start = huggingface.read_decoder_start(config, self.defaults.decoder_start_id)
        # Missing fields mean not scaled, and tied, whatever the default model is.
        switches = huggingface.read_switches(config, _SWITCHES, _PLAIN)
        return fields | {"decoder_start_id": start} | switches

    def own_json(self, config: EncoderDecoderConfig) -> dict[str, Any]:
        return {
            **super().own_json(config),
            **_decoder_json(config),
            "decoder_start_token_id": config.decoder_start_id,
            **huggingface.write_fields(config, _SWITCHES),
        }


def _decoder_json(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        "decoder_layers": config.decoder.num_layers,
        "decoder_attention_heads": config.decoder.num_heads,
        "decoder_ffn_dim": config.decoder.intermediate_size,
    }


_JSON = {
    "bart": BartFields(defaults=BartConfig(), fixed={"model_type": "bart"}),
    "mbart": BartFields(defaults=_MBART, fixed={"model_type": "mbart"}),
}


def from_huggingface(config: Mapping[str, Any]) -> BartConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    table = _JSON[huggingface.model_type_of(config, _PREFIXES)]
    fields, default = table.fields(config), table.defaults
    # Not tied means three tables: of the encoder, of the decoder, and of the logits.
    fields |= {"norm_position": default.norm_position, "share_embeddings": fields["tie_embeddings"]}
    fields.setdefault("num_labels", default.num_labels)
    return huggingface.make_config(BartConfig, fields)


def to_huggingface(config: BartConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    is_mbart = config.architecture.startswith(_PREFIXES["mbart"])
    return _JSON["mbart" if is_mbart else "bart"].write(config)


def layer_rows(side: str) -> list[Weight]:
    """The layers of the "encoder" or the "decoder", named as in BART."""
    ours, theirs = f"{side}/stack/{{layer}}", f"model.{side}.layers.{{layer}}"
    parts = {"attention": "self_attn"}
    if side == "decoder":
        parts["cross_attention"] = "encoder_attn"
    rows: list[Weight] = []
    for part, name in parts.items():
        names = "q_proj k_proj v_proj out_proj"
        rows += attention(f"{ours}/{part}", f"{theirs}.{name}", names)
        rows += norm(f"{ours}/{part}_norm", f"{theirs}.{name}_layer_norm")
    rows += linear(f"{ours}/mlp/up", f"{theirs}.fc1", "D", "F")
    rows += linear(f"{ours}/mlp/down", f"{theirs}.fc2", "F", "D")
    rows += norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")
    return rows


def token_tables(
    config: EncoderDecoderConfig, target_vocab_size: int | None = None
) -> tuple[list[Weight], dict[str, str]]:
    """Rows of the vocabulary tables, and the copies of them that files may have."""
    source, target = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
    copies = {}
    if config.share_embeddings:
        rows = [Weight("words/embedding", "model.shared.weight", "VD")]
        copies = {source: "model.shared.weight", target: "model.shared.weight"}
        target = "model.shared.weight"
    else:
        rows = [
            Weight("words/embedding", source, "VD"),
            Weight("decoder_words/embedding", target, "VD", vocab_size=target_vocab_size),
        ]
    if config.tie_embeddings:
        copies["lm_head.weight"] = target
    rows += [
        Weight("lm_head/words/kernel", "lm_head.weight", "DV->VD", vocab_size=target_vocab_size),
        Weight("lm_head/bias", "final_logits_bias", "V->1V", vocab_size=target_vocab_size),
    ]
    return rows, copies


def weights(config: BartConfig) -> WeightTable:
    """The names of BART's tensors."""
    tables, copies = token_tables(config)
    rows = [*tables]
    if not config.share_embeddings:
        rows.append(Weight("words/embedding", "model.shared.weight", "VD", unused=True))
    for side in ("encoder", "decoder"):
        theirs = f"model.{side}"
        rows.append(
            Weight(f"{side}/embeddings/position/embedding", f"{theirs}.embed_positions.weight")
        )
        rows += norm(f"{side}/embeddings/norm", f"{theirs}.layernorm_embedding")
        rows += layer_rows(side)
        rows += norm(f"{side}/norm", f"{theirs}.layer_norm")
    rows += linear("pooler/dense", "classification_head.dense", "D", "E")
    asks = config.architecture.endswith("QuestionAnswering")
    rows += linear(
        "classification_head", "qa_outputs" if asks else "classification_head.out_proj", "D", "C"
    )
    table = WeightTable(
        weights=tuple(rows),
        copies=copies,
        ignorable=(r"model\.(encoder|decoder)\.version",),  # of fairseq
        prefix="model.",
    )
    return table.bare() if ARCHITECTURES[config.architecture] is EncoderDecoder else table


FAMILY = Family(
    config=BartConfig,
    model_types=tuple(_PREFIXES),
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    aliases=ALIASES,
)
