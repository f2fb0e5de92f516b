"""CLIP (Radford et al., arXiv:2103.00020): a ViT and a causal text encoder, trained on pairs.

SigLIP's file uses what stands here. Shape letters as in ``models``; E is the width of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.families._image_text import ImageTextConfig, ImageTextModel, projection
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm
from flax_transformers.models.config import (
    Activation,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.models.heads import Tokens, mean_of_tokens, take_token
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.outputs import ModelOutput, Outputs
from flax_transformers.models.text import TextForSequenceClassification, TextModel
from flax_transformers.models.vision import VisionForClassification, VisionModel

FIRST_TEMPERATURE = 0.07  # section 2.5
EOS_OF_OLD_CONFIGS = 2
"""The ``eos_token_id`` of config.json files for which transformers takes the highest id of a text
instead, as the original code does."""


class TowerOutput(ModelOutput):
    """``pooler_output`` [B, D] of an encoder alone, or its embeddings [B, E], as ``text_embeds`` or
    ``image_embeds``, whose length is not one."""

    text_embeds: jax.Array | None = None
    image_embeds: jax.Array | None = None


class ClipImageEncoder(VisionModel):
    """A ViT with one more norm before the layers; the last norm is for the class token alone."""

    def setup(self) -> None:
        super().setup()
        self.pre_norm = make_norm(self.config, self.dtype, axis="input_norm")

    def encode(self, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """The layers, without the final norm."""
        c = self.config
        rates = None if deterministic or not c.drop_path else jnp.asarray(c.drop_path_rates())
        x_BTD = self.pre_norm(x_BTD)
        return self.stack(x_BTD, LayerInputs(), rates, deterministic=deterministic)[0]

    def class_vector(self, hidden_BTD: jax.Array) -> jax.Array:
        """The class token [B, D] after the final norm."""
        return self.final_norm(hidden_BTD[:, 0])


class ClipModel(ImageTextModel):
    """Both encoders, and a linear map of each to the common space."""

    config: ClipConfig

    image_encoder = ClipImageEncoder

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.text_projection = projection(c, c.projection_dim, self.dtype)
        self.image_projection = projection(c.vision, c.projection_dim, self.dtype)

    def pool_image(self, hidden_BTD: jax.Array) -> jax.Array:
        return self.image_projection(self.image_tower.class_vector(hidden_BTD)[:, None])[:, 0]

    def pool_text(self, hidden_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        ends_B1D = ends_of_texts(hidden_BTD, input_ids, self.config.eos_ids)
        return self.text_projection(ends_B1D)[:, 0]


def ends_of_texts(
    hidden_BTD: jax.Array, input_ids: jax.Array, eos_ids: tuple[int, ...]
) -> jax.Array:
    """States [B, 1, D] at the first id of ``eos_ids``, or without any at the highest id."""
    marks_BT = jnp.isin(input_ids, jnp.asarray(eos_ids)) if eos_ids else input_ids
    return take_token(hidden_BTD, jnp.argmax(marks_BT, axis=1))


class ClipTextModel(TextModel):
    """The text encoder alone."""

    config: ClipTextConfig

    output = TowerOutput

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        ends_B1D = ends_of_texts(hidden_BTD, tokens.ids, self.config.eos_ids)
        return {"pooler_output": ends_B1D[:, 0]}


class ClipTextModelWithProjection(ClipTextModel):
    """The text encoder and its map to the common space."""

    def setup(self) -> None:
        super().setup()
        self.text_projection = projection(self.config, self.config.projection_dim, self.dtype)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        ends_B1D = ends_of_texts(hidden_BTD, tokens.ids, self.config.eos_ids)
        return {"text_embeds": self.text_projection(ends_B1D)[:, 0]}


class ClipVisionModel(ClipImageEncoder):
    """The image encoder alone."""

    config: ClipVisionConfig

    output = TowerOutput

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        return {"pooler_output": self.class_vector(hidden_BTD)}


class ClipVisionModelWithProjection(ClipImageEncoder):
    """The image encoder and its map to the common space."""

    config: ClipVisionConfig

    output = TowerOutput

    def setup(self) -> None:
        super().setup()
        self.image_projection = projection(self.config, self.config.projection_dim, self.dtype)

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        vector_B1D = self.class_vector(hidden_BTD)[:, None]
        return {"image_embeds": self.image_projection(vector_B1D)[:, 0]}


class ClipForImageClassification(ClipImageEncoder, VisionForClassification):
    """Labels each image by the mean of its patches, before the final norm."""

    config: ClipClassifierConfig

    def pool(self, hidden_BTD: jax.Array) -> jax.Array:
        return mean_of_tokens(hidden_BTD[:, 1:], None)


class ClipTextForSequenceClassification(TextForSequenceClassification):
    """Labels each text by the state that CLIP makes its embedding from."""

    config: ClipTextConfig

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        ends_B1D = ends_of_texts(hidden_BTD, tokens.ids, self.config.eos_ids)
        return self.head_dropout(ends_B1D[:, 0], deterministic=deterministic)


ARCHITECTURES: dict[str, type[nn.Module]] = {"CLIPModel": ClipModel}
TEXT_ARCHITECTURES: dict[str, type[nn.Module]] = {
    "CLIPTextModel": ClipTextModel,
    "CLIPTextModelWithProjection": ClipTextModelWithProjection,
    "CLIPTextForSequenceClassification": ClipTextForSequenceClassification,
}
VISION_ARCHITECTURES: dict[str, type[nn.Module]] = {
    "CLIPVisionModel": ClipVisionModel,
    "CLIPVisionModelWithProjection": ClipVisionModelWithProjection,
}


def _initial_std(config: TransformerConfig, name: str) -> float:
    """As in the original code, for both encoders; ``truncated_normal`` cuts at two of them."""
    width = config.hidden_size**-0.5
    of_layers = {"query": width, "key": width, "value": width, "up": width / math.sqrt(2)}
    if name in ("output", "down"):
        return width * (2 * config.num_layers) ** -0.5
    return of_layers.get(name, config.init_std)


@dataclass(frozen=True, kw_only=True)
class ClipVision(VisionConfig):
    """The image encoder, ViT-B/32 by default."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 32
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    patch_bias: ClassVar[bool] = False

    def initial_std(self, name: str) -> float:
        return _initial_std(self, name)


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipVision):
    """The image encoder as a model of its own."""

    architecture: str = "CLIPVisionModel"
    projection_dim: int = 512
    """Width of the embeddings."""

    RANGES: ClassVar[ranges.Ranges] = {"projection_dim": ranges.WIDTH}


@dataclass(frozen=True, kw_only=True)
class ClipClassifierConfig(ClipVision):
    """The image encoder with a classifier."""

    architecture: str = "CLIPForImageClassification"

    @property
    def feature_pool(self) -> Literal["mean", "cls"]:
        return "mean"


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(TextConfig):
    """The text encoder of ViT-B/32 by default, as a model of its own."""

    architecture: str = "CLIPTextModel"
    vocab_size: int = 49408
    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    intermediate_size: int = 2048
    max_positions: int | None = 77
    causal: bool = True
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    pad_id: int = 1
    bos_id: int | None = 49406
    eos_ids: tuple[int, ...] = (49407,)
    """Id of the end of a text, whose state becomes its embedding; none: the highest id of the text
    is the end, as in OpenAI's files."""
    projection_dim: int = 512
    """Width of the embeddings."""

    RANGES: ClassVar[ranges.Ranges] = {
        "projection_dim": ranges.WIDTH,
        "bos_id": ranges.TOKEN_ID,
        "eos_ids": ranges.TOKEN_ID,
    }

    @property
    def framing(self) -> str:
        return "bert"  # with an end token, whose state is the embedding of a text

    def initial_std(self, name: str) -> float:
        return _initial_std(self, name)


@dataclass(frozen=True, kw_only=True)
class ClipConfig(ClipTextConfig, ImageTextConfig):
    """The published CLIP, ViT-B/32 by default."""

    architecture: str = "CLIPModel"
    vision: VisionConfig = field(default_factory=ClipVision)
    initial_logit_scale: float = math.log(1 / FIRST_TEMPERATURE)


def _size(patch_size: int, image_size: int, letters: str) -> ClipConfig:
    layers, width, text = {"b": (12, 768, 512), "l": (24, 1024, 768), "h": (32, 1280, 1024)}[
        letters
    ]
    activation: Activation = "gelu" if letters == "h" else "quick_gelu"  # LAION's are with GELU
    vision = ClipVision(
        hidden_size=width,
        num_layers=layers,
        num_heads=width // (80 if letters == "h" else 64),
        intermediate_size=4 * width,
        patch_size=patch_size,
        image_size=image_size,
        activation=activation,
    )
    return ClipConfig(
        hidden_size=text,
        num_layers=24 if letters == "h" else 12,
        num_heads=text // 64,
        intermediate_size=4 * text,
        projection_dim=text,
        vision=vision,
        activation=activation,
    )


SIZES: dict[str, ClipConfig] = {
    "clip-b32": _size(32, 224, "b"),
    "clip-b16": _size(16, 224, "b"),
    "clip-l14": _size(14, 224, "l"),
    "clip-l14-336": _size(14, 336, "l"),
    "clip-h14": _size(14, 224, "h"),
}
"""The published sizes: OpenAI's, and LAION's ViT-H/14."""

TOWER_NUMBERS = huggingface.SIZE_NUMBERS | {
    "norm_eps": "layer_norm_eps",
    "attention_dropout": "attention_dropout",
}
TEXT_NUMBERS = TOWER_NUMBERS | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
VISION_NUMBERS = TOWER_NUMBERS | {
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
ALIASES = {"text_config_dict": "text_config", "vision_config_dict": "vision_config"}
"""Second names of the parts of a config.json; transformers reads these if both are there."""


def part_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part "text_config" or "vision_config" of a config.json."""
    return config.get(f"{name}_dict") or config.get(name) or {}


@dataclass(frozen=True, kw_only=True)
class _TextFields(huggingface.JsonFields[ClipTextConfig]):
    """The config.json of the text encoder."""

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().own_fields(config)
        old = fields["eos_ids"] == (EOS_OF_OLD_CONFIGS,)
        return fields | ({"eos_ids": ()} if old else {})

    def own_json(self, config: ClipTextConfig) -> dict[str, Any]:
        old = {} if config.eos_ids else {"eos_token_id": EOS_OF_OLD_CONFIGS}
        return super().own_json(config) | old


_PROJECTION = {"projection_dim": "projection_dim"}
_INIT_STD = {"init_std": "initializer_range"}
_TEXT = _TextFields(
    defaults=ClipTextConfig(),
    fixed={"model_type": "clip_text_model"},
    numbers=TEXT_NUMBERS | _INIT_STD | _PROJECTION,
    special_ids=True,
)
_VISION = huggingface.JsonFields(
    defaults=ClipVisionConfig(),
    fixed={"model_type": "clip_vision_model"},
    numbers=VISION_NUMBERS | _INIT_STD | _PROJECTION,
)
_TOWER = replace(_VISION, numbers=VISION_NUMBERS | _INIT_STD)  # in the config.json of both


def from_huggingface(config: Mapping[str, Any]) -> ClipConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    huggingface.refuse_values(config, {"model_type": "clip"})
    fields = _TEXT.own_fields(part_of(config, "text_config"))
    numbers = _PROJECTION | {"initial_logit_scale": "logit_scale_init_value"}
    fields |= huggingface.read_numbers(config, numbers, ClipConfig())
    of_image = _TOWER.own_fields(part_of(config, "vision_config"))
    fields["vision"] = huggingface.make_config(ClipVision, of_image)
    return huggingface.make_config(ClipConfig, fields)


def clip_classifier_from_json(config: Mapping[str, Any]) -> ClipClassifierConfig:
    """Read the config.json of a classifier, or of both encoders. Raises UserError for unsupported
    fields."""
    huggingface.refuse_values(config, {"model_type": "clip"})
    fields = huggingface.common_fields(config, ClipClassifierConfig())
    fields |= _TOWER.own_fields(part_of(config, "vision_config"))
    return huggingface.make_config(ClipClassifierConfig, fields)


def to_huggingface(config: ClipConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    shared = {"projection_dim": config.projection_dim}
    return {
        "model_type": "clip",
        "architectures": [config.architecture],
        "logit_scale_init_value": config.initial_logit_scale,
        **shared,
        "text_config": _TEXT.own_json(config),
        "vision_config": {**_TOWER.own_json(config.vision), **shared},
    }


def clip_classifier_to_json(config: ClipClassifierConfig) -> dict[str, Any]:
    """The config.json of a classifier."""
    return {
        "model_type": "clip",
        **huggingface.common_json(config),
        "vision_config": _TOWER.own_json(config),
    }


def layer_weights(ours: str, theirs: str) -> tuple[Weight, ...]:
    """The layers of an encoder."""
    layer, their_layer = f"{ours}/stack/{{layer}}", f"{theirs}.encoder.layers.{{layer}}"
    return (
        *norm(f"{layer}/attention_norm", f"{their_layer}.layer_norm1"),
        *attention(
            f"{layer}/attention", f"{their_layer}.self_attn", "q_proj k_proj v_proj out_proj"
        ),
        *norm(f"{layer}/mlp_norm", f"{their_layer}.layer_norm2"),
        *linear(f"{layer}/mlp/up", f"{their_layer}.mlp.fc1", "D", "F"),
        *linear(f"{layer}/mlp/down", f"{their_layer}.mlp.fc2", "F", "D"),
    )


def shared_weights() -> tuple[Weight, ...]:
    """What CLIP and SigLIP have in common."""
    image, text = "vision_model.embeddings", "text_model.embeddings"
    return (
        Weight("text_tower/words/embedding", f"{text}.token_embedding.weight", "VD"),
        Weight("text_tower/embeddings/position/embedding", f"{text}.position_embedding.weight"),
        *layer_weights("text_tower", "text_model"),
        *norm("text_tower/final_norm", "text_model.final_layer_norm"),
        Weight(
            "image_tower/embeddings/patches/kernel", f"{image}.patch_embedding.weight", "CPQD->DCPQ"
        ),
        Weight("image_tower/embeddings/patches/bias", f"{image}.patch_embedding.bias"),
        Weight("image_tower/embeddings/position/embedding", f"{image}.position_embedding.weight"),
        *layer_weights("image_tower", "vision_model"),
        *norm("image_tower/final_norm", "vision_model.post_layernorm"),
        Weight("logit_scale/scale", "logit_scale"),
        Weight("logit_bias/bias", "logit_bias"),
    )


POSITION_IDS = r"(text|vision)_model\.embeddings\.position_ids"
"""Counts from 0, which older files carry."""


def weights(config: ClipTextConfig | ClipVision) -> WeightTable:
    """The names of CLIP's tensors."""
    return WeightTable(
        weights=(
            *shared_weights(),
            Weight(
                "image_tower/embeddings/class_token/embedding",
                "vision_model.embeddings.class_embedding",
            ),
            *norm("image_tower/pre_norm", "vision_model.pre_layrnorm"),  # their spelling
            *linear("image_projection", "visual_projection", "D", "E"),
            *linear("text_projection", "text_projection", "D", "E"),
        ),
        ignorable=(POSITION_IDS,),
    )


def tower_weights(table: WeightTable, tower: Literal["text", "image"]) -> WeightTable:
    """The rows of a ``table`` for the text or the image encoder, as a model of its own."""

    def own(name: str) -> str:
        return name.removeprefix(f"{tower}_tower/")

    rows = []
    for row in table.weights:
        names = (row.ours,) if isinstance(row.ours, str) else row.ours
        if names[0].startswith(f"{tower}_"):
            ours = own(names[0]) if isinstance(row.ours, str) else tuple(map(own, names))
            rows.append(replace(row, ours=ours))
    rows += linear("classification_head", "classifier", "D", "C")
    # transformers 5 leaves the prefix out of what it saves.
    prefix = "text_model." if tower == "text" else "vision_model."
    return replace(table, weights=tuple(rows), prefix=prefix)


def _classifier_weights(config: ClipClassifierConfig) -> WeightTable:
    """The names of a classifier's tensors, of which the final norm is never read."""
    table = tower_weights(weights(config), "image")
    unused = (replace(row, unused=True) for row in norm("pre_norm", "vision_model.post_layernorm"))
    rows = (row for row in table.weights if row.ours not in ("final_norm/scale", "final_norm/bias"))
    return replace(table, weights=(*rows, *unused))


FAMILY = Family(
    config=ClipConfig,
    model_types=("clip",),
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    aliases=ALIASES,
)
TOWERS = (
    Family.of_table(
        _TEXT,
        architectures=TEXT_ARCHITECTURES,
        weights=lambda config: tower_weights(weights(config), "text"),
        only_here=("CLIPTextForSequenceClassification",),
        wholes={"clip": partial(part_of, name="text_config")},
    ),
    Family.of_table(
        _VISION,
        architectures=VISION_ARCHITECTURES,
        weights=lambda config: tower_weights(weights(config), "image"),
        wholes={"clip": partial(part_of, name="vision_config")},
    ),
    Family(
        config=ClipClassifierConfig,
        model_types=("clip",),
        architectures={"CLIPForImageClassification": ClipForImageClassification},
        from_huggingface=clip_classifier_from_json,
        to_huggingface=clip_classifier_to_json,
        weights=_classifier_weights,
        aliases=ALIASES,
    ),
)
"""The encoders as models of their own."""
