"""RoBERTa (Liu et al., arXiv:1907.11692) and XLM-RoBERTa (Conneau et al., arXiv:1911.02116).

One architecture with two names: XLM-RoBERTa has another vocabulary. The architecture's name tells
them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.families import bert
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import WeightTable, linear, norm, tied
from flax_transformers.models.config import Activation
from flax_transformers.models.encoder import EncoderForMaskedLM, EncoderWithPooler
from flax_transformers.models.heads import Pooler, mean_of_tokens
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForSequenceClassification,
    TextForTokenClassification,
    Tokens,
)
from flax_transformers.ranges import OutOfRange


class RobertaForSequenceClassification(TextForSequenceClassification):
    """BERT's classifier, with dropout before the pooler as well, which is part of the head here."""

    def setup(self) -> None:
        super().setup()
        if self.config.pooling == "cls":
            self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        if self.config.pooling == "mean":
            pooled_BD = mean_of_tokens(hidden_BTD, tokens.mask)
        else:
            first_B1D = self.head_dropout(hidden_BTD[:, :1], deterministic=deterministic)
            pooled_BD = self.pooler(first_B1D)
        return self.head_dropout(pooled_BD, deterministic=deterministic)


_CLASSES: dict[str, type[nn.Module]] = {
    "ForMaskedLM": EncoderForMaskedLM,
    "ForSequenceClassification": RobertaForSequenceClassification,
    "ForTokenClassification": TextForTokenClassification,
    "ForQuestionAnswering": TextForQuestionAnswering,
    "ForMultipleChoice": bert.EncoderForMultipleChoice,
    "Model": EncoderWithPooler,
}

_PREFIXES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""Model types and the prefixes of their architectures' names."""

ARCHITECTURES: dict[str, type[nn.Module]] = {
    f"{prefix}{name}": kind for prefix in _PREFIXES.values() for name, kind in _CLASSES.items()
}


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(bert.BertConfig):
    """The published RoBERTa: BERT's layers, positions that skip padding; base size by default.

    The position table has ``pad_id`` + 1 rows before that of the first token, and so must
    ``position_offset`` be. Given ``position_ids`` count from 0, as in all models here.
    """

    architecture: str = "RobertaForMaskedLM"
    vocab_size: int = 50265
    position_offset: int = 2
    pad_id: int = 1
    norm_eps: float = 1e-5
    token_types: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_offset != self.pad_id + 1:
            raise OutOfRange(
                f"model.position_offset is {self.position_offset}; with model.pad_id "
                f"{self.pad_id} it must be {self.pad_id + 1}"
            )

    @property
    def framing(self) -> str:
        return "roberta"

    @property
    def head_activation(self) -> Activation:
        return "gelu"  # whatever the activation of the layers


def position_ids(
    config: RobertaConfig, input_ids: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Count tokens that are not padding, from 0 in each segment; padding is at -1."""
    token_BT = (input_ids != config.pad_id).astype(jnp.int32)
    count_BT = jnp.cumsum(token_BT, axis=1)
    if segment_ids is not None:
        changed_BT = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts_BT = jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)
        before_BT = jnp.where(starts_BT, count_BT - token_BT, 0)
        count_BT = count_BT - jax.lax.cummax(before_BT, axis=1)
    return count_BT * token_BT - 1


def _large(base: RobertaConfig) -> RobertaConfig:
    return replace(base, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)


_BASE = RobertaConfig()
_XLM_BASE = replace(_BASE, architecture="XLMRobertaForMaskedLM", vocab_size=250002)

SIZES: dict[str, RobertaConfig] = {
    "roberta-base": _BASE,
    "roberta-large": _large(_BASE),
    "distilroberta-base": replace(_BASE, num_layers=6),  # distilled as in arXiv:1910.01108
    "xlm-roberta-base": _XLM_BASE,
    "xlm-roberta-large": _large(_XLM_BASE),
}
"""The published sizes."""

_NUMBERS = {ours: theirs for ours, theirs in bert.NUMBERS.items() if ours != "max_positions"}
_NUMBERS["pad_id"] = "pad_token_id"

_LEFT_OUT = {
    "roberta": replace(_BASE, norm_eps=1e-12, token_types=2),
    "xlm-roberta": replace(_XLM_BASE, vocab_size=30522, norm_eps=1e-12, token_types=2),
}
"""Hugging Face's defaults of fields that a file does not have."""


_JSON = {
    kind: huggingface.JsonFields(
        defaults=defaults,
        fixed=bert.ABSOLUTE_ENCODER,
        numbers=_NUMBERS,
        nullable=huggingface.CLASSIFIER_DROPOUT,
        switches=bert.SWITCHES,
    )
    for kind, defaults in _LEFT_OUT.items()
}


def from_huggingface(config: Mapping[str, Any]) -> RobertaConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    model_type = huggingface.model_type_of(config, _PREFIXES)
    fields = _JSON[model_type].fields(config)
    rows = replace(_LEFT_OUT[model_type], max_positions=512)
    table = huggingface.read_numbers(config, {"max_positions": "max_position_embeddings"}, rows)
    fields["position_offset"] = fields["pad_id"] + 1
    fields["max_positions"] = table["max_positions"] - fields["position_offset"]
    return huggingface.make_config(RobertaConfig, fields)


def to_huggingface(config: RobertaConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    model_type = "xlm-roberta" if config.architecture.startswith("XLM") else "roberta"
    return {
        "model_type": model_type,
        "max_position_embeddings": (config.max_positions or 0) + config.position_offset,
        **_JSON[model_type].write(config),
    }


def weights(config: RobertaConfig) -> WeightTable:
    """The names of RoBERTa's tensors, which are BERT's but for the heads."""
    name = config.architecture.removeprefix("XLM")
    pooler = "classifier" if name == "RobertaForSequenceClassification" else "roberta.pooler"
    classifier = {
        "RobertaForSequenceClassification": "classifier.out_proj",
        "RobertaForQuestionAnswering": "qa_outputs",
    }.get(name, "classifier")
    table = WeightTable(
        weights=(
            *bert.body_weights("roberta"),
            *linear("pooler/dense", f"{pooler}.dense", "D", "E"),
            *linear("mlm_head/transform/dense", "lm_head.dense", "D", "E"),
            *norm("mlm_head/transform/norm", "lm_head.layer_norm"),
            *bert.word_weights("lm_head", config.tie_embeddings),
            *linear("classification_head", classifier, "D", "C"),
        ),
        copies=tied(config, "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
        | {"lm_head.decoder.bias": "lm_head.bias"},
        # An old buffer, and the untrained pooler that published files carry.
        ignorable=(
            r"roberta\.embeddings\.position_ids",
            r"roberta\.pooler\.dense\.(weight|bias)",
        ),
        prefix="roberta.",
    )
    return table.bare() if name == "RobertaModel" else table


FAMILY = Family(
    config=RobertaConfig,
    model_types=tuple(_PREFIXES),
    architectures=ARCHITECTURES,
    parts=ModelParts(position_ids=position_ids),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
