"""ViT (Dosovitskiy et al., arXiv:2010.11929): sizes, configuration and weight names.

DeiT and MAE are published in the same layout; their files use what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError
from flax_transformers.families._maps import BatchNorm, BatchNormConfig, Convolution
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, attention, linear, norm
from flax_transformers.models.config import ComputeConfig, FlopsGroup, QueryKeyNorm, VisionConfig
from flax_transformers.models.layers.block import LayerInputs, LayerOutput
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.models.layers.patches import patch_grid, resize_positions
from flax_transformers.models.layers.stack import Block, Stack, make_stack
from flax_transformers.models.parts import ModelParts
from flax_transformers.models.vision import (
    Positions,
    Vectors,
    VisionBlock,
    VisionForClassification,
    VisionWithPooler,
)
from flax_transformers.ranges import OutOfRange


class ParallelBlock(VisionBlock):
    """A layer ``x + attention(norm(x)) + mlp(norm(x))``, with one norm (arXiv:2302.05442)."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, rate: Any
    ) -> tuple[jax.Array, LayerOutput]:
        """As of ``VisionBlock``; a layer is skipped as a whole."""
        y_BTD = self.norm("attention")(x_BTD)
        attended_BTD, _ = self.self_attention(y_BTD, inputs, None)
        fed_BTD, _ = self.feed_forward(y_BTD, inputs)
        both_BTD = self.drop_path(attended_BTD + fed_BTD, rate)
        return self.residual("attention", x_BTD, both_BTD), LayerOutput()


def stack(config: ViTConfig, compute: ComputeConfig, block: Block) -> Stack:
    """Layers of ``block``, or parallel ones."""
    return make_stack(config, compute, ParallelBlock if config.parallel else block)


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ViTForImageClassification": VisionForClassification,
    "ViTModel": VisionWithPooler,
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """The published ViT: pre-norm, a class token, learned positions; ViT-B/16 by default.

    ``norm_eps`` is 1e-12 in the published config.json files and 1e-6 in big_vision. Pooling of
    patches, other positions and parallel layers exist in our own checkpoints only.
    """

    architecture: str = "ViTForImageClassification"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-12
    parallel: bool = False
    """Attention and feed-forward are side by side, behind one norm (ViT-22B, arXiv:2302.05442)."""
    norm_of_heads: bool = False
    """A norm of each query and key, with one scale for all heads (arXiv:2302.05442)."""
    stem: tuple[tuple[int, int], ...] = ()
    """Width and stride of each convolution of 3 x 3 pixels before the layers (arXiv:2106.14881), in
    our own checkpoints only; none: a linear map of patches. The strides make a patch."""
    batch_norm: BatchNormConfig = BatchNormConfig()  # noqa: RUF009 (frozen)
    """Of the convolutions."""
    rows_and_columns: bool = False
    """Learned positions are those of the row beside those of the column (appendix D.4), and the
    class token has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(one) != 2 or min(one) < 1 for one in self.stem) or (
            self.stem and math.prod(stride for _, stride in self.stem) != self.patch_size
        ):
            raise OutOfRange(
                f"model.stem is {self.stem}; it must be pairs of a width and a stride, and the "
                f"product of the strides model.patch_size {self.patch_size}"
            )
        if self.rows_and_columns and (self.positions != "learned" or self.hidden_size % 2):
            raise OutOfRange(
                "model.rows_and_columns needs learned model.positions and an even "
                f"model.hidden_size, not {self.positions!r} and {self.hidden_size}"
            )
        if self.parallel and self.norm_position == "post":
            raise OutOfRange("model.parallel needs model.norm_position 'pre'; set one of the two")

    @property
    def query_key_norm(self) -> QueryKeyNorm:
        return "shared" if self.norm_of_heads else "none"

    @property
    def token_positions(self) -> int:
        return 0 if self.rows_and_columns else super().token_positions

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        tokens, stem = math.prod(grid), []
        for i, (_, stride) in reversed(list(enumerate(self.stem))):
            stem.append(FlopsGroup(f"embeddings/patches/convolution_{i}/", tokens))
            tokens *= stride**2
        return (*stem, *super().flops_groups(grid))

    def position_grids(self) -> dict[tuple[str, str], tuple[int, int]]:
        rows, columns = self.grid
        of_halves = {("rows", "embedding"): (rows, 1), ("columns", "embedding"): (columns, 1)}
        return of_halves if self.rows_and_columns else super().position_grids()


class ConvolutionStem(nn.Module):
    """Convolutions with batch norm and ReLU, and a linear map (arXiv:2106.14881 §4)."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Vectors [B, T, D] of images [B, C, height, width], whose edges are cut to whole
        patches."""
        c, width = self.config, self.config.num_channels
        rows, columns = patch_grid(pixel_values.shape[2:], c.patch_size)
        x_BHWD = pixel_values[:, :, : rows * c.patch_size, : columns * c.patch_size]
        x_BHWD = x_BHWD.transpose(0, 2, 3, 1)
        for i, (wider, stride) in enumerate(c.stem):
            conv = Convolution(
                width, wider, stride, self.dtype, from_pixels=i == 0, name=f"convolution_{i}"
            )
            batch_norm = BatchNorm(c.batch_norm, STEM_EPS, self.dtype, name=f"norm_{i}")
            x_BHWD = nn.relu(batch_norm(conv(x_BHWD), deterministic=deterministic))
            width = wider
        x_BTD = x_BHWD.reshape(len(x_BHWD), rows * columns, width)
        return Linear(
            "BTC,CD->BTD",
            (width, c.hidden_size),
            ("features", "embed"),
            dtype=self.dtype,
            use_bias=c.patch_bias,
            init_std=width**-0.5,
            name="patches",
        )(x_BTD)


STEM_EPS = 1e-5  # of the batch norms


def stem(config: ViTConfig, dtype: jnp.dtype) -> nn.Module | None:
    """A stem of convolutions, or None for the linear map of patches."""
    return ConvolutionStem(config, dtype) if config.stem else None


class RowsAndColumns(nn.Module):
    """Positions of which one half is learned for each row and the other for each column."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> jax.Array:
        c = self.config
        (rows, columns), half = c.grid, c.hidden_size // 2
        axes, start = ("positions", "embed"), truncated_normal(c.init_std)
        table = partial(Vectors, axes=axes, start=start, dtype=jnp.dtype(jnp.float32))
        row_RD = table((rows, half), name="rows")()
        column_CD = table((columns, half), name="columns")()
        both = (jnp.repeat(row_RD, columns, axis=0), jnp.tile(column_CD, (rows, 1)))
        position_TD = jnp.concatenate(both, axis=1)
        return resize_positions(position_TD, c.grid, grid).astype(self.dtype)


def positions(config: ViTConfig, dtype: jnp.dtype) -> nn.Module:
    """Positions of rows and columns, or one table."""
    return RowsAndColumns(config, dtype) if config.rows_and_columns else Positions(config, dtype)


WIDTHS = {
    "ti": (192, 12),
    "s": (384, 12),
    "m": (512, 12),
    "b": (768, 12),
    "l": (1024, 24),
    "h": (1280, 32),
}
"""Model width and number of layers by the letters that papers use (arXiv:2012.12877 for the first
two, arXiv:2204.07118 for "m")."""


def dimensions(letters: str) -> dict[str, Any]:
    """Heads are 64 wide, but 80 in "h", and the feed-forward four times the model."""
    width, layers = WIDTHS[letters]
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": width // (80 if letters == "h" else 64),
        "intermediate_size": 4 * width,
    }


def size_name(family: str, letters: str, patch_size: int, image_size: int) -> str:
    """Such as "vit-b16" and, at another resolution than 224, "vit-b16-384"."""
    return f"{family}-{letters}{patch_size}" + (f"-{image_size}" if image_size != 224 else "")


IMAGENET_LABELS = 1000

SIZES: dict[str, ViTConfig] = {
    size_name("vit", letters, patch_size, image_size): ViTConfig(
        patch_size=patch_size,
        image_size=image_size,
        num_labels=IMAGENET_LABELS,
        **dimensions(letters),
    )
    for letters, patch_size, image_size in (
        ("ti", 16, 224),  # this one to vit-s32: arXiv:2106.10270
        ("ti", 16, 384),
        ("s", 16, 224),
        ("s", 16, 384),
        ("s", 32, 224),
        ("s", 32, 384),
        ("b", 16, 224),
        ("b", 16, 384),
        ("b", 32, 224),
        ("b", 32, 384),
        ("l", 16, 224),
        ("l", 16, 384),
        ("l", 32, 384),
        ("h", 14, 224),
    )
}
"""The published sizes, with ImageNet's labels."""

VIT_22B = ViTConfig(
    hidden_size=6144,
    num_layers=48,
    num_heads=48,
    intermediate_size=24576,
    patch_size=14,
    num_labels=IMAGENET_LABELS,
    norm="rms",
    norm_eps=1e-6,
    qkv_bias=False,
    parallel=True,
    norm_of_heads=True,
    pooling="attention",
)
"""ViT-22B (arXiv:2302.05442), of which no weights are published."""

_DEEP_STEM = ((64, 2), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
SIZES |= {
    f"vitc-{name}": ViTConfig(
        stem=stem,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        intermediate_size=ratio * width,
        norm_eps=1e-6,
        num_labels=IMAGENET_LABELS,
    )
    for name, stem, width, layers, ratio in (
        ("1gf", ((24, 2), (48, 2), (96, 2), (192, 2)), 192, 11, 3),
        ("4gf", ((48, 2), (96, 2), (192, 2), (384, 2)), 384, 11, 3),
        ("18gf", _DEEP_STEM, 768, 11, 4),
        ("36gf", _DEEP_STEM, 1024, 13, 4),
    )
}
"""Those with a stem of convolutions in place of one layer (arXiv:2106.14881, table 3)."""

NUMBERS = huggingface.SIZE_NUMBERS | {
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
    "num_channels": "num_channels",
}


V = TypeVar("V", bound=VisionConfig)


@dataclass(frozen=True, kw_only=True)
class VisionFields(huggingface.JsonFields[V]):
    """The config.json of ViT, DeiT and MAE."""

    numbers: Mapping[str, str] = field(default_factory=lambda: NUMBERS)
    switches: Mapping[str, str] = field(default_factory=lambda: {"qkv_bias": "qkv_bias"})

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(config)
        fields |= huggingface.read_numbers(config, {"head_dim": "head_dim"}, self.defaults)
        fields |= read_image_size(config, "image_size", self.defaults.image_size)
        patch_height, patch_width = _pair(config, "patch_size", self.defaults.patch_size)
        if patch_height != patch_width:
            raise UserError(
                f"config.json has patch_size {config['patch_size']!r}, which is not supported; "
                "only square patches are"
            )
        fields["patch_size"] = patch_height
        huggingface.refuse_values(config, {"pooler_act": "tanh"})
        if config.get("pooler_output_size") is not None:
            huggingface.refuse_values(config, {"pooler_output_size": fields["hidden_size"]})
        return fields

    def write(self, config: VisionConfig) -> dict[str, Any]:
        size = config.image_size
        return {
            **super().write(config),
            "image_size": size if isinstance(size, int) else list(size),
            "patch_size": config.patch_size,
            **({} if config.head_dim is None else {"head_dim": config.head_dim}),
        }


def read_image_size(config: Mapping[str, Any], name: str, default: Any) -> dict[str, Any]:
    """The field ``image_size``: a number, or height and width."""
    height, width = _pair(config, name, default)
    return {"image_size": height if height == width else (height, width)}


def _pair(config: Mapping[str, Any], name: str, default: Any) -> tuple[int, int]:
    value = config.get(name, default)
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
        raise UserError(f"config.json has {name} {value!r}; it must be a number, or two of them")
    return pair


JSON = VisionFields(defaults=ViTConfig(), fixed={"model_type": "vit"})


def embedding_weights(theirs: str) -> tuple[Weight, ...]:
    """The class token, positions and patches."""
    return (
        Weight("embeddings/class_token/embedding", f"{theirs}.cls_token", "D->11D"),
        Weight("embeddings/position/embedding", f"{theirs}.position_embeddings", "TD->1TD"),
        *patch_weights(f"{theirs}.patch_embeddings.projection"),
    )


def patch_weights(theirs: str) -> tuple[Weight, Weight]:
    """The map of patches, elsewhere a convolution."""
    return (
        Weight("embeddings/patches/kernel", f"{theirs}.weight", "CPQD->DCPQ"),
        Weight("embeddings/patches/bias", f"{theirs}.bias"),
    )


def layer_weights(stack: str, theirs: str) -> tuple[Weight, ...]:
    """The layers of ``stack``, which they call ``theirs`` and a number."""
    ours, theirs = f"{stack}/{{layer}}", f"{theirs}.{{layer}}"
    return (
        *norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
        *attention(
            f"{ours}/attention",
            f"{theirs}.attention",
            "attention.query attention.key attention.value output.dense",
        ),
        *norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
        *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense", "D", "F"),
        *linear(f"{ours}/mlp/down", f"{theirs}.output.dense", "F", "D"),
    )


RENAMES = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""From the names in memory of transformers 5 (``state_dict``) to those that it saves."""


def weights(config: ViTConfig) -> WeightTable:
    """The names of ViT's tensors."""
    table = WeightTable(
        weights=(
            *embedding_weights("vit.embeddings"),
            *layer_weights("stack", "vit.encoder.layer"),
            *norm("final_norm", "vit.layernorm"),
            *linear("pooler/dense", "vit.pooler.dense", "D", "E"),
            *linear("classification_head", "classifier", "D", "C"),
        ),
        renames=RENAMES,
        # The pooler that files of the first release carry beside a classifier.
        ignorable=(r"vit\.pooler\.dense\.(weight|bias)",),
        prefix="vit.",
    )
    return table.bare() if config.architecture == "ViTModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    parts=ModelParts(block=VisionBlock, stack=stack, positions=positions, stem=stem),
    sizes=SIZES,
    weights=weights,
)
