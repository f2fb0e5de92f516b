"""BERT (Devlin et al., arXiv:1810.04805): sizes, configuration and weight names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm, tied
from flax_transformers.models.config import TextConfig
from flax_transformers.models.encoder import (
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderWithPooler,
)
from flax_transformers.models.heads import Pooler, classify_vectors, label_layer
from flax_transformers.models.kernels.kv_cache import Cache
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.outputs import ModelOutput, Outputs
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForTokenClassification,
    TextModel,
    Tokens,
)


class NextSentenceMixin(nn.Module):
    """Tells whether segment B follows segment A (BERT §3.1)."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)
        self.next_sentence_head = label_layer(self.config, self.dtype, 2)

    def next_sentence(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, 2] of "follows" and "is from elsewhere"."""
        return classify_vectors(self.next_sentence_head, self.pooler(hidden_BTD))

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"logits": self.next_sentence(hidden_BTD)}


class BertForNextSentencePrediction(NextSentenceMixin, TextModel):
    """BERT with the head for the next sentence alone."""


class BertPreTrainingOutput(ModelOutput):
    """``prediction_logits`` float32 [B, T, vocab_size] of the tokens, ``seq_relationship_logits``
    float32 [B, 2] of the next sentence; ``logits`` stays None."""

    prediction_logits: jax.Array | None = None
    seq_relationship_logits: jax.Array | None = None


class BertForPreTraining(NextSentenceMixin, EncoderForMaskedLM):
    """Both of BERT's pretraining heads."""

    output = BertPreTrainingOutput

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        logits_BTV = self.unembed(hidden_BTD)[..., : self.config.vocab_size]
        return {
            "prediction_logits": logits_BTV,
            "seq_relationship_logits": self.next_sentence(hidden_BTD),
        }


class TextForMultipleChoice(TextModel):
    """Scores each choice of an answer, with its question, from a vector that ``pool`` returns;
    subclasses define it (BERT, arXiv:1810.04805 §4.4)."""

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, 1)
        self.head_dropout = Dropout(self.config.head_dropout, self.compute.dropout_generator)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        """Input [B, D] of the last layer, before dropout."""
        raise NotImplementedError

    def choose(
        self,
        hidden_BTD: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Scores float32 [B] of choices, one in each sequence, by hidden states and inputs [B, T].

        The softmax over the scores of one question gives probabilities."""
        vector_BD = self.pool(hidden_BTD, Tokens(input_ids, attention_mask))
        vector_BD = self.head_dropout(vector_BD, deterministic=deterministic)
        return classify_vectors(self.classification_head, vector_BD)[:, 0]

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"logits": self.choose(hidden_BTD, *tokens, deterministic=deterministic)}

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Of inputs [B, C, T], with C choices for each question: ``logits`` float32 [B, C] and
        ``last_hidden_state`` [B * C, T, D]. Of inputs [B, T]: ``logits`` [B]."""
        others = (attention_mask, token_type_ids, position_ids, segment_ids)
        output = super().__call__(
            _rows(input_ids),
            *(None if one is None else _rows(one) for one in others),
            cache=cache,
            deterministic=deterministic,
        )
        assert output.logits is not None
        return output.replace(logits=output.logits.reshape(input_ids.shape[:-1]))


def _rows(array: jax.Array) -> jax.Array:
    """All sequences of an array [..., T] as rows."""
    return array.reshape(-1, array.shape[-1])


class EncoderForMultipleChoice(TextForMultipleChoice):
    """Scores each choice by its pooled first token."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        return self.pooler(hidden_BTD)


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "BertForMaskedLM": EncoderForMaskedLM,
    "BertForPreTraining": BertForPreTraining,
    "BertForNextSentencePrediction": BertForNextSentencePrediction,
    "BertForSequenceClassification": EncoderForSequenceClassification,
    "BertForTokenClassification": TextForTokenClassification,
    "BertForQuestionAnswering": TextForQuestionAnswering,
    "BertForMultipleChoice": EncoderForMultipleChoice,
    "BertModel": EncoderWithPooler,
}


@dataclass(frozen=True, kw_only=True)
class BertConfig(TextConfig):
    """The published BERT: post-norm, learned positions, two token types; base size by default."""

    architecture: str = "BertForMaskedLM"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int | None = 512
    norm_position: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    token_types: int = 2
    embedding_norm: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooling: Literal["cls", "mean"] = "cls"
    """Input of sequence classifiers and sentence embeddings: the first token or the mean of all."""
    normalize_embeddings: bool | None = None
    """Whether sentence embeddings have length 1; None: not a sentence encoder."""


def _size(layers: int, width: int, vocab_size: int = 30522) -> BertConfig:
    """Heads are 64 wide and the feed-forward four times the model in every published size."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        intermediate_size=4 * width,
    )


SIZES: dict[str, BertConfig] = {
    "bert-tiny": _size(2, 128),  # this one to medium: arXiv:1908.08962
    "bert-mini": _size(4, 256),
    "bert-small": _size(4, 512),
    "bert-medium": _size(8, 512),
    "bert-base": _size(12, 768),
    "bert-base-cased": _size(12, 768, 28996),
    "bert-base-multilingual-cased": _size(12, 768, 119547),
    "bert-base-multilingual-uncased": _size(12, 768, 105879),
    "bert-base-chinese": _size(12, 768, 21128),
    "bert-large": _size(24, 1024),
    "bert-large-cased": _size(24, 1024, 28996),
}
"""The published sizes; uncased English where the name does not say otherwise."""

NUMBERS = huggingface.TEXT_NUMBERS | {
    "norm_eps": "layer_norm_eps",
    "token_types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}
"""Numeric fields, ours to theirs, as RoBERTa has them too."""

SWITCHES = {"tie_embeddings": "tie_word_embeddings"}
"""Those that are true or false."""

ABSOLUTE_ENCODER = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
"""Fields of which only this value is supported."""

JSON = huggingface.JsonFields(
    defaults=BertConfig(),
    fixed={"model_type": "bert", **ABSOLUTE_ENCODER},
    numbers=NUMBERS,
    nullable=huggingface.CLASSIFIER_DROPOUT | {"pad_id": "pad_token_id"},
    switches=SWITCHES,
)

_HEADS = {
    "BertForSequenceClassification": "classifier",
    "BertForTokenClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
}
"""Names of the classification head by architecture."""


def body_weights(model: str) -> tuple[Weight, ...]:
    """The rows of everything below the heads, of BERT and RoBERTa alike; ``model`` is "bert"."""
    layer, theirs = "stack/{layer}", f"{model}.encoder.layer.{{layer}}"
    tables = {"position/embedding": "position", "token_type/embedding": "token_type"}
    return (
        Weight("words/embedding", f"{model}.embeddings.word_embeddings.weight", "VD"),
        *(
            Weight(f"embeddings/{ours}", f"{model}.embeddings.{name}_embeddings.weight")
            for ours, name in tables.items()
        ),
        *norm("embeddings/norm", f"{model}.embeddings.LayerNorm"),
        *attention(
            f"{layer}/attention",
            f"{theirs}.attention",
            "self.query self.key self.value output.dense",
        ),
        *norm(f"{layer}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *linear(f"{layer}/mlp/up", f"{theirs}.intermediate.dense", "D", "F"),
        *linear(f"{layer}/mlp/down", f"{theirs}.output.dense", "F", "D"),
        *norm(f"{layer}/mlp_norm", f"{theirs}.output.LayerNorm"),
    )


def word_weights(head: str, tied: bool) -> tuple[Weight, ...]:
    """The rows of the token table and the bias per token under ``head`` of a masked-LM model.

    Tied, the bias has two names for one tensor. Not tied, these are two tensors, of which only the
    decoder's has a use.
    """
    if tied:
        return (Weight("mlm_head/bias", f"{head}.bias", "V"),)
    return (
        Weight("mlm_head/bias", f"{head}.bias", "V", unused=True),
        Weight("mlm_head/bias", f"{head}.decoder.bias", "V"),
        Weight("mlm_head/words/kernel", f"{head}.decoder.weight", "DV->VD"),
    )


def weights(config: BertConfig) -> WeightTable:
    """The names of BERT's tensors."""
    table = WeightTable(
        weights=(
            *body_weights("bert"),
            *linear("pooler/dense", "bert.pooler.dense", "D", "E"),
            *linear("mlm_head/transform/dense", "cls.predictions.transform.dense", "D", "E"),
            *norm("mlm_head/transform/norm", "cls.predictions.transform.LayerNorm"),
            *word_weights("cls.predictions", config.tie_embeddings),
            *linear("next_sentence_head", "cls.seq_relationship", "D", "C"),
            *linear("classification_head", _HEADS.get(config.architecture, "classifier"), "D", "C"),
        ),
        # The names of the TensorFlow release.
        renames=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        copies=tied(
            config, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
        )
        | {"cls.predictions.decoder.bias": "cls.predictions.bias"},
        # An old buffer, and the pooler and next-sentence head that published masked-LM files carry.
        ignorable=(
            r"bert\.embeddings\.position_ids",
            r"bert\.pooler\.dense\.(weight|bias)",
            r"cls\.seq_relationship\.(weight|bias)",
        ),
        prefix="bert.",
    )
    return table.bare() if config.architecture == "BertModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    weights=weights,
)
