"""DeiT III (Touvron, Cord and Jégou, arXiv:2204.07118): ViT with LayerScale and stochastic depth.

`transformers` has no such model. The weights are published under the names of timm, which are those
of the table here; the config.json is one of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.families import huggingface, vit
from flax_transformers.families.family import Family
from flax_transformers.families.weights import Weight, WeightTable, fused_linear, linear, norm
from flax_transformers.models.attention import KeyValues
from flax_transformers.models.block import LayerInputs, TransformerBlock
from flax_transformers.models.vision import VisionBlock, VisionConfig, VisionForClassification
from flax_transformers.ranges import Ranges


class LayerScale(nn.Module):
    """Multiplies each feature with a learned number that starts small (arXiv:2103.17239 §2.1)."""

    start: float

    @nn.compact
    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.start), ("norm",))
        scale_D = self.param("scale", init, y_BTD.shape[-1:], jnp.float32)
        return y_BTD * scale_D[None, None, :].astype(y_BTD.dtype)


class DeiT3Block(VisionBlock):
    """The layer of a ViT, with LayerScale on what each sub-layer adds."""

    config: DeiT3Config

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        y_BTD, seen = super().self_attention(x_BTD, inputs, cache)
        return LayerScale(self.config.layer_scale_init, name="attention_layer_scale")(y_BTD), seen

    def feed_forward(self, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        y_BTD, auxiliary = super().feed_forward(x_BTD)
        return LayerScale(self.config.layer_scale_init, name="mlp_layer_scale")(y_BTD), auxiliary


ARCHITECTURES: dict[str, type[nn.Module]] = {"DeiT3ForImageClassification": VisionForClassification}


@dataclass(frozen=True, kw_only=True)
class DeiT3Config(VisionConfig):
    """The published DeiT III, B/16 by default. The class token has no row among the positions."""

    architectures = ARCHITECTURES
    architecture: str = "DeiT3ForImageClassification"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-6
    layer_scale_init: float = 1e-4
    """What LayerScale starts from."""

    RANGES: ClassVar[Ranges] = {"layer_scale_init": ranges.numbers(0, 1000)}

    @property
    def block(self) -> type[TransformerBlock]:
        return DeiT3Block

    @property
    def token_positions(self) -> int:
        return 0

    def drop_path_rates(self) -> np.ndarray:
        """The same rate in every layer."""
        return np.full(self.num_layers, self.drop_path, np.float32)


SIZES: dict[str, DeiT3Config] = {
    vit.size_name("deit3", letters, patch_size, image_size): DeiT3Config(
        patch_size=patch_size,
        image_size=image_size,
        num_labels=vit.IMAGENET_LABELS,
        **vit.dimensions(letters),
    )
    for letters, patch_size, image_size in (
        ("s", 16, 224),
        ("s", 16, 384),
        ("m", 16, 224),
        ("b", 16, 224),
        ("b", 16, 384),
        ("l", 16, 224),
        ("l", 16, 384),
        ("h", 14, 224),
    )
}
"""The published sizes, with ImageNet's labels."""

_NUMBERS = vit.NUMBERS | {"drop_path": "drop_path_rate", "layer_scale_init": "layer_scale_init"}


def from_huggingface(config: Mapping[str, Any]) -> DeiT3Config:
    """The configuration in a config.json. Raises UserError for what we do not have."""
    huggingface.refuse(config, {"model_type": "deit3"})
    fields = vit.read_vision(config, _NUMBERS, DeiT3Config())
    return huggingface.make_config(DeiT3Config, fields)


def to_huggingface(config: DeiT3Config) -> dict[str, Any]:
    """The config.json that ``from_huggingface`` reads."""
    return {"model_type": "deit3", **vit.write_vision(config, _NUMBERS)}


def weights(config: DeiT3Config) -> WeightTable:
    """The names of timm's ``VisionTransformer``, as DeiT III is published."""
    ours, theirs = "stack/{layer}", "blocks.{layer}"
    qkv = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
    return WeightTable(
        weights=(
            Weight("embeddings/class_token/embedding", "cls_token", "D->11D"),
            Weight("embeddings/position/embedding", "pos_embed", "TD->1TD"),
            *vit.patch_weights("patch_embed.proj"),
            *norm(f"{ours}/attention_norm", f"{theirs}.norm1"),
            *fused_linear(qkv, f"{theirs}.attn.qkv", "D", "NH"),
            *linear(f"{ours}/attention/output", f"{theirs}.attn.proj", "NH", "D"),
            Weight(f"{ours}/attention_layer_scale/scale", f"{theirs}.ls1.gamma"),
            *norm(f"{ours}/mlp_norm", f"{theirs}.norm2"),
            *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", "D", "F"),
            *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", "F", "D"),
            Weight(f"{ours}/mlp_layer_scale/scale", f"{theirs}.ls2.gamma"),
            *norm("final_norm", "norm"),
            *linear("classification_head", "head", "D", "C"),
        ),
        # The names of the authors' own release.
        renames=((r"\.gamma_([12])$", r".ls\1.gamma"),),
    )


FAMILY = Family(
    config=DeiT3Config,
    model_types=("deit3",),
    architectures=tuple(ARCHITECTURES),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
