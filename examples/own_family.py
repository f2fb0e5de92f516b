"""A model family of your own, outside of the package, with weights in and out.

    python own_family.py
    flax-transformers train own_family.py --workdir runs/own_family

The family is Megatron's BERT (arXiv:1909.08053): BERT with the layer norms in front of each
sub-layer and behind the last one, and none behind the embeddings. `ft.register` makes it a family
like those of the package: `load_pretrained` and `save_pretrained` read and write its `config.json`
and `model.safetensors`, which `transformers` loads as `MegatronBertForMaskedLM`. An installed
package registers it by an entry point instead::

    [project.entry-points.flax_transformers]
    megatron_bert = "my_package.megatron_bert:FAMILY"
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

import flax_transformers as ft
from flax_transformers.huggingface.fields import JsonFields
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm
from flax_transformers.models.config import TextConfig
from flax_transformers.models.encoder import EncoderForMaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.training.config import Phase, TrainConfig


@dataclass(frozen=True, kw_only=True)
class MegatronBertConfig(TextConfig):
    """The published sizes by default (345 M)."""

    architecture: str = "MegatronBertForMaskedLM"
    vocab_size: int = 29056
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    max_positions: int | None = 512
    token_types: int = 2
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1


FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_id": "pad_token_id",
}
"""Fields of the config: ours to those of config.json."""

JSON = JsonFields(
    defaults=MegatronBertConfig(), fixed={"model_type": "megatron-bert"}, numbers=FIELDS
)
"""How config.json is read and written; the architecture, labels and `hidden_act` need no entry."""


def weights(config: MegatronBertConfig) -> WeightTable:
    """Parameters to tensors, "DNH" and so on saying how the axes of one become those of the other
    (D width, V vocabulary, F feed-forward)."""
    layer, theirs = "stack/{layer}", "bert.encoder.layer.{layer}"
    words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions"
    projections = "self.query self.key self.value output.dense"
    return WeightTable(
        weights=(
            Weight("words/embedding", words, "VD"),
            Weight("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight"),
            Weight(
                "embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight"
            ),
            *norm(f"{layer}/attention_norm", f"{theirs}.attention.ln"),
            *attention(f"{layer}/attention", f"{theirs}.attention", projections),
            *norm(f"{layer}/mlp_norm", f"{theirs}.ln"),
            *linear(f"{layer}/mlp/up", f"{theirs}.intermediate.dense", "D", "F"),
            *linear(f"{layer}/mlp/down", f"{theirs}.output.dense", "F", "D"),
            *norm("final_norm", "bert.encoder.ln"),
            *linear("mlm_head/transform/dense", f"{head}.transform.dense", "D", "E"),
            *norm("mlm_head/transform/norm", f"{head}.transform.LayerNorm"),
            Weight("mlm_head/bias", f"{head}.bias", "V"),
        ),
        copies={f"{head}.decoder.weight": words, f"{head}.decoder.bias": f"{head}.bias"},
    )


FAMILY = ft.register(
    ft.Family.of_table(
        JSON, architectures={"MegatronBertForMaskedLM": EncoderForMaskedLM}, weights=weights
    )
)


def get_config() -> TrainConfig:
    recipe = ft.recipe("bert_tiny")
    return replace(
        recipe,
        model=MegatronBertConfig(
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
