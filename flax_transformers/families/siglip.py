"""SigLIP (Zhai et al., arXiv:2303.15343): image and text encoders trained by a sigmoid loss."""

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
from flax_transformers.families._image_text import ImageTextConfig, ImageTextModel
from flax_transformers.families.clip import (
    ALIASES,
    POSITION_IDS,
    TEXT_NUMBERS,
    VISION_NUMBERS,
    TowerOutput,
    part_of,
    shared_weights,
    tower_weights,
)
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import (
    Activation,
    FlopsGroup,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.models.heads import Tokens
from flax_transformers.models.layers.linear import Linear, feature_map
from flax_transformers.models.outputs import Outputs
from flax_transformers.models.text import TextForSequenceClassification, TextModel
from flax_transformers.models.vision import PoolingHead, VisionForClassification, VisionModel

FIRST_SCALE, FIRST_BIAS = 10.0, -10.0  # section 3.2


class SiglipModel(ImageTextModel):
    """Both encoders; the embedding of an image is as wide as its encoder."""

    config: SiglipConfig

    initial_logit_bias = FIRST_BIAS

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.image_head = PoolingHead(c.vision, self.compute)
        self.text_head = _text_head(c, c.vision.hidden_size, self.dtype)

    def pool_image(self, hidden_BTD: jax.Array) -> jax.Array:
        return self.image_head(hidden_BTD)

    def pool_text(self, hidden_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """The last position, which may be padding: texts are padded to one length in training."""
        return self.text_head(hidden_BTD[:, -1:])[:, 0]


def _text_head(config: TextConfig, width: int, dtype: jnp.dtype) -> Linear:
    """The map [B, T, D] to [B, T, E] of the last position."""
    size = config.hidden_size
    return feature_map(size, width, dtype, init_std=size**-0.5)


class SiglipTextModel(TextModel):
    """The text encoder alone, with its head."""

    config: SiglipTextConfig

    output = TowerOutput

    def setup(self) -> None:
        super().setup()
        self.text_head = _text_head(self.config, self.config.projection_size, self.dtype)

    def head_outputs(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> Outputs:
        return {"pooler_output": self.text_head(hidden_BTD[:, -1:])[:, 0]}


class SiglipVisionModel(VisionModel):
    """The image encoder alone, with its head."""

    config: SiglipVisionConfig

    output = TowerOutput

    def setup(self) -> None:
        super().setup()
        self.image_head = PoolingHead(self.config, self.compute)

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        return {"pooler_output": self.image_head(hidden_BTD)}


class SiglipTextForSequenceClassification(TextForSequenceClassification):
    """Labels each text by its last position, which may be padding."""

    config: SiglipTextConfig

    reads_padding = True

    def pool(self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool) -> jax.Array:
        return self.head_dropout(hidden_BTD[:, -1], deterministic=deterministic)


ARCHITECTURES: dict[str, type[nn.Module]] = {"SiglipModel": SiglipModel}
TEXT_ARCHITECTURES: dict[str, type[nn.Module]] = {
    "SiglipTextModel": SiglipTextModel,
    "SiglipTextForSequenceClassification": SiglipTextForSequenceClassification,
}


def _initial_std(config: TransformerConfig, name: str) -> float:
    """The deviations of the original's Xavier-uniform kernels, before ``truncated_normal`` cuts."""
    width = config.hidden_size
    if name in ("query", "key", "value", "output"):
        return width**-0.5
    if name in ("up", "down"):
        return math.sqrt(2 / (width + config.intermediate_size))
    return config.init_std


@dataclass(frozen=True, kw_only=True)
class SiglipVision(VisionConfig):
    """The image encoder, ViT-B/16 without a class token by default."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: Activation = "gelu_tanh"
    pooling: Literal["class", "average", "attention"] = "average"
    """Always "average", which means that there is no class token; see ``PoolingHead``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling != "average":
            raise ranges.OutOfRange(
                f"model.vision.pooling is {self.pooling!r}, but SigLIP has no class token; leave "
                "it at 'average'"
            )

    def initial_std(self, name: str) -> float:
        return _initial_std(self, name)


@dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(SiglipVision):
    """The image encoder as a model of its own."""

    architecture: str = "SiglipVisionModel"

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """The head attends to all patches."""
        return (*_head_flops(grid), *super().flops_groups(grid))


@dataclass(frozen=True, kw_only=True)
class SiglipClassifierConfig(SiglipVision):
    """The image encoder with a classifier of the mean of all patches, without its own head."""

    architecture: str = "SiglipForImageClassification"


def _head_flops(grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
    inputs = [f"image_head/attention/{name}" for name in ("key", "value")]
    return tuple(FlopsGroup(path, grid[0] * grid[1]) for path in inputs)


@dataclass(frozen=True, kw_only=True)
class SiglipText(TextConfig):
    """The text encoder."""

    vocab_size: int = 32000
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int | None = 64
    activation: Activation = "gelu_tanh"
    pad_id: int = 1
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (1,)

    RANGES: ClassVar[ranges.Ranges] = {"bos_id": ranges.TOKEN_ID, "eos_ids": ranges.TOKEN_ID}

    def initial_std(self, name: str) -> float:
        return _initial_std(self, name)


@dataclass(frozen=True, kw_only=True)
class SiglipTextConfig(SiglipText):
    """The text encoder as a model of its own."""

    architecture: str = "SiglipTextModel"
    projection_size: int = 768
    """Width of the embeddings."""

    RANGES: ClassVar[ranges.Ranges] = {"projection_size": ranges.WIDTH}


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(SiglipText, ImageTextConfig):
    """The published SigLIP, base with patches of 16 pixels by default."""

    architecture: str = "SiglipModel"
    vision: VisionConfig = field(default_factory=SiglipVision)
    initial_logit_scale: float = math.log(FIRST_SCALE)

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """The head attends to all patches."""
        return (*_head_flops(grid), *super().flops_groups(grid))


def _size(
    layers: int, width: int, inner: int, heads: int, patch_size: int, image_size: int
) -> SiglipConfig:
    """Both encoders have the same sizes."""
    both: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "intermediate_size": inner,
    }
    vision = SiglipVision(patch_size=patch_size, image_size=image_size, **both)
    return SiglipConfig(vision=vision, **both)


SIZES: dict[str, SiglipConfig] = {
    "siglip-b16": _size(12, 768, 3072, 12, 16, 224),
    "siglip-b16-256": _size(12, 768, 3072, 12, 16, 256),
    "siglip-l16-256": _size(24, 1024, 4096, 16, 16, 256),
    "siglip-so400m14": _size(27, 1152, 4304, 16, 14, 224),
}
"""Published sizes; those with other image sizes differ in ``image_size`` alone."""


@dataclass(frozen=True, kw_only=True)
class _TextFields(huggingface.JsonFields[SiglipTextConfig]):
    """The config.json of the text encoder."""

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields, width = super().fields(config), config.get("projection_size")
        return fields | {"projection_size": fields["hidden_size"] if width is None else width}

    def write(self, config: SiglipTextConfig) -> dict[str, Any]:
        return super().write(config) | {"projection_size": config.projection_size}


_TEXT = _TextFields(
    defaults=SiglipTextConfig(),
    fixed={"model_type": "siglip_text_model"},
    numbers=TEXT_NUMBERS,
    special_ids=True,
)
_VISION = huggingface.JsonFields(
    defaults=SiglipVisionConfig(),
    fixed={"model_type": "siglip_vision_model", "vision_use_head": True},
    numbers=VISION_NUMBERS,
)


def from_huggingface(config: Mapping[str, Any]) -> SiglipConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    huggingface.refuse_values(config, {"model_type": "siglip"})
    text, vision = part_of(config, "text_config"), part_of(config, "vision_config")
    huggingface.refuse_values(vision, {"vision_use_head": True})
    fields = _TEXT.own_fields(text)
    fields["vision"] = huggingface.make_config(SiglipVision, _VISION.own_fields(vision))
    if text.get("projection_size") is not None:
        huggingface.refuse_values(text, {"projection_size": fields["vision"].hidden_size})
    return huggingface.make_config(SiglipConfig, fields)


def siglip_classifier_from_json(config: Mapping[str, Any]) -> SiglipClassifierConfig:
    """Read the config.json of a classifier, or of both encoders. Raises UserError for unsupported
    fields."""
    huggingface.refuse_values(config, {"model_type": "siglip"})
    fields = huggingface.common_fields(config, SiglipClassifierConfig())
    vision = part_of(config, "vision_config")
    head = vision.get("vision_use_head", True) is not False  # passed over if it is there
    huggingface.refuse_values(vision, {"vision_use_head": head})
    fields |= _VISION.own_fields(vision)
    return huggingface.make_config(SiglipClassifierConfig, fields)


def to_huggingface(config: SiglipConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    width = {"projection_size": config.vision.hidden_size}
    return {
        "model_type": "siglip",
        "architectures": [config.architecture],
        "text_config": _TEXT.own_json(config) | width,
        "vision_config": _VISION.own_json(config.vision),
    }


def siglip_classifier_to_json(config: SiglipClassifierConfig) -> dict[str, Any]:
    """The config.json of a classifier, which says that the encoder's own head is absent."""
    return {
        "model_type": "siglip",
        **huggingface.common_json(config),
        "vision_config": {**_VISION.own_json(config), "vision_use_head": False},
    }


def weights(config: TransformerConfig) -> WeightTable:
    """The names of SigLIP's tensors."""
    head, theirs = "image_head", "vision_model.head"
    inputs = tuple(f"{head}/attention/{name}" for name in ("query", "key", "value"))
    return WeightTable(
        weights=(
            *shared_weights(),
            *linear("text_head", "text_model.head", "D", "E"),
            Weight(f"{head}/probe/embedding", f"{theirs}.probe", "D->11D"),
            Weight(
                tuple(f"{name}/kernel" for name in inputs),
                f"{theirs}.attention.in_proj_weight",
                "DNH->(NH)D",
            ),
            Weight(
                tuple(f"{name}/bias" for name in inputs),
                f"{theirs}.attention.in_proj_bias",
                "NH->(NH)",
            ),
            *linear(f"{head}/attention/output", f"{theirs}.attention.out_proj", "NH", "D"),
            *norm(f"{head}/norm", f"{theirs}.layernorm"),
            *linear(f"{head}/mlp/up", f"{theirs}.mlp.fc1", "D", "F"),
            *linear(f"{head}/mlp/down", f"{theirs}.mlp.fc2", "F", "D"),
        ),
        ignorable=(POSITION_IDS,),
    )


def _classifier_weights(config: SiglipClassifierConfig) -> WeightTable:
    """The names of a classifier's tensors; files may hold the encoder's own head besides."""
    table = tower_weights(weights(config), "image")
    return replace(table, ignorable=(*table.ignorable, r"vision_model\.head\..*"))


FAMILY = Family(
    config=SiglipConfig,
    model_types=("siglip",),
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
        only_here=("SiglipTextForSequenceClassification",),
        wholes={"siglip": partial(part_of, name="text_config")},
    ),
    Family.of_table(
        _VISION,
        architectures={"SiglipVisionModel": SiglipVisionModel},
        weights=lambda config: tower_weights(weights(config), "image"),
        wholes={"siglip": partial(part_of, name="vision_config")},
    ),
    Family(
        config=SiglipClassifierConfig,
        model_types=("siglip",),
        architectures={"SiglipForImageClassification": VisionForClassification},
        from_huggingface=siglip_classifier_from_json,
        to_huggingface=siglip_classifier_to_json,
        weights=_classifier_weights,
        aliases=ALIASES,
    ),
)
"""The encoders as models of their own."""
