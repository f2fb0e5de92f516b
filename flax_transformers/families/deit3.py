"""DeiT III (Touvron, Cord and Jégou, arXiv:2204.07118): ViT with LayerScale and stochastic depth.

`transformers` has no such model: it is published for timm, whose tensor names and config.json are
those read and written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import vit
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, fused_linear, linear, norm
from flax_transformers.models.config import VisionConfig
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.vision import Positions, VisionBlock, VisionForClassification


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

    def feed_forward(self, x_BTD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, Any]:
        y_BTD, auxiliary = super().feed_forward(x_BTD, inputs)
        return LayerScale(self.config.layer_scale_init, name="mlp_layer_scale")(y_BTD), auxiliary


ARCHITECTURES: dict[str, type[nn.Module]] = {"DeiT3ForImageClassification": VisionForClassification}


@dataclass(frozen=True, kw_only=True)
class DeiT3Config(VisionConfig):
    """The published DeiT III, B/16 by default. The class token has no row among the positions."""

    architecture: str = "DeiT3ForImageClassification"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-6
    layer_scale_init: float = 1e-4
    """What LayerScale starts from."""

    RANGES: ClassVar[ranges.Ranges] = {"layer_scale_init": ranges.numbers(0, 1000)}

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

_OLDER = vit.VisionFields(
    defaults=DeiT3Config(),
    fixed={"model_type": "deit3"},
    numbers=vit.NUMBERS | {"drop_path": "drop_path_rate", "layer_scale_init": "layer_scale_init"},
)

_TIMM_SIZES = {"s": "small", "m": "medium", "b": "base", "l": "large", "h": "huge"}
_TIMM_NAME = re.compile(r"deit3_(small|medium|base|large|huge)_patch(\d+)_(\d+)(?:\..*)?")
_MODEL_ARGS = {
    "hidden_size": "embed_dim",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "layer_scale_init": "init_values",
    "drop_path": "drop_path_rate",
}
"""Numbers by our names, to the arguments of timm's ``VisionTransformer``."""
_OTHER_ARGS = {"img_size", "mlp_ratio", "qkv_bias", "no_embed_class", "num_classes"}


def from_huggingface(config: Mapping[str, Any]) -> DeiT3Config:
    """The configuration in timm's config.json, or in one of ours from before it was written so.

    Raises UserError for what we do not have.
    """
    if isinstance(config.get("architecture"), str):
        return huggingface.make_config(DeiT3Config, _read_timm(config))
    return _OLDER.read(config)


def _read_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json of timm: the size's name, and arguments that differ from it."""
    name = _TIMM_NAME.fullmatch(config["architecture"])
    if name is None:
        raise UserError(
            f"config.json is timm's, for {config['architecture']!r:.80}; of timm's models only "
            "those named deit3_SIZE_patchN_N are read"
        )
    letters = next(short for short, size in _TIMM_SIZES.items() if size == name[1])
    arguments = config.get("model_args") or {}
    unknown = sorted(set(arguments) - set(_MODEL_ARGS.values()) - _OTHER_ARGS)
    if unknown:
        raise UserError(f"config.json has model_args {', '.join(unknown)}, not supported here")
    huggingface.refuse_values(config, {"global_pool": "token"})
    huggingface.refuse_values(arguments, {"no_embed_class": True})
    size = DeiT3Config(patch_size=int(name[2]), **vit.dimensions(letters))
    fields: dict[str, Any] = huggingface.read_numbers(arguments, _MODEL_ARGS, size)
    fields |= huggingface.read_switches(arguments, {"qkv_bias": "qkv_bias"}, size)
    fields |= vit.read_image_size(arguments, "img_size", int(name[3]))
    ratio = arguments.get("mlp_ratio", 4)
    huggingface.require_number("mlp_ratio", ratio, whole=False)
    fields["intermediate_size"] = int(fields["hidden_size"] * ratio)
    labels = arguments.get("num_classes", config.get("num_classes", vit.IMAGENET_LABELS))
    names = config.get("label_names")
    described = {"id2label": names} if names else {"num_labels": labels}
    return fields | huggingface.common_fields(described, size)


def to_huggingface(config: DeiT3Config) -> dict[str, Any]:
    """The config.json that timm reads: the nearest published size, and what differs from it."""
    height, width = config.image_shape
    letters = next((k for k, (w, _) in vit.WIDTHS.items() if w == config.hidden_size), "b")
    letters = letters if letters in _TIMM_SIZES else "b"
    size = DeiT3Config(**vit.dimensions(letters))
    patch, side = (14, 224) if letters == "h" else (16, 384 if height == 384 else 224)
    published = {**huggingface.write_fields(size, _MODEL_ARGS), "patch_size": patch}
    published |= {"qkv_bias": True, "mlp_ratio": 4.0, "img_size": side}
    arguments = huggingface.write_fields(config, _MODEL_ARGS) | {
        "qkv_bias": config.qkv_bias,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "img_size": height if height == width else [height, width],
    }
    arguments = {name: value for name, value in arguments.items() if value != published[name]}
    return {
        "architecture": f"deit3_{_TIMM_SIZES[letters]}_patch{patch}_{side}",
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "token",
        **({"label_names": list(config.label_names)} if config.label_names else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": _PRETRAINED
        | {"input_size": [config.num_channels, height, width], "num_classes": config.num_labels},
    }


_PRETRAINED = {
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
"""What timm's config.json says of the images that the published models were trained on."""


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
    architectures=ARCHITECTURES,
    parts=ModelParts(block=DeiT3Block, positions=Positions),
    timm_prefix="deit3_",
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
