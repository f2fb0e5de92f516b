"""A model family of your own, outside of the package, with weights in and out.

    python own_family.py
    flax-transformers train own_family.py --workdir runs/own_family

The family is DistilBERT (arXiv:1910.01108): BERT's layers without token types, under names of
tensors of its own. `ft.register` makes it a family like those of the package: `load_pretrained` and
`save_pretrained` read and write its `config.json` and `model.safetensors`, which `transformers`
loads as `DistilBertForMaskedLM`. An installed package registers it by an entry point instead::

    [project.entry-points.flax_transformers]
    distilbert = "my_package.distilbert:FAMILY"
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import flax_transformers as ft
from flax_transformers.huggingface import fields
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm
from flax_transformers.models.config import TextConfig
from flax_transformers.models.encoder import EncoderForMaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.training.config import Phase, TrainConfig


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(TextConfig):
    """The published sizes by default."""

    architecture: str = "DistilBertForMaskedLM"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int | None = 512
    norm_position: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    embedding_norm: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1


FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "pad_id": "pad_token_id",
}
"""Fields of the config: ours to those of config.json."""


def from_huggingface(config: Mapping[str, Any]) -> DistilBertConfig:
    found = fields.common_fields(config, DistilBertConfig())  # the architecture, labels ...
    found |= fields.read_numbers(config, FIELDS, DistilBertConfig())
    return fields.make_config(DistilBertConfig, found)


def to_huggingface(config: DistilBertConfig) -> dict[str, Any]:
    return {
        "model_type": "distilbert",
        "activation": "gelu",
        **fields.common_json(config),
        **fields.write_fields(config, FIELDS),
    }


def weights(config: DistilBertConfig) -> WeightTable:
    """Parameters to tensors, "DNH" and so on saying how the axes of one become those of the other
    (D width, V vocabulary, F feed-forward)."""
    layer, theirs = "stack/{layer}", "distilbert.transformer.layer.{layer}"
    return WeightTable(
        weights=(
            Weight("words/embedding", "distilbert.embeddings.word_embeddings.weight", "VD"),
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
        ),
        copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    )


FAMILY = ft.register(
    ft.Family(
        config=DistilBertConfig,
        architectures={"DistilBertForMaskedLM": EncoderForMaskedLM},
        model_types=("distilbert",),
        from_huggingface=from_huggingface,
        to_huggingface=to_huggingface,
        weights=weights,
    )
)


def get_config() -> TrainConfig:
    recipe = ft.recipe("bert_tiny")
    return replace(
        recipe,
        model=DistilBertConfig(
            vocab_size=4096, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
            max_positions=32,
        ),
        optimizer=AdamW(learning_rate=1e-3),
        phases=(Phase(steps=10, sequence_length=32, batch_size=16),),
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ft.train(get_config(), f"{folder}/run")
        model, params = ft.load_pretrained(f"{folder}/run")
        tokenizer = ft.load_tokenizer(f"{folder}/run")
        ft.save_pretrained(f"{folder}/hf", model, params, tokenizer=tokenizer)
        print(json.loads((Path(folder) / "hf" / "config.json").read_text()))
        again, loaded = ft.load_pretrained(f"{folder}/hf")
    assert again.config == model.config, (again.config, model.config)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, loaded))
    print("the weights come back bit for bit")


if __name__ == "__main__":
    main()
