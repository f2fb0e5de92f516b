"""ALBERT (Lan et al., arXiv:1909.11942): BERT with narrow embeddings and layers that are shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax

from flax_transformers import ranges
from flax_transformers.families import bert
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm, tied
from flax_transformers.models.config import Activation, ComputeConfig
from flax_transformers.models.encoder import (
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderWithPooler,
)
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from flax_transformers.models.layers.stack import REMAT_POLICIES, Block
from flax_transformers.models.outputs import ModelOutput, Outputs
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForTokenClassification,
    Tokens,
)


class LayerGroup(nn.Module):
    """The different layers of a group, each applied once."""

    config: AlbertConfig
    compute: ComputeConfig
    block: Block
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, None]:
        for i in range(self.config.layers_per_group):
            layer = self.block(
                self.config, self.compute, deterministic=self.deterministic, name=f"block_{i}"
            )
            x_BTD, _ = layer(x_BTD, inputs, None)
        return x_BTD, None


class SharedStack(nn.Module):
    """Groups of layers, in turn; each group is applied ``config.layer_uses`` times (section 3.1).

    Parameters are named as in ``Stack``, with a leading axis over groups. The loop is compiled as
    one pass over a group, or unrolled.
    """

    config: AlbertConfig
    compute: ComputeConfig
    block: Block

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: LayerInputs,
        per_layer: None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerOutput]:
        """As ``Stack``; there is nothing ``per_layer``."""
        c, scan = self.config, self.compute.scan_layers
        group: Any = LayerGroup
        if self.compute.remat != "none":
            policy = REMAT_POLICIES[self.compute.remat]
            in_loop = scan and c.layer_uses > 1
            group = nn.remat(group, policy=policy, prevent_cse=not in_loop)
        repeated = nn.scan(
            group,
            variable_broadcast="params",
            variable_axes={"intermediates": 0},
            split_rngs={"params": False, "dropout": True},
            in_axes=nn.broadcast,
            length=c.layer_uses,
            unroll=1 if scan else c.layer_uses,
        )
        groups = nn.scan(
            repeated,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_groups,
            unroll=1 if scan else c.num_groups,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.compute, self.block, deterministic, name="layers")
        return groups(x_BTD, inputs)[0], LayerOutput()


def make_shared_stack(
    config: AlbertConfig, compute: ComputeConfig, block: Block = TransformerBlock
) -> SharedStack:
    """The layers of a config."""
    return SharedStack(config, compute, block)


class AlbertPreTrainingOutput(ModelOutput):
    """``prediction_logits`` float32 [B, T, vocab_size] of the tokens, ``sop_logits`` float32 [B, 2]
    of the order of the two segments; ``logits`` stays None."""

    prediction_logits: jax.Array | None = None
    sop_logits: jax.Array | None = None


class AlbertForPreTraining(bert.NextSentenceMixin, EncoderForMaskedLM):
    """Both pretraining heads: masked tokens, and whether A and B are in order or swapped."""

    output = AlbertPreTrainingOutput

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        logits_BTV = self.unembed(hidden_BTD)[..., : self.config.vocab_size]
        return {"prediction_logits": logits_BTV, "sop_logits": self.next_sentence(hidden_BTD)}


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "AlbertForMaskedLM": EncoderForMaskedLM,
    "AlbertForPreTraining": AlbertForPreTraining,
    "AlbertForSequenceClassification": EncoderForSequenceClassification,
    "AlbertForTokenClassification": TextForTokenClassification,
    "AlbertForQuestionAnswering": TextForQuestionAnswering,
    "AlbertModel": EncoderWithPooler,
}


@dataclass(frozen=True, kw_only=True)
class AlbertConfig(bert.BertConfig):
    """The published ALBERT, version 2; base size by default.

    ``num_layers`` / ``num_groups`` successive applications share the ``layers_per_group`` layers of
    a group. (transformers calls each application a layer, however many layers a group has.)
    """

    architecture: str = "AlbertForMaskedLM"
    vocab_size: int = 30000
    activation: Activation = "gelu_tanh"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    embedding_size: int = 128
    """Width of the embedding tables, which a linear layer maps to ``hidden_size``."""
    num_groups: int = 1
    layers_per_group: int = 1

    RANGES: ClassVar[ranges.Ranges] = {
        "embedding_size": ranges.WIDTH,
        "num_groups": ranges.LAYERS,
        "layers_per_group": ranges.LAYERS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers % self.num_groups:
            raise ranges.OutOfRange(
                f"model.num_layers {self.num_layers} does not divide by model.num_groups "
                f"{self.num_groups}; groups are applied equally often"
            )

    @property
    def embedding_width(self) -> int:
        return self.embedding_size

    @property
    def project_embeddings(self) -> bool:
        return True  # also where both are equally wide

    @property
    def layer_uses(self) -> int:
        return self.num_layers // self.num_groups

    @property
    def attention_width(self) -> int:
        return super().attention_width * self.layers_per_group


def _size(layers: int, width: int, heads: int) -> AlbertConfig:
    return AlbertConfig(
        hidden_size=width, num_layers=layers, num_heads=heads, intermediate_size=4 * width
    )


SIZES: dict[str, AlbertConfig] = {
    "albert-base-v2": _size(12, 768, 12),
    "albert-large-v2": _size(24, 1024, 16),
    "albert-xlarge-v2": _size(24, 2048, 16),
    "albert-xxlarge-v2": _size(12, 4096, 64),
}
"""The published sizes."""

JSON = huggingface.JsonFields(
    defaults=SIZES["albert-xxlarge-v2"],  # as in transformers
    fixed={"model_type": "albert", "position_embedding_type": "absolute"},
    numbers=bert.NUMBERS
    | {
        "embedding_size": "embedding_size",
        "num_groups": "num_hidden_groups",
        "layers_per_group": "inner_group_num",
        "classifier_dropout": "classifier_dropout_prob",
        "pad_id": "pad_token_id",
    },
    switches=bert.SWITCHES,
)


def weights(config: AlbertConfig) -> WeightTable:
    """The names of ALBERT's tensors."""
    layer = "stack/{layer}"
    theirs = "albert.encoder.albert_layer_groups.{repeat}.albert_layers.{block}"
    spans = config.architecture.endswith("QuestionAnswering")
    embeddings = "albert.embeddings"
    table = WeightTable(
        weights=(
            Weight("words/embedding", f"{embeddings}.word_embeddings.weight", "VD"),
            Weight("embeddings/position/embedding", f"{embeddings}.position_embeddings.weight"),
            Weight("embeddings/token_type/embedding", f"{embeddings}.token_type_embeddings.weight"),
            *norm("embeddings/norm", f"{embeddings}.LayerNorm"),
            *linear(
                "embeddings/projection", "albert.encoder.embedding_hidden_mapping_in", "E", "D"
            ),
            *attention(f"{layer}/attention", f"{theirs}.attention", "query key value dense"),
            *norm(f"{layer}/attention_norm", f"{theirs}.attention.LayerNorm"),
            *linear(f"{layer}/mlp/up", f"{theirs}.ffn", "D", "F"),
            *linear(f"{layer}/mlp/down", f"{theirs}.ffn_output", "F", "D"),
            *norm(f"{layer}/mlp_norm", f"{theirs}.full_layer_layer_norm"),
            *linear("pooler/dense", "albert.pooler", "D", "E"),
            *linear("mlm_head/transform/dense", "predictions.dense", "D", "E"),
            *norm("mlm_head/transform/norm", "predictions.LayerNorm"),
            *bert.word_weights("predictions", config.tie_embeddings),
            *linear("next_sentence_head", "sop_classifier.classifier", "D", "C"),
            *linear("classification_head", "qa_outputs" if spans else "classifier", "D", "C"),
        ),
        copies=tied(config, "predictions.decoder.weight", f"{embeddings}.word_embeddings.weight")
        | {"predictions.decoder.bias": "predictions.bias"},
        # An old buffer, and what published masked-LM files carry besides.
        ignorable=(
            r"albert\.embeddings\.position_ids",
            r"albert\.pooler\.(weight|bias)",
            r"sop_classifier\.classifier\.(weight|bias)",
        ),
        prefix="albert.",
    )
    return table.bare() if config.architecture == "AlbertModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    parts=ModelParts(stack=make_shared_stack),
    sizes=SIZES,
    weights=weights,
)
