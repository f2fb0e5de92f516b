"""Models over one image: patches, positions, one stack of layers, a final norm, and their heads.

The Vision Transformer is arXiv:2010.11929. Shape letters as in ``layers/patches.py``; T is the
number of tokens before the patches plus the number of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig, DropoutGenerator, VisionConfig
from flax_transformers.models.heads import Pooler, classify_vectors, label_layer
from flax_transformers.models.kernels.dropout import drop_path
from flax_transformers.models.layers.attention import Attention
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.feed_forward import FeedForward
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.patches import (
    cut_patches,
    patch_grid,
    resize_positions,
    sincos_table,
)
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.models.parts import ModelParts
from flax_transformers.parallel.partitioning import HIDDEN, constrain


class VisionBlock(TransformerBlock):
    """The standard layer with stochastic depth (arXiv:1603.09382): training skips a sub-layer of an
    image with some probability."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, rate: Any
    ) -> tuple[jax.Array, LayerOutput]:
        """``rate``: this layer's skip probability, a float32 scalar, or None to skip nothing."""
        y_BTD, _ = self.self_attention(self.pre_norm("attention", x_BTD), inputs, None)
        x_BTD = self.residual("attention", x_BTD, self.drop_path(y_BTD, rate))
        y_BTD, _ = self.feed_forward(self.pre_norm("mlp", x_BTD), inputs)
        return self.residual("mlp", x_BTD, self.drop_path(y_BTD, rate)), LayerOutput()

    def drop_path(self, y_BTD: jax.Array, rate: jax.Array | None) -> jax.Array:
        """Zero the output of a sub-layer for some images, and scale up the others."""
        if rate is None:
            return y_BTD
        return drop_path(y_BTD, rate, self.make_rng("dropout"), self.compute.dropout_generator)


C = TypeVar("C", bound=VisionConfig)


def change_image_size(
    config: C, params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[C, dict[str, Any]]:
    """Config and parameters of a model for images of another size.

    Positions are resized by ``resize_positions``, as in arXiv:2010.11929 §3.2.
    """
    changed = replace(config, image_size=image_size)
    if changed.image_shape == config.image_shape:
        return changed, dict(params)
    old, new = config.position_grids(), changed.position_grids()
    leaves = flatten_dict(params)
    for path, leaf in leaves.items():
        if path[-2:] in old:
            leaves[path] = resize_positions(leaf, old[path[-2:]], new[path[-2:]])
    return changed, unflatten_dict(leaves)


class Vectors(nn.Module):
    """Learned vectors, cast to ``dtype``; the parameter is ``embedding``."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    start: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(self.start, self.axes)
        return self.param("embedding", init, self.shape, jnp.float32).astype(self.dtype)


def token(config: VisionConfig, dtype: jnp.dtype, name: str | None = None) -> Vectors:
    """A learned token [D]."""
    start = truncated_normal(config.init_std)
    return Vectors((config.hidden_size,), ("embed",), start, dtype, name=name)


class Positions(nn.Module):
    """The table of position vectors. A fixed table is a parameter too, as in published files, but
    has no gradient and does not decay."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> jax.Array:
        c = self.config
        fixed = c.positions == "sincos_2d"
        start = partial(_sincos_init, c) if fixed else truncated_normal(c.init_std)
        axes = ("fixed_positions" if fixed else "positions", "embed")
        init = nn.with_logical_partitioning(start, axes)
        shape = (c.token_positions + math.prod(c.grid), c.hidden_size)
        position_TD = self.param("embedding", init, shape, jnp.float32)
        position_TD = jax.lax.stop_gradient(position_TD) if fixed else position_TD
        return resize_positions(position_TD, c.grid, grid).astype(self.dtype)


def _sincos_init(config: VisionConfig, key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(sincos_table(config.grid, config.hidden_size, config.token_positions), dtype)


class PatchEmbeddings(nn.Module):
    """From pixels to the input of the layers, in two steps; patches may be removed in between."""

    config: VisionConfig
    dtype: jnp.dtype
    positions: Callable[[VisionConfig, jnp.dtype], nn.Module]
    dropout_generator: DropoutGenerator = "auto"
    stem: Callable[[VisionConfig, jnp.dtype], nn.Module | None] = lambda config, dtype: None

    def setup(self) -> None:
        c = self.config
        self.patches = self.stem(c, self.dtype) or Linear(
            "BTCPQ,CPQD->BTD",
            (c.num_channels, c.patch_size, c.patch_size, c.hidden_size),
            ("channels", "patch_height", "patch_width", "embed"),
            dtype=self.dtype,
            use_bias=c.patch_bias,
            init_std=c.init_std,
        )
        self.position = self.positions(c, self.dtype)
        for name in c.tokens:
            setattr(self, name, token(c, self.dtype))
        self.dropout = Dropout(c.dropout, self.dropout_generator)

    def __call__(
        self,
        pixel_values: jax.Array,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Patches [B, T, D] and the tokens before them [B, tokens, D], with positions added."""
        c = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != c.num_channels:
            raise UserError(
                f"pixel_values have shape {list(pixel_values.shape)}; they must be [batch, "
                f"{c.num_channels}, height, width]"
            )
        if pixel_values.shape[2:] != c.image_shape and not interpolate_pos_encoding:
            raise UserError(
                f"pixel_values are {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels, but "
                f"the model has positions for {c.image_shape[0]} x {c.image_shape[1]}; resize the "
                "images, or the positions with change_image_size or interpolate_pos_encoding=True"
            )
        batch, k = pixel_values.shape[0], c.token_positions
        position_TD = self.position(patch_grid(pixel_values.shape[2:], c.patch_size))
        if isinstance(self.patches, Linear):
            x_BTD = self.patches(cut_patches(pixel_values, c.patch_size)) + position_TD[None, k:]
        else:
            x_BTD = self.patches(pixel_values, deterministic=deterministic) + position_TD[None, k:]
        vectors = [getattr(self, name)() for name in c.tokens]
        if not vectors:
            return x_BTD, x_BTD[:, :0]
        tokens_KD = jnp.stack(vectors)
        if k:
            tokens_KD = tokens_KD + position_TD[:k]
        return x_BTD, jnp.broadcast_to(tokens_KD[None], (batch, *tokens_KD.shape))

    def join(self, tokens_BKD: jax.Array, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Tokens and patches in one sequence."""
        x_BTD = jnp.concatenate([tokens_BKD, x_BTD], axis=1)
        return constrain(self.dropout(x_BTD, deterministic=deterministic), HIDDEN)


VISION_PARTS = ModelParts(block=VisionBlock, positions=Positions)
"""The standard parts of models over images."""


class VisionModel(nn.Module):
    """The model without a head, and the base of those with one.

    See ``TextModel`` for the two halves of a model.
    """

    config: VisionConfig
    compute: ComputeConfig = ComputeConfig()
    parts: ModelParts = VISION_PARTS

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    output: ClassVar[type[ModelOutput]] = ModelOutput

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that initialises every parameter."""
        c = self.config
        return {"pixel_values": jnp.zeros((1, c.num_channels, *c.image_shape), jnp.float32)}

    def setup(self) -> None:
        c, p = self.config, self.parts
        generator = self.compute.dropout_generator
        self.embeddings = PatchEmbeddings(c, self.dtype, p.positions, generator, p.stem)
        self.stack = p.stack(c, self.compute, p.block)
        if c.norm_position == "pre":
            self.final_norm = make_norm(c, self.dtype)

    def hidden_states(
        self,
        pixel_values: jax.Array,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> HiddenStates:
        """Last hidden states [B, T, D] of images [B, C, height, width], the tokens first.

        ``interpolate_pos_encoding``: images may have another size than the config's. Raises
        UserError for images of another shape.
        """
        how = {"interpolate_pos_encoding": interpolate_pos_encoding, "deterministic": deterministic}
        x_BTD, tokens_BKD = self.embeddings(pixel_values, **how)
        x_BTD = self.embeddings.join(tokens_BKD, x_BTD, deterministic=deterministic)
        return HiddenStates(self.encode(x_BTD, deterministic=deterministic))

    def encode(self, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """The layers and the final norm."""
        c = self.config
        rates = None if deterministic or not c.drop_path else jnp.asarray(c.drop_path_rates())
        x_BTD, _ = self.stack(x_BTD, LayerInputs(), rates, deterministic=deterministic)
        return self.final_norm(x_BTD) if c.norm_position == "pre" else x_BTD

    def __call__(
        self,
        pixel_values: jax.Array,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Hidden states and the outputs of the head; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
        )
        hidden_BTD = states.last_hidden_state
        return self.output(
            last_hidden_state=hidden_BTD, **self.head_outputs(hidden_BTD, deterministic)
        )

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        """The fields that the head adds to ``output``."""
        return {}


class VisionWithPooler(VisionModel):
    """The layers and a pooler of the first token."""

    def setup(self) -> None:
        super().setup()
        self.pooler = Pooler(self.config, self.dtype)

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        return {"pooler_output": self.pooler(hidden_BTD)}


class PoolingHead(nn.Module):
    """A learned query that attends to all patches, and a feed-forward layer ("MAP",
    arXiv:2106.04560 appendix)."""

    config: VisionConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        self.probe = token(c, dtype)
        self.attention = Attention(c, self.compute)
        self.norm = make_norm(c, dtype)
        self.mlp = FeedForward(c, self.compute)

    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, D]."""
        probe_D = self.probe()
        probe_B1D = jnp.broadcast_to(probe_D, (len(hidden_BTD), 1, len(probe_D)))
        x_B1D, _ = self.attention(probe_B1D, context_BSD=hidden_BTD)
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


class VisionForClassification(VisionModel):
    """Labels each image."""

    def setup(self) -> None:
        super().setup()
        if self.config.pooling == "attention":
            self.pooling_head = PoolingHead(self.config, self.compute)
        self.classification_head = label_layer(self.config, self.dtype, self.config.num_labels)
        self.head_dropout = Dropout(self.config.head_dropout, self.compute.dropout_generator)

    def classify(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, labels] of hidden states [B, T, D], the tokens first."""
        pooled_BD = self.head_dropout(self.pool(hidden_BTD), deterministic=deterministic)
        return classify_vectors(self.classification_head, pooled_BD)

    def pool(self, hidden_BTD: jax.Array) -> jax.Array:
        """Input [B, D] of the last layer."""
        if self.config.pooling == "attention":
            return self.pooling_head(hidden_BTD)
        if self.config.pooling == "average":
            patches_BTD = hidden_BTD[:, len(self.config.tokens) :]
            return patches_BTD.mean(axis=1, dtype=jnp.float32).astype(hidden_BTD.dtype)
        return hidden_BTD[:, 0]

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        return {"logits": self.classify(hidden_BTD, deterministic=deterministic)}
