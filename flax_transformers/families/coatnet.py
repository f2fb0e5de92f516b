"""CoAtNet (Dai et al., arXiv:2106.04803): two stages of convolutions, two of relative attention.

The models of the paper were not published. timm has two layouts, whose tensor names and config.json
are those read and written here: "coatnet_0_224" to "coatnet_5_224" follow the paper, and
"coatnet_0_rw_224" and its relatives, which were trained and published, differ in details that are
fields of the config.

Shape letters: B batch, H and W rows and columns of the map of features, T = H * W, D width, F
expanded width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import vit
from flax_transformers.families._maps import (
    BatchNorm,
    BatchNormConfig,
    Convolution,
    Depthwise,
    RelativeAttention,
    Shortcut,
    SqueezeExcite,
    StageStack,
    average_pool,
    fan_out_std,
    in_line,
)
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import ComputeConfig, FlopsGroup, VisionConfig
from flax_transformers.models.heads import label_layer
from flax_transformers.models.kernels.dropout import drop_path
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.layers.block import LayerInputs, LayerOutput
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.linear import Linear
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.stack import Block
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.models.vision import VisionBlock, VisionModel
from flax_transformers.parallel.partitioning import HIDDEN, constrain

STAGES = 4
CONVOLUTIONS = 2  # stages, before those of attention: the layout C-C-T-T of the paper
EXPANSION = 4  # of the inner width of convolutions and feed-forward layers
SQUEEZE = 4  # what squeeze-excite divides the width by


@dataclass(frozen=True, kw_only=True)
class CoAtNetConfig(VisionConfig):
    """The layout of the paper, CoAtNet-0 by default (table 3 of arXiv:2106.04803)."""

    architecture: str = "CoAtNetForImageClassification"
    stem_widths: tuple[int, ...] = (64, 64)
    """Widths of the two convolutions of the stem."""
    stage_widths: tuple[int, ...] = (96, 192, 384, 768)
    stage_depths: tuple[int, ...] = (2, 3, 5, 2)
    """Width and number of layers of each stage."""
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    """Strides of the stem and of the first layer of each stage, 1 or 2; timm has only 2."""
    head_dim: int | None = 32
    pooling: Literal["class", "average"] = "average"
    batch_norm: BatchNormConfig = BatchNormConfig()  # noqa: RUF009 (frozen)
    batch_norm_eps: float = 1e-5
    convolution_activation: Literal["gelu", "silu"] = "gelu"
    input_activation: bool = False
    """Whether a layer of convolutions has an activation after its first norm."""
    expand_input: bool = False
    """Whether the inner width of a stage's first layer, and that of its attention, follows the
    width of its input instead of its output."""
    pool_first: bool = False
    """Whether the first layer of a stage of convolutions halves the map by pooling before its
    convolutions, instead of by the stride of the depthwise one."""
    squeeze_first: bool = False
    """Whether squeeze-excite comes before the norm of the depthwise convolution."""
    squeeze_activation: Literal["relu", "silu"] = "silu"
    convolution_bias: bool = True
    """Bias vectors of the last convolution of a layer, and of its shortcut."""
    shortcut_bias: bool = True
    """Bias vector of the shortcut of the first layer of a stage of attention."""
    hidden_head: bool = True
    """Whether the classifier has a hidden layer, and the final norm comes after the pooling."""

    if TYPE_CHECKING:
        hidden_size: int = 0
        num_layers: int = 0
        num_heads: int = 0
        intermediate_size: int = 0
        patch_size: int = 0
    else:  # no fields: they follow from those above, and are of the last stage
        hidden_size: ClassVar = property(lambda self: self.stage_widths[-1])
        num_layers: ClassVar = property(lambda self: sum(self.stage_depths))
        num_heads: ClassVar = property(lambda self: self.heads(STAGES - 1))
        intermediate_size: ClassVar = property(lambda self: EXPANSION * self.hidden_size)
        patch_size: ClassVar = property(lambda self: math.prod(self.strides))

    RANGES: ClassVar[ranges.Ranges] = {
        "stem_widths": ranges.WIDTH,
        "stage_widths": ranges.WIDTH,
        "stage_depths": ranges.LAYERS,
        "strides": ranges.integers(1, 2),
        "batch_norm_eps": ranges.SHARE,
    }

    def __post_init__(self) -> None:
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", 32)  # in every size of the paper
        ranges.check_fields(self, "model")
        lengths = {"stem_widths": 2, "stage_widths": 4, "stage_depths": 4, "strides": 5}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ranges.OutOfRange(
                    f"model.{name} is {getattr(self, name)}; it must have {length}"
                )
        for stage in range(CONVOLUTIONS, STAGES):
            if self.attention_width_of(stage) % self.head_width:
                raise ranges.OutOfRange(
                    f"model.stage_widths is {self.stage_widths}, but the heads of attention are "
                    f"model.head_dim {self.head_width} wide; choose multiples of it"
                )
        if any(side % self.patch_size for side in self.image_shape):
            raise ranges.OutOfRange(
                f"model.image_size is {self.image_size}, which model.strides do not divide; it "
                f"must be a multiple of {self.patch_size}"
            )
        if self.pooling != "average" or self.positions != "learned":
            raise ranges.OutOfRange("CoAtNet has model.pooling average and model.positions learned")
        super().__post_init__()

    def input_width(self, stage: int) -> int:
        """Width of what a stage reads."""
        return self.stage_widths[stage - 1] if stage else self.stem_widths[-1]

    def attention_width_of(self, stage: int) -> int:
        """Number of heads times head width of the first layer of a stage of attention."""
        return self.input_width(stage) if self.expand_input else self.stage_widths[stage]

    def heads(self, stage: int) -> int:
        """Number of heads of the layers of a stage but the first."""
        return self.stage_widths[stage] // self.head_width

    def map_shape(self, stage: int) -> tuple[int, int]:
        """Rows and columns of the map that a stage makes; that of the stem is ``map_shape(-1)``."""
        stride = math.prod(self.strides[: stage + 2])
        height, width = self.image_shape
        return height // stride, width // stride

    def position_grids(self) -> dict[tuple[str, str], tuple[int, int]]:
        raise UserError(
            "the tables of relative positions of CoAtNet are not resized; train it at the size of "
            f"its images, {self.image_shape[0]} x {self.image_shape[1]}"
        )

    def stage_config(self, stage: int, *, first: bool = False) -> VisionConfig:
        """The config of one layer of a stage of attention, ``first`` or another."""
        width = self.stage_widths[stage]
        inner = self.attention_width_of(stage) if first else width
        return VisionConfig(
            hidden_size=width,
            num_layers=self.num_layers,
            num_heads=inner // self.head_width,
            head_dim=self.head_width,
            intermediate_size=EXPANSION * width,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_bias=self.norm_bias,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            mlp_bias=self.mlp_bias,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            init_std=self.init_std,
        )

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """Positions of the maps that the kernels below a path work on."""
        tokens = [
            math.prod(grid) * math.prod(self.strides[k + 2 :]) ** 2 for k in range(-1, STAGES)
        ]
        groups = [FlopsGroup("stem", tokens[0])]
        for stage in range(STAGES):
            path, own = f"stage_{stage}", tokens[stage + 1]
            if stage < CONVOLUTIONS:
                before = own if self.pool_first else tokens[stage]
                groups += [
                    FlopsGroup(f"{path}/{p}/block_0/squeeze", 1) for p in ("first", "layers")
                ]
                groups += [FlopsGroup(f"{path}/first/block_0/expand/", before)]
                groups += [FlopsGroup(path, own)]
            else:
                width = self.attention_width_of(stage)
                width += (self.stage_depths[stage] - 1) * self.heads(stage) * self.head_width
                groups += [FlopsGroup(path, own, width)]
        return (*groups, FlopsGroup("", 1))


def _inner_width(width: int) -> int:
    """Expanded, and rounded to a multiple of 8 as in timm."""
    return 8 * ((EXPANSION * width + 4) // 8)


class ConvolutionBlock(nn.Module):
    """An inverted bottleneck (MBConv, arXiv:1801.04381) behind a norm, with squeeze-excite."""

    config: CoAtNetConfig
    compute: ComputeConfig
    stage: int
    first: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x_BHWD: jax.Array, inputs: LayerInputs, rate: Any
    ) -> tuple[jax.Array, LayerOutput]:
        """``rate``: this layer's skip probability, a float32 scalar, or None to skip nothing."""
        del inputs
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        act = ACTIVATIONS[c.convolution_activation]
        ins, outs = x_BHWD.shape[-1], c.stage_widths[self.stage]
        stride = c.strides[self.stage + 1] if self.first else 1
        inner = _inner_width(ins if c.expand_input else outs)
        linear = partial(Linear, "BHWD,DF->BHWF", dtype=dtype)
        normed = partial(self._norm, dtype)
        shortcut = Shortcut(outs, stride, c.convolution_bias, dtype, name="shortcut")(x_BHWD)
        y_BHWD = normed("pre_norm", x_BHWD)
        if c.input_activation:
            y_BHWD = act(y_BHWD)
        if c.pool_first:
            y_BHWD, stride = average_pool(y_BHWD, stride), 1
        expand = linear(
            (ins, inner), ("embed", "mlp"), use_bias=False, init_std=fan_out_std(inner),
            name="expand",
        )  # fmt: skip
        y_BHWF = act(normed("expand_norm", expand(y_BHWD)))
        y_BHWF = Depthwise(inner, stride, dtype, name="depthwise")(y_BHWF)
        # SE's width follows the output, or the inner width where that follows the input.
        inside = (inner if c.expand_input else outs) // SQUEEZE
        squeeze = SqueezeExcite(inside, c.squeeze_activation, dtype, name="squeeze")
        y_BHWF = squeeze(y_BHWF) if c.squeeze_first else y_BHWF
        y_BHWF = act(normed("depthwise_norm", y_BHWF))
        y_BHWF = y_BHWF if c.squeeze_first else squeeze(y_BHWF)
        project = linear(
            (inner, outs), ("mlp", "embed"), use_bias=c.convolution_bias,
            init_std=fan_out_std(outs), name="project",
        )  # fmt: skip
        y_BHWD = project(y_BHWF)
        if rate is not None:
            key = self.make_rng("dropout")
            y_BHWD = drop_path(y_BHWD, rate, key, self.compute.dropout_generator)
        return constrain(shortcut + y_BHWD, MAP), LayerOutput()

    def _norm(self, dtype: jnp.dtype, name: str, x: jax.Array) -> jax.Array:
        c = self.config
        batch_norm = BatchNorm(c.batch_norm, c.batch_norm_eps, dtype, name=name)
        return batch_norm(x, deterministic=self.deterministic)


MAP = ("batch", None, None, "features")


class AttentionBlock(VisionBlock):
    """The pre-norm layer of a ViT with relative attention; the first of a stage also pools."""

    grid: tuple[int, int] = (1, 1)
    stride: int | None = None
    """That of the first layer, which reads a map; None for the others."""
    shortcut_bias: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, rate: Any
    ) -> tuple[jax.Array, LayerOutput]:
        """[B, T, D] to [B, T, D], or the map [B, H, W, D] that the first layer reads."""
        c = self.config
        if self.stride is None:
            y_BTD, x_BTD = self.norm("attention")(x), x
        else:
            shortcut = Shortcut(
                c.hidden_size, self.stride, self.shortcut_bias, self.dtype, name="shortcut"
            )
            y_BTD = in_line(average_pool(self.norm("entry")(x), self.stride))
            x_BTD = in_line(shortcut(x))
        y_BTD, _ = self.self_attention(y_BTD, inputs, None)
        x_BTD = self.residual("attention", x_BTD, self.drop_path(y_BTD, rate))
        y_BTD, _ = self.feed_forward(self.norm("mlp")(x_BTD), inputs)
        return self.residual("mlp", x_BTD, self.drop_path(y_BTD, rate)), LayerOutput()

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, Any]:
        attention = RelativeAttention(
            self.config, self.compute, self.grid, self.deterministic, name="attention"
        )
        return attention(x_BTD), None


def make_stage(config: CoAtNetConfig, compute: ComputeConfig, stage: int) -> StageStack:
    """One of the four stages."""
    if stage < CONVOLUTIONS:
        block: Block = partial(ConvolutionBlock, config, compute, stage)
        first: Block = partial(block, first=True)
    else:
        grid = config.map_shape(stage)
        block = partial(AttentionBlock, config.stage_config(stage), compute, grid=grid)
        first = partial(
            AttentionBlock,
            config.stage_config(stage, first=True),
            compute,
            grid=grid,
            stride=config.strides[stage + 1],
            shortcut_bias=config.shortcut_bias,
        )
    return StageStack(
        pattern=(block,),
        repeats=config.stage_depths[stage] - 1,
        first=(first,),
        scan=compute.scan_layers,
        remat=compute.remat,
    )


class Stem(nn.Module):
    """Two convolutions of 3 x 3 pixels, the first with a stride."""

    config: CoAtNetConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, deterministic: bool) -> jax.Array:
        c = self.config
        first, second = c.stem_widths
        conv = partial(Convolution, dtype=self.dtype)
        x_BHWD = conv(c.num_channels, first, c.strides[0], from_pixels=True, name="conv1")(x_BHWC)
        batch_norm = BatchNorm(c.batch_norm, c.batch_norm_eps, self.dtype, name="norm")
        x_BHWD = batch_norm(x_BHWD, deterministic=deterministic)
        x_BHWD = ACTIVATIONS[c.convolution_activation](x_BHWD)
        return conv(first, second, 1, name="conv2")(x_BHWD)


class CoAtNetModel(VisionModel):
    """Stem and stages, without a head."""

    config: CoAtNetConfig

    def setup(self) -> None:
        c = self.config
        self.stem = Stem(c, self.dtype)
        for stage in range(STAGES):
            setattr(self, f"stage_{stage}", make_stage(c, self.compute, stage))
        self.final_norm = make_norm(c, self.dtype)

    def hidden_states(
        self,
        pixel_values: jax.Array,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> HiddenStates:
        """Hidden states [B, T, D] of the last map, row by row; see ``VisionModel``.

        With ``hidden_head`` the final norm belongs to the head, and these are before it.
        """
        c = self.config
        if pixel_values.shape[1:] != (c.num_channels, *c.image_shape):
            raise UserError(
                f"pixel_values have shape {list(pixel_values.shape)}; they must be [batch, "
                f"{c.num_channels}, {c.image_shape[0]}, {c.image_shape[1]}], as the tables of "
                "relative positions are not resized"
            )
        x = self.stem(pixel_values.transpose(0, 2, 3, 1), deterministic=deterministic)
        rates = None if deterministic or not c.drop_path else jnp.asarray(c.drop_path_rates())
        for stage, depth in enumerate(c.stage_depths):
            x = x.reshape(len(x), *c.map_shape(stage - 1), -1)
            start = sum(c.stage_depths[:stage])
            own = None if rates is None else rates[start : start + depth]
            layers = getattr(self, f"stage_{stage}")
            x, _ = layers(x, LayerInputs(), own, deterministic=deterministic)
        x_BTD = constrain(x, HIDDEN)
        return HiddenStates(x_BTD if c.hidden_head else self.final_norm(x_BTD))


class CoAtNetForImageClassification(CoAtNetModel):
    """Labels each image."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        if c.hidden_head:
            self.head_hidden = Linear(
                "BTD,DE->BTE",
                (c.hidden_size, c.hidden_size),
                ("embed", "mlp"),
                dtype=self.dtype,
                init_std=c.init_std,
            )
        self.classification_head = label_layer(c, self.dtype, c.num_labels)
        self.head_dropout = Dropout(c.head_dropout, self.compute.dropout_generator)

    def classify(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, labels] of hidden states [B, T, D]."""
        pooled_B1D = hidden_BTD.mean(axis=1, dtype=jnp.float32, keepdims=True)
        pooled_B1D = pooled_B1D.astype(hidden_BTD.dtype)
        if self.config.hidden_head:
            pooled_B1D = jnp.tanh(self.head_hidden(self.final_norm(pooled_B1D)))
        pooled_B1D = self.head_dropout(pooled_B1D, deterministic=deterministic)
        return self.classification_head(pooled_B1D)[:, 0].astype(jnp.float32)

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        return {"logits": self.classify(hidden_BTD, deterministic=deterministic)}


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "CoAtNetForImageClassification": CoAtNetForImageClassification
}

_PAPER = {  # widths of the stem, widths and depths of the stages: table 3 and appendix A.1
    "0": (64, (96, 192, 384, 768), (2, 3, 5, 2)),
    "1": (64, (96, 192, 384, 768), (2, 6, 14, 2)),
    "2": (128, (128, 256, 512, 1024), (2, 6, 14, 2)),
    "3": (192, (192, 384, 768, 1536), (2, 6, 14, 2)),
    "4": (192, (192, 384, 768, 1536), (2, 12, 28, 2)),
    "5": (192, (256, 512, 1280, 2048), (2, 12, 28, 2)),
}
_TRAINED: dict[str, Any] = {
    "convolution_activation": "silu",
    "expand_input": True,
    "hidden_head": False,
}
_FIRST_TRAINED = _TRAINED | {
    "stem_widths": (32, 64),
    "input_activation": True,
    "squeeze_first": True,
    "squeeze_activation": "relu",
    "convolution_bias": False,
    "shortcut_bias": False,
}
_NARROW: dict[str, Any] = {"stem_widths": (32, 64), "stage_widths": (64, 128, 256, 512)}
_TIMM: dict[str, dict[str, Any]] = {
    "pico": _TRAINED | _NARROW,
    "nano": _TRAINED | _NARROW | {"stage_depths": (3, 4, 6, 3), "pool_first": True},
    "0": _FIRST_TRAINED | {"stage_depths": (2, 3, 7, 2), "pool_first": True},
    "1": _FIRST_TRAINED | {"stage_depths": (2, 6, 14, 2)},
    "2": _FIRST_TRAINED
    | {
        "stem_widths": (64, 128),
        "stage_widths": (128, 256, 512, 1024),
        "stage_depths": (2, 6, 14, 2),
        "squeeze_first": False,
        "squeeze_activation": "silu",
        "shortcut_bias": True,
    },
}
"""The models named coatnet_SIZE_rw_224, with the fields in which they differ from the paper's."""

SIZES: dict[str, CoAtNetConfig] = {
    f"coatnet-{name}": CoAtNetConfig(
        stem_widths=(stem, stem),
        stage_widths=widths,
        stage_depths=depths,
        num_labels=vit.IMAGENET_LABELS,
    )
    for name, (stem, widths, depths) in _PAPER.items()
} | {
    f"coatnet-{name}-rw": CoAtNetConfig(num_labels=vit.IMAGENET_LABELS, **fields)
    for name, fields in _TIMM.items()
}
"""The sizes of the paper, and those that timm trained, with ImageNet's labels."""

_TIMM_NAME = re.compile(r"coatnet_(\w+?)_224(?:\..*)?")

_VALUES = {
    "convolution_activation": "conv_act_layer",
    "input_activation": "conv_pre_norm_act",
    "squeeze_first": "conv_attn_early",
    "squeeze_activation": "conv_attn_act_layer",
    "convolution_bias": "conv_output_bias",
    "shortcut_bias": "transformer_shortcut_bias",
    "head_width": "transformer_dim_head",
    "qkv_bias": "transformer_attn_bias",
    "norm_eps": "transformer_norm_eps",
    "batch_norm_eps": "conv_norm_eps",
    "num_channels": "in_chans",
    "drop_path": "drop_path_rate",
}
"""Numbers, names and switches by our names, to the arguments of timm's ``MaxxVit``."""
_TUPLES = {"stage_widths": "embed_dim", "stage_depths": "depths", "stem_widths": "stem_width"}


def _arguments(config: CoAtNetConfig) -> dict[str, Any]:
    """The arguments of timm's ``MaxxVit``."""
    height, width = config.image_shape
    return {
        **huggingface.write_fields(config, _VALUES),
        **{theirs: list(getattr(config, ours)) for ours, theirs in _TUPLES.items()},
        "conv_expand_output": not config.expand_input,
        "transformer_expand_first": not config.expand_input,
        "conv_stride_mode": "pool" if config.pool_first else "dw",
        "head_hidden_size": config.hidden_size if config.hidden_head else None,
        "img_size": height if height == width else [height, width],
    }


def to_huggingface(config: CoAtNetConfig) -> dict[str, Any]:
    """The config.json that timm reads: the nearest published size, and what differs from it."""
    if set(config.strides) != {2}:
        raise UserError(
            f"model.strides is {config.strides}, and timm's CoAtNet halves the map in its stem and "
            "in every stage; keep this model in our own checkpoint format"
        )
    arguments = _arguments(config)

    def differing(size: str) -> dict[str, Any]:
        published = _arguments(SIZES[size])
        return {name: value for name, value in arguments.items() if value != published[name]}

    nearest = min(SIZES, key=lambda size: len(differing(size)))
    height, width = config.image_shape
    return {
        "architecture": f"{nearest.replace('-', '_')}_224",
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "avg",
        **({"label_names": list(config.label_names)} if config.label_names else {}),
        **({"model_args": differing(nearest)} if differing(nearest) else {}),
        "pretrained_cfg": _PRETRAINED
        | {"input_size": [config.num_channels, height, width], "num_classes": config.num_labels},
    }


_PRETRAINED = {
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "first_conv": "stem.conv1",
    "classifier": "head.fc",
}
"""What timm's config.json says of the images that the published models were trained on."""


def from_huggingface(config: Mapping[str, Any]) -> CoAtNetConfig:
    """The configuration in timm's config.json. Raises UserError for what we do not have."""
    if "architecture" not in config:
        huggingface.refuse_values(config, {"model_type": "coatnet"})
        return huggingface.make_config(
            CoAtNetConfig, huggingface.common_fields(config, CoAtNetConfig())
        )
    name = _TIMM_NAME.fullmatch(str(config["architecture"]))
    size = SIZES.get(f"coatnet-{name[1].replace('_', '-')}") if name else None
    if size is None:
        raise UserError(
            f"config.json is timm's, for {config['architecture']!r:.80}; of timm's CoAtNet "
            f"{', '.join(f'{one}_224' for one in SIZES).replace('-', '_')} are read"
        )
    huggingface.refuse_values(config, {"global_pool": "avg"})
    own = config.get("model_args") or {}
    if unknown := sorted(own.keys() - _arguments(size).keys() - {"num_classes"}):
        raise UserError(f"config.json has model_args {', '.join(unknown)}, not supported here")
    given = _arguments(size) | own
    fields = _fields(given)
    labels = given.get("num_classes", config.get("num_classes", vit.IMAGENET_LABELS))
    names = config.get("label_names")
    described = {"id2label": names} if names else {"num_labels": labels}
    return huggingface.make_config(
        CoAtNetConfig, fields | huggingface.common_fields(described, size)
    )


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``_arguments``."""
    fields = {ours: given[theirs] for ours, theirs in _VALUES.items() if ours != "head_width"}
    for ours, theirs in _TUPLES.items():
        value = given[theirs]
        value = (value, value) if theirs == "stem_width" and isinstance(value, int) else value
        if not isinstance(value, list | tuple):
            raise UserError(f"config.json has {theirs} {value!r:.80}; it must be a list of numbers")
        fields[ours] = tuple(value)
    huggingface.refuse_values(given, {"transformer_expand_first": given["conv_expand_output"]})
    if given["conv_stride_mode"] not in ("pool", "dw"):
        huggingface.refuse_values(given, {"conv_stride_mode": "dw"})
    hidden = given["head_hidden_size"]
    widths = (None, fields["stage_widths"][-1])
    huggingface.refuse_values(given, {"head_hidden_size": widths[hidden is not None]})
    return {
        **fields,
        "head_dim": given["transformer_dim_head"],
        "output_bias": given["transformer_attn_bias"],
        "expand_input": not given["conv_expand_output"],
        "pool_first": given["conv_stride_mode"] == "pool",
        "hidden_head": hidden is not None,
        **vit.read_image_size(given, "img_size", None),
    }


def batch_norm(ours: str, theirs: str) -> tuple[Weight, ...]:
    """Scale, bias and running statistics of a batch norm."""
    return (
        *norm(ours, theirs),
        Weight(f"{ours}/mean", f"{theirs}.running_mean"),
        Weight(f"{ours}/variance", f"{theirs}.running_var"),
    )


def _pointwise(ours: str, theirs: str, ins: str, outs: str) -> tuple[Weight, Weight]:
    """A linear layer that is a convolution of one position in the file."""
    kernel, bias = linear(ours, theirs, ins, outs)
    return Weight(kernel.ours, kernel.theirs, f"{kernel.axes}11"), bias


def _convolution_weights(ours: str, theirs: str) -> tuple[Weight, ...]:
    """A stage of convolutions."""
    return (
        *_pointwise(f"{ours}/shortcut/expand", f"{theirs}.shortcut.expand", "D", "E"),
        *batch_norm(f"{ours}/pre_norm", f"{theirs}.pre_norm"),
        *_pointwise(f"{ours}/expand", f"{theirs}.conv1_1x1", "D", "F"),
        *batch_norm(f"{ours}/expand_norm", f"{theirs}.norm1"),
        Weight(f"{ours}/depthwise/kernel", f"{theirs}.conv2_kxk.weight", "PQF->F1PQ"),
        *batch_norm(f"{ours}/depthwise_norm", f"{theirs}.norm2"),
        *_pointwise(f"{ours}/project", f"{theirs}.conv3_1x1", "F", "D"),
    )


def _attention_weights(ours: str, theirs: str) -> tuple[Weight, ...]:
    """A stage of attention."""
    return (
        *_pointwise(f"{ours}/shortcut/expand", f"{theirs}.shortcut.expand", "D", "E"),
        *norm(f"{ours}/entry_norm", f"{theirs}.norm1.norm"),
        *norm(f"{ours}/attention_norm", f"{theirs}.norm1"),
        *_pointwise(f"{ours}/attention/query_key_value", f"{theirs}.attn.qkv", "D", "NCH"),
        Weight(
            f"{ours}/attention/relative_bias",
            f"{theirs}.attn.rel_pos.relative_position_bias_table",
        ),
        *_pointwise(f"{ours}/attention/output", f"{theirs}.attn.proj", "NH", "D"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.norm2"),
        *_pointwise(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", "D", "F"),
        *_pointwise(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", "F", "D"),
    )


def weights(config: CoAtNetConfig) -> WeightTable:
    """The names of timm's ``MaxxVit``."""
    squeeze = "se_early" if config.squeeze_first else "se"
    rows: list[Weight] = []
    for stage in range(STAGES):
        ours, theirs = f"stage_{stage}/{{layer}}", f"stages.{stage}.blocks.{{layer}}"
        if stage < CONVOLUTIONS:
            rows += _convolution_weights(ours, theirs)
            rows += _pointwise(f"{ours}/squeeze/down", f"{theirs}.{squeeze}.fc1", "F", "S")
            rows += _pointwise(f"{ours}/squeeze/up", f"{theirs}.{squeeze}.fc2", "S", "F")
        else:
            rows += _attention_weights(ours, theirs)
    return WeightTable(
        weights=(
            Weight("stem/conv1/kernel", "stem.conv1.weight", "CPQD->DCPQ"),
            *batch_norm("stem/norm", "stem.norm1"),
            Weight("stem/conv2/kernel", "stem.conv2.weight", "CPQD->DCPQ"),
            *rows,
            *norm("final_norm", "head.norm" if config.hidden_head else "norm"),
            *linear("head_hidden", "head.pre_logits.fc", "D", "E"),
            *linear("classification_head", "head.fc", "D", "C"),
        ),
        # How many batches torch has seen, which it does not use.
        ignorable=(r".*\.num_batches_tracked",),
    )


FAMILY = Family(
    config=CoAtNetConfig,
    model_types=("coatnet",),
    architectures=ARCHITECTURES,
    timm_prefix="coatnet_",
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
)
