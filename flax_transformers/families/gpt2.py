"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn

from flax_transformers import ranges
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm, tied
from flax_transformers.models.config import Activation, TextConfig
from flax_transformers.models.decoder import DecoderForCausalLM, DecoderForSequenceClassification
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForTokenClassification,
    TextModel,
)

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "GPT2LMHeadModel": DecoderForCausalLM,
    "GPT2ForSequenceClassification": DecoderForSequenceClassification,
    "GPT2ForTokenClassification": TextForTokenClassification,
    "GPT2ForQuestionAnswering": TextForQuestionAnswering,
    "GPT2Model": TextModel,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(TextConfig):
    """Pre-norm, learned positions, tied; the smallest of the four by default."""

    architecture: str = "GPT2LMHeadModel"
    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int | None = 1024
    causal: bool = True
    norm_eps: float = 1e-5
    activation: Activation = "gelu_tanh"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    scaled_residual_init: bool = True
    pad_id: int = -1
    """-1: no padding token, as in the published models."""
    bos_id: int | None = 50256
    """Id of the start token, if any."""
    eos_ids: tuple[int, ...] = (50256,)
    """Ids of end tokens."""

    RANGES: ClassVar[ranges.Ranges] = {"bos_id": ranges.TOKEN_ID, "eos_ids": ranges.TOKEN_ID}

    @property
    def framing(self) -> str:
        return "gpt2"


def _size(layers: int, width: int) -> GPT2Config:
    """Heads are 64 wide and the feed-forward four times the model in every published size."""
    return GPT2Config(
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        intermediate_size=4 * width,
    )


SIZES: dict[str, GPT2Config] = {
    "distilgpt2": _size(6, 768),  # arXiv:1910.01108
    "gpt2": _size(12, 768),
    "gpt2-medium": _size(24, 1024),
    "gpt2-large": _size(36, 1280),
    "gpt2-xl": _size(48, 1600),
}
"""The published sizes."""

JSON = huggingface.JsonFields(
    defaults=GPT2Config(),
    fixed={
        "model_type": "gpt2",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    numbers={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
        "init_std": "initializer_range",
    },
    nullable=huggingface.CLASSIFIER_DROPOUT,
    switches={"tie_embeddings": "tie_word_embeddings"},
    activations={"activation": "activation_function"},
    special_ids=True,
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
)


def from_huggingface(config: Mapping[str, Any]) -> GPT2Config:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    fields = JSON.fields(config)
    inner = 4 * fields["hidden_size"] if config.get("n_inner") is None else config["n_inner"]
    numbers = {"intermediate_size": "n_inner"}
    fields |= huggingface.read_numbers({"n_inner": inner}, numbers, JSON.defaults)
    return huggingface.make_config(GPT2Config, fields)


def to_huggingface(config: GPT2Config) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    usual = config.intermediate_size == 4 * config.hidden_size
    return {
        **JSON.write(config),
        "n_inner": None if usual else config.intermediate_size,
        "embd_pdrop": config.dropout,
    }


_LAYER, _THEIR_LAYER = "stack/{layer}", "transformer.h.{layer}"
_PROJECTIONS = tuple(f"{_LAYER}/attention/{name}" for name in ("query", "key", "value"))

_HEADS = {
    "GPT2ForSequenceClassification": "score",
    "GPT2ForTokenClassification": "classifier",
    "GPT2ForQuestionAnswering": "qa_outputs",
}
"""Names of the classification head by architecture."""


def _conv1d(ours: str, theirs: str, axes: str) -> tuple[Weight, Weight]:
    """Kernel and bias of their ``Conv1D``, which keeps inputs first; D is the output's axis."""
    return (
        Weight(f"{ours}/kernel", f"{theirs}.weight", axes),
        Weight(f"{ours}/bias", f"{theirs}.bias"),
    )


def weights(config: GPT2Config) -> WeightTable:
    """The names of GPT-2's tensors; published files leave out the prefix."""
    table = WeightTable(
        weights=(
            Weight("words/embedding", "transformer.wte.weight", "VD"),
            Weight("embeddings/position/embedding", "transformer.wpe.weight"),
            *norm(f"{_LAYER}/attention_norm", f"{_THEIR_LAYER}.ln_1"),
            Weight(
                tuple(f"{name}/kernel" for name in _PROJECTIONS),
                f"{_THEIR_LAYER}.attn.c_attn.weight",
                "DNH->D(NH)",
                axis=1,
            ),
            Weight(
                tuple(f"{name}/bias" for name in _PROJECTIONS),
                f"{_THEIR_LAYER}.attn.c_attn.bias",
                "NH->(NH)",
            ),
            *_conv1d(f"{_LAYER}/attention/output", f"{_THEIR_LAYER}.attn.c_proj", "NHD->(NH)D"),
            *norm(f"{_LAYER}/mlp_norm", f"{_THEIR_LAYER}.ln_2"),
            *_conv1d(f"{_LAYER}/mlp/up", f"{_THEIR_LAYER}.mlp.c_fc", "DF"),
            *_conv1d(f"{_LAYER}/mlp/down", f"{_THEIR_LAYER}.mlp.c_proj", "FD"),
            *norm("final_norm", "transformer.ln_f"),
            Weight("lm_head/words/kernel", "lm_head.weight", "DV->VD"),
            *linear("classification_head", _HEADS.get(config.architecture, "score"), "D", "C"),
        ),
        copies=tied(config, "lm_head.weight", "transformer.wte.weight"),
        # The causal mask, which files of 2019 carry.
        ignorable=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
        prefix="transformer.",
    )
    return table.bare() if config.architecture == "GPT2Model" else table


FAMILY = Family(
    config=GPT2Config,
    model_types=("gpt2",),
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    aliases=JSON.aliases,
)
