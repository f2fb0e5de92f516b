"""DistilBERT (Sanh et al., arXiv:1910.01108): half of BERT's layers, without token types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax

from flax_transformers.families.bert import SWITCHES, BertConfig, TextForMultipleChoice
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm, tied
from flax_transformers.models.encoder import EncoderForMaskedLM, EncoderModel
from flax_transformers.models.heads import ActivatedLayer, ActivatedPoolingMixin, Tokens
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForSequenceClassification,
    TextForTokenClassification,
)


class DistilBertForSequenceClassification(ActivatedPoolingMixin, TextForSequenceClassification):
    """Labels each sequence by its first token, or by the mean of all, after a layer with ReLU."""

    pooler_activation = "relu"


class DistilBertForMultipleChoice(TextForMultipleChoice):
    """Scores each choice by its first token, after a linear layer and ReLU."""

    def setup(self) -> None:
        super().setup()
        self.pooler = ActivatedLayer(self.config, self.dtype, "relu")

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        return self.pooler(hidden_BTD[:, :1])[:, 0]


class DistilBertForQuestionAnswering(TextForQuestionAnswering):
    """Marks the first and the last token of an answer, after dropout."""

    def setup(self) -> None:
        super().setup()
        self.head_dropout = Dropout(self.config.head_dropout, self.compute.dropout_generator)

    def answer_spans(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return super().answer_spans(self.head_dropout(hidden_BTD, deterministic=deterministic))


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "DistilBertForMaskedLM": EncoderForMaskedLM,
    "DistilBertForSequenceClassification": DistilBertForSequenceClassification,
    "DistilBertForTokenClassification": TextForTokenClassification,
    "DistilBertForQuestionAnswering": DistilBertForQuestionAnswering,
    "DistilBertForMultipleChoice": DistilBertForMultipleChoice,
    "DistilBertModel": EncoderModel,
}


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """BERT with six layers and without token types; uncased English by default."""

    architecture: str = "DistilBertForMaskedLM"
    num_layers: int = 6
    token_types: int = 0
    classifier_dropout: float | None = None
    """Dropout rate before a head; None: that of the original, 0.2 for sequences and choices, 0.1
    for answers, ``dropout`` for tokens."""

    @property
    def head_dropout(self) -> float:
        rate = _HEAD_DROPOUT.get(_head_field(self.architecture), self.dropout)
        return rate if self.classifier_dropout is None else self.classifier_dropout


SIZES: dict[str, DistilBertConfig] = {
    "distilbert-base": DistilBertConfig(),
    "distilbert-base-cased": DistilBertConfig(vocab_size=28996),
    "distilbert-base-multilingual-cased": DistilBertConfig(vocab_size=119547),
}
"""The published sizes; uncased English where the name does not say otherwise."""

_HEAD_DROPOUT = {"seq_classif_dropout": 0.2, "qa_dropout": 0.1}
"""The fields of a config.json with the dropout before a head, and their defaults."""


def _head_field(architecture: str) -> str:
    """The field with the dropout before the head of an architecture."""
    if architecture.endswith("ForTokenClassification"):
        return "dropout"
    return "qa_dropout" if architecture.endswith("QuestionAnswering") else "seq_classif_dropout"


@dataclass(frozen=True, kw_only=True)
class _Fields(huggingface.JsonFields[DistilBertConfig]):
    """The config.json, which has a field for the dropout before each kind of head."""

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(config)
        name = _head_field(fields["architecture"])
        published = _HEAD_DROPOUT.get(name, fields["dropout"])
        defaults = replace(self.defaults, classifier_dropout=published)
        found = huggingface.read_numbers(config, {"classifier_dropout": name}, defaults)
        return fields | ({} if found["classifier_dropout"] == published else found)

    def own_json(self, config: Any) -> dict[str, Any]:
        name = _head_field(config.architecture)
        head = {name: config.head_dropout} if name in _HEAD_DROPOUT else {}
        return super().own_json(config) | head


JSON = _Fields(
    defaults=DistilBertConfig(),
    fixed={"model_type": "distilbert"},
    numbers={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "max_positions": "max_position_embeddings",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "init_std": "initializer_range",
        "pad_id": "pad_token_id",
    },
    switches=SWITCHES,
    activations={"activation": "activation"},
    aliases={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
)


def weights(config: DistilBertConfig) -> WeightTable:
    """The names of DistilBERT's tensors."""
    layer, theirs = "stack/{layer}", "distilbert.transformer.layer.{layer}"
    questions = config.architecture.endswith("QuestionAnswering")
    tokens = "distilbert.embeddings.word_embeddings.weight"
    table = WeightTable(
        weights=(
            Weight("words/embedding", tokens, "VD"),
            Weight(
                "embeddings/position/embedding", "distilbert.embeddings.position_embeddings.weight"
            ),
            *norm("embeddings/norm", "distilbert.embeddings.LayerNorm"),
            *attention(f"{layer}/attention", f"{theirs}.attention", "q_lin k_lin v_lin out_lin"),
            *norm(f"{layer}/attention_norm", f"{theirs}.sa_layer_norm"),
            *linear(f"{layer}/mlp/up", f"{theirs}.ffn.lin1", "D", "F"),
            *linear(f"{layer}/mlp/down", f"{theirs}.ffn.lin2", "F", "D"),
            *norm(f"{layer}/mlp_norm", f"{theirs}.output_layer_norm"),
            *linear("mlm_head/transform/dense", "vocab_transform", "D", "E"),
            *norm("mlm_head/transform/norm", "vocab_layer_norm"),
            Weight("mlm_head/bias", "vocab_projector.bias", "V"),
            Weight("mlm_head/words/kernel", "vocab_projector.weight", "DV->VD"),
            *linear("pooler/dense", "pre_classifier", "D", "E"),
            *linear("classification_head", "qa_outputs" if questions else "classifier", "D", "C"),
        ),
        copies=tied(config, "vocab_projector.weight", tokens),
        prefix="distilbert.",
    )
    return table.bare() if config.architecture == "DistilBertModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    weights=weights,
)
