"""BERT (Devlin et al., arXiv:1810.04805): sizes, configuration and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn

from flax_transformers.errors import UserError
from flax_transformers.families import huggingface
from flax_transformers.families.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import Execution, TransformerConfig
from flax_transformers.models.encoder import EncoderForMaskedLM


@dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """The published BERT: post-norm, learned positions, two token types; base size by default."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    norm_place: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    token_types: int = 2
    embedding_norm: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def build(self, execution: Execution) -> nn.Module:
        return EncoderForMaskedLM(self, execution)


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
    "bert-large": _size(24, 1024),
    "bert-large-cased": _size(24, 1024, 28996),
}
"""The published sizes; uncased English where the name does not say otherwise."""

_NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "token_types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}

_SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}


def from_huggingface(config: Mapping[str, Any]) -> BertConfig:
    """The configuration in a Hugging Face config.json. Raises UserError for what we do not have."""
    huggingface.refuse(config, _SUPPORTED)
    numbers = huggingface.read_numbers(config, _NUMBERS, BertConfig())
    activation = huggingface.activation_from(config.get("hidden_act", "gelu"))
    try:
        return BertConfig(activation=activation, **numbers)
    except ValueError as error:
        raise UserError(f"config.json describes no BERT: {error}") from None


def to_huggingface(config: BertConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads. Raises UserError if its BERT cannot do this."""
    names = ("norm", "norm_place", "gated", "use_bias", "positions", "embedding_norm")
    wrong = [name for name in names if getattr(config, name) != getattr(BertConfig(), name)]
    wrong += ["token_types"] * (config.token_types == 0)
    if wrong:
        raise UserError(
            f"model.{wrong[0]} is {getattr(config, wrong[0])!r}, which BERT in Hugging Face format "
            "cannot be; keep this model in our own checkpoint format"
        )
    numbers = {theirs: getattr(config, ours) for ours, theirs in _NUMBERS.items()}
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "tie_word_embeddings": True,
        "hidden_act": huggingface.activation_to(config.activation),
        **numbers,
    }


_LAYER, _THEIR_LAYER = "encoder/{layer}", "bert.encoder.layer.{layer}"

WEIGHTS = WeightTable(
    weights=(
        Weight("embeddings/word/embedding", "bert.embeddings.word_embeddings.weight", "VD"),
        Weight("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight"),
        Weight("embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight"),
        *norm("embeddings/norm", "bert.embeddings.LayerNorm"),
        *linear(f"{_LAYER}/attention/query", f"{_THEIR_LAYER}.attention.self.query", "D", "NH"),
        *linear(f"{_LAYER}/attention/key", f"{_THEIR_LAYER}.attention.self.key", "D", "NH"),
        *linear(f"{_LAYER}/attention/value", f"{_THEIR_LAYER}.attention.self.value", "D", "NH"),
        *linear(f"{_LAYER}/attention/output", f"{_THEIR_LAYER}.attention.output.dense", "NH", "D"),
        *norm(f"{_LAYER}/attention_norm", f"{_THEIR_LAYER}.attention.output.LayerNorm"),
        *linear(f"{_LAYER}/mlp/up", f"{_THEIR_LAYER}.intermediate.dense", "D", "F"),
        *linear(f"{_LAYER}/mlp/down", f"{_THEIR_LAYER}.output.dense", "F", "D"),
        *norm(f"{_LAYER}/mlp_norm", f"{_THEIR_LAYER}.output.LayerNorm"),
        *linear("mlm_head/transform", "cls.predictions.transform.dense", "D", "E"),
        *norm("mlm_head/norm", "cls.predictions.transform.LayerNorm"),
        Weight("mlm_head/bias", "cls.predictions.bias", "V"),
    ),
    # The names of the TensorFlow release.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # An old buffer, and the pooler and next-sentence head that published masked-LM files carry.
    ignorable=(
        r"bert\.embeddings\.position_ids",
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
    ),
)
