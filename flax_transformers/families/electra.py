"""ELECTRA (Clark et al., arXiv:2003.10555): discriminator, generator, and both in one model.

Pretraining trains ``ElectraWithGenerator``: a small generator replaces masked tokens, and the
discriminator tells for each token whether it was replaced (``ReplacedTokenDetection``). The two
share their embeddings. In the original's format each is a model of its own: the discriminator
``ElectraForPreTraining``, the generator ``ElectraForMaskedLM``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.families import bert
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm, tied
from flax_transformers.models.config import Activation, ComputeConfig
from flax_transformers.models.encoder import EncoderForMaskedLM, EncoderModel
from flax_transformers.models.heads import (
    ActivatedLayer,
    ActivatedPoolingMixin,
    LMHead,
    Tokens,
    Unembedding,
    label_layer,
)
from flax_transformers.models.kernels.kv_cache import Cache
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.embeddings import Embedding, embedding_projection
from flax_transformers.models.layers.stack import make_stack
from flax_transformers.models.outputs import ModelOutput, Outputs
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForSequenceClassification,
    TextForTokenClassification,
    TextModel,
)


class ElectraForSequenceClassification(ActivatedPoolingMixin, TextForSequenceClassification):
    """Labels each sequence, with dropout before the pooling layer as well."""

    def vector(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        vector_BD = super().vector(hidden_BTD, tokens, deterministic)
        return self.head_dropout(vector_BD, deterministic=deterministic)


class ElectraForPreTraining(TextModel):
    """The discriminator: tells for each token whether it was replaced (section 2)."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.replaced_transform = ActivatedLayer(c, self.dtype, c.activation)
        self.replaced_head = label_layer(c, self.dtype, 1)

    def replaced(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T]; positive for tokens that were more likely replaced than not."""
        logits_BT1 = self.replaced_head(self.replaced_transform(hidden_BTD))
        return logits_BT1[..., 0].astype(jnp.float32)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"logits": self.replaced(hidden_BTD, deterministic=deterministic)}


class Generator(nn.Module):
    """The generator above the embeddings, which it shares with the discriminator (section 3.2)."""

    config: ElectraConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        if c.project_embeddings:
            self.projection = embedding_projection(c, dtype)
        self.stack = make_stack(c, self.compute)
        self.mlm_head = LMHead(c, dtype, transform=True, use_bias=True)

    def __call__(
        self,
        x_BTE: jax.Array,
        mask: AttentionMask,
        table: Embedding,
        positions_BM: jax.Array | None,
        deterministic: bool,
    ) -> Unembedding:
        """Unembedding at the positions int [B, M], or at all, of embeddings [B, T, E]."""
        x_BTD = self.projection(x_BTE) if self.config.project_embeddings else x_BTE
        hidden_BTD, _ = self.stack(x_BTD, LayerInputs(mask=mask), deterministic=deterministic)
        if positions_BM is not None:
            hidden_BTD = jnp.take_along_axis(hidden_BTD, positions_BM[:, :, None], axis=1)
        return self.mlm_head(hidden_BTD, table)


class ElectraOutput(ModelOutput):
    """``logits`` float32 [B, T] of the discriminator, ``generator_logits`` float32
    [B, T, vocab_size] of the generator for the same inputs."""

    generator_logits: jax.Array | None = None


class ElectraWithGenerator(ElectraForPreTraining):
    """Discriminator and generator, as they are pretrained together."""

    config: ElectraConfig

    output = ElectraOutput

    def setup(self) -> None:
        super().setup()
        self.generator = Generator(self.config.generator, self.compute)

    def generate(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions_BM: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Unembedding:
        """What the generator predicts for masked ids [B, T], at ``positions_BM`` int [B, M] or at
        all positions; the other inputs are those of ``hidden_states``."""
        mask, _ = self._mask(input_ids, attention_mask, position_ids, segment_ids, None, None)
        if position_ids is None:
            position_ids = self.parts.position_ids(self.config, input_ids, segment_ids)
        embedded_BTE = self.words(input_ids)
        x_BTE = self.embeddings.total(
            embedded_BTE, position_ids, token_type_ids, deterministic=deterministic
        )
        return self.generator(x_BTE, mask, self.words, positions_BM, deterministic)

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
        """The outputs of the discriminator, and the generator's logits for the same inputs."""
        others = token_type_ids, position_ids, segment_ids
        output = super().__call__(
            input_ids, attention_mask, *others, cache=cache, deterministic=deterministic
        )
        unembedding = self.generate(
            input_ids, attention_mask, None, *others, deterministic=deterministic
        )
        return output.replace(generator_logits=unembedding.logits()[..., : unembedding.size])


BOTH, GENERATOR = "ElectraWithGenerator", "ElectraForMaskedLM"

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ElectraForPreTraining": ElectraForPreTraining,
    GENERATOR: EncoderForMaskedLM,
    BOTH: ElectraWithGenerator,
    "ElectraForSequenceClassification": ElectraForSequenceClassification,
    "ElectraForTokenClassification": TextForTokenClassification,
    "ElectraForQuestionAnswering": TextForQuestionAnswering,
    "ElectraModel": EncoderModel,
}


@dataclass(frozen=True, kw_only=True)
class ElectraConfig(bert.BertConfig):
    """The published ELECTRA: BERT's layers, embeddings of a width of their own; small by default.

    The fields describe the discriminator, or a generator that is a model of its own.
    """

    architecture: str = "ElectraForPreTraining"
    hidden_size: int = 256
    num_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128
    """Width of the embedding tables; a linear layer follows if it is not ``hidden_size``."""
    generator_divisor: int = 4
    """The generator of ``ElectraWithGenerator`` has so many times fewer features, heads and
    feed-forward features, and as many layers (3 in the base size, 4 in the others; table 6)."""

    RANGES: ClassVar[ranges.Ranges] = {
        "embedding_size": ranges.WIDTH,
        "generator_divisor": ranges.integers(1, 64),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_size", "num_heads", "intermediate_size"):
            value = getattr(self, name)
            if self.architecture == BOTH and value % self.generator_divisor:
                raise ranges.OutOfRange(
                    f"model.{name} {value} does not divide by model.generator_divisor "
                    f"{self.generator_divisor}; choose another generator, such as 1"
                )

    @property
    def embedding_width(self) -> int:
        return self.embedding_size

    @property
    def head_activation(self) -> Activation:
        return "gelu"  # whatever the layers have

    @property
    def attention_width(self) -> int:
        own = super().attention_width
        return own + self.generator.attention_width if self.architecture == BOTH else own

    @property
    def generator(self) -> ElectraConfig:
        """The generator as a model of its own."""
        return replace(
            self,
            architecture=GENERATOR,
            hidden_size=self.hidden_size // self.generator_divisor,
            num_heads=self.num_heads // self.generator_divisor,
            intermediate_size=self.intermediate_size // self.generator_divisor,
        )


def part(
    config: ElectraConfig, architecture: str
) -> tuple[ElectraConfig, Callable[[Mapping[str, Any]], dict[str, Any]]] | None:
    """The generator of a model with both, as ``Family.part`` says."""
    if config.architecture != BOTH or architecture != GENERATOR:
        return None

    def select(params: Mapping[str, Any]) -> dict[str, Any]:
        own = dict(params["generator"])
        shared = {name: leaf for name, leaf in params["embeddings"].items() if name != "projection"}
        projection = {"projection": own.pop("projection")} if "projection" in own else {}
        return {"words": params["words"], "embeddings": shared | projection, **own}

    return config.generator, select


def _size(
    layers: int, width: int, embedding_size: int, divisor: int, architecture: str
) -> ElectraConfig:
    """Heads are 64 wide and the feed-forward four times the model."""
    return ElectraConfig(
        architecture=architecture,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        intermediate_size=4 * width,
        embedding_size=embedding_size,
        generator_divisor=divisor,
    )


SIZES: dict[str, ElectraConfig] = {
    f"electra-{size}-{side}": _size(
        layers, width if side == "discriminator" else 256, embeddings, divisor, architecture
    )
    for size, layers, width, embeddings, divisor in (
        ("small", 12, 256, 128, 4),
        ("base", 12, 768, 768, 3),
        ("large", 24, 1024, 1024, 4),
    )
    for side, architecture in (
        ("discriminator", "ElectraForPreTraining"),
        ("generator", GENERATOR),
    )
}
"""The published sizes; the small generator that was published is as large as its discriminator."""

JSON = huggingface.JsonFields(
    defaults=ElectraConfig(),
    fixed={"model_type": "electra", **bert.ABSOLUTE_ENCODER},
    numbers=bert.NUMBERS | {"embedding_size": "embedding_size"},
    nullable=huggingface.CLASSIFIER_DROPOUT | {"pad_id": "pad_token_id"},
    switches=bert.SWITCHES,
)


def weights(config: ElectraConfig) -> WeightTable:
    """The names of ELECTRA's tensors."""
    rows = config.architecture == "ElectraForSequenceClassification"
    spans = config.architecture == "ElectraForQuestionAnswering"
    head = "classifier.out_proj" if rows else "qa_outputs" if spans else "classifier"
    table = WeightTable(
        weights=(
            *bert.body_weights("electra"),
            *linear("embeddings/projection", "electra.embeddings_project", "E", "D"),
            *linear("replaced_transform/dense", "discriminator_predictions.dense", "D", "E"),
            *linear("replaced_head", "discriminator_predictions.dense_prediction", "D", "C"),
            *linear("mlm_head/transform/dense", "generator_predictions.dense", "D", "E"),
            *norm("mlm_head/transform/norm", "generator_predictions.LayerNorm"),
            Weight("mlm_head/bias", "generator_lm_head.bias", "V"),
            Weight("mlm_head/words/kernel", "generator_lm_head.weight", "DV->VD"),
            *linear("pooler/dense", "classifier.dense", "D", "E"),
            *linear("classification_head", head, "D", "C"),
        ),
        renames=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        copies=tied(
            config, "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"
        ),
        ignorable=(r"electra\.embeddings\.position_ids",),  # an old buffer
        prefix="electra.",
    )
    return table.bare() if config.architecture == "ElectraModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    weights=weights,
    part=part,
    only_here=(BOTH,),
)
