"""DistilBERT (Sanh et al., arXiv:1910.01108): half of BERT's layers, without token types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from flax_transformers import ranges
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
    classifier_dropout: float | None = 0.2
    """Dropout rate before a head for sequences or choices; None: ``dropout``. Other heads do not
    use it: that for tokens has ``dropout``, as in the original."""
    answer_dropout: float = 0.1
    """Dropout rate before the head for answers."""

    RANGES: ClassVar[ranges.Ranges] = {"answer_dropout": ranges.RATE}

    @property
    def head_dropout(self) -> float:
        if self.architecture.endswith("ForTokenClassification"):
            return self.dropout
        answers = self.architecture.endswith("ForQuestionAnswering")
        return self.answer_dropout if answers else super().head_dropout


SIZES: dict[str, DistilBertConfig] = {
    "distilbert-base": DistilBertConfig(),
    "distilbert-base-cased": DistilBertConfig(vocab_size=28996),
    "distilbert-base-multilingual-cased": DistilBertConfig(vocab_size=119547),
}
"""The published sizes; uncased English where the name does not say otherwise."""

JSON = huggingface.JsonFields(
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
        "classifier_dropout": "seq_classif_dropout",
        "answer_dropout": "qa_dropout",
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
