"""Masked autoencoder (He et al., arXiv:2111.06377): an encoder of a quarter of the patches, and a
small decoder that reconstructs all."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import vit
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import ComputeConfig, FlopsGroup, VisionConfig
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.linear import feature_map
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.patches import cut_patches
from flax_transformers.models.layers.stack import make_stack
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.models.vision import (
    Positions,
    VisionBlock,
    VisionForClassification,
    VisionModel,
    token,
)

NORM_PIX_EPS = 1e-6


class VisibleStates(HiddenStates):
    """Hidden states [B, 1 + visible, D] of the class token and the visible patches.

    ``mask`` float32 [B, T]: 1 at hidden patches. ``ids_restore`` int32 [B, T]: the index
    of each patch in the order with the visible ones first.
    """

    mask: Any = None
    ids_restore: Any = None


class MaeOutput(ModelOutput):
    """``logits`` float32 [B, T, P * Q * C]: pixels of all patches. The others are those of
    ``VisibleStates``."""

    mask: jax.Array | None = None
    ids_restore: jax.Array | None = None


def hide_patches(noise_BT: jax.Array, mask_ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which patches are visible: those with the least noise.

    Returns their positions int32 [B, visible], ``mask`` and ``ids_restore`` (``VisibleStates``).
    """
    return keep_least_noise(noise_BT, int(noise_BT.shape[1] * (1 - mask_ratio)))


def keep_least_noise(noise_BT: jax.Array, visible: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``hide_patches``, with a number of ``visible`` patches."""
    order_BT = jnp.argsort(noise_BT, axis=1).astype(jnp.int32)
    restore_BT = jnp.argsort(order_BT, axis=1).astype(jnp.int32)
    return order_BT[:, :visible], (restore_BT >= visible).astype(jnp.float32), restore_BT


def patch_targets(config: MaeConfig, pixel_values: jax.Array) -> jax.Array:
    """The targets of the decoder, float32 [B, T, P * Q * C], of images [B, C, height, width].

    With ``norm_pix_loss`` each patch has mean 0 and variance 1 (unbiased, §4.1).
    """
    patches = cut_patches(pixel_values.astype(jnp.float32), config.patch_size)
    batch, count = patches.shape[:2]
    pixels_BTK = patches.transpose(0, 1, 3, 4, 2).reshape(batch, count, -1)
    if not config.norm_pix_loss:
        return pixels_BTK
    mean_BT1 = pixels_BTK.mean(axis=-1, keepdims=True)
    variance_BT1 = pixels_BTK.var(axis=-1, ddof=1, keepdims=True)
    return (pixels_BTK - mean_BT1) / jnp.sqrt(variance_BT1 + NORM_PIX_EPS)


class MaeModel(VisionModel):
    """The encoder over visible patches."""

    config: MaeConfig

    inputs = ("pixel_values", "noise")

    def example_inputs(self) -> dict[str, jax.Array]:
        rows, columns = self.config.grid
        noise_BT = jnp.zeros((1, rows * columns), jnp.float32)
        return super().example_inputs() | {"noise": noise_BT}

    def hidden_states(
        self,
        pixel_values: jax.Array,
        noise: jax.Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> VisibleStates:
        """Hidden states of images [B, C, height, width].

        ``noise`` float32 [B, T] says which patches are hidden: those that have most of it. If it is
        not given it is drawn, with ``rngs={"dropout": key}``.
        """
        x_BTD, tokens_BKD = self.embeddings(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        if noise is None:
            if not self.has_rng("dropout"):
                raise UserError(
                    'which patches are hidden is random: give noise [batch, patches], or rngs={"dro'
                    'pout": key} to draw it'
                )
            noise = jax.random.uniform(self.make_rng("dropout"), x_BTD.shape[:2])
        visible_BM, mask_BT, restore_BT = hide_patches(noise, self.config.mask_ratio)
        x_BMD = jnp.take_along_axis(x_BTD, visible_BM[:, :, None], axis=1)
        x_BMD = self.embeddings.join(tokens_BKD, x_BMD, deterministic=deterministic)
        hidden_BMD = self.encode(x_BMD, deterministic=deterministic)
        return VisibleStates(hidden_BMD, mask=mask_BT, ids_restore=restore_BT)

    def __call__(
        self,
        pixel_values: jax.Array,
        noise: jax.Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> MaeOutput:
        """Both halves at once; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(
            pixel_values,
            noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
        )
        return MaeOutput(
            last_hidden_state=states.last_hidden_state,
            mask=states.mask,
            ids_restore=states.ids_restore,
            logits=self.reconstruct(states, deterministic=deterministic),
        )

    def reconstruct(self, states: VisibleStates, *, deterministic: bool = True) -> jax.Array | None:
        """Pixels of all patches, where there is a decoder."""
        return None


class MaeDecoder(nn.Module):
    """Hidden states of visible patches to pixels of all patches (§3, "MAE decoder")."""

    config: MaeConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        inner = c.decoder
        values, std = c.patch_size**2 * c.num_channels, c.init_std
        self.embed = feature_map(c.hidden_size, inner.hidden_size, dtype, init_std=std)
        self.mask_token = token(inner, dtype)
        self.position = Positions(inner, dtype)
        self.stack = make_stack(inner, self.compute, VisionBlock)
        self.norm = make_norm(inner, dtype)
        self.predict = feature_map(inner.hidden_size, values, dtype, init_std=std)

    def __call__(
        self, hidden_BMD: jax.Array, restore_BT: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """[B, 1 + visible, D] to float32 [B, T, P * Q * C]."""
        c = self.config
        batch, patches = restore_BT.shape
        if patches != c.grid[0] * c.grid[1]:
            raise UserError(
                f"the decoder has positions for {c.grid[0]} x {c.grid[1]} patches, not for "
                f"{patches}; resize the images, or the positions with change_image_size"
            )
        x_BMD = self.embed(hidden_BMD)
        hidden = patches + 1 - x_BMD.shape[1]
        hidden_tokens = jnp.broadcast_to(
            self.mask_token()[None, None, :], (batch, hidden, x_BMD.shape[-1])
        )
        x_BTD = jnp.concatenate([x_BMD[:, 1:], hidden_tokens], axis=1)
        x_BTD = jnp.take_along_axis(x_BTD, restore_BT[:, :, None], axis=1)
        x_BTD = jnp.concatenate([x_BMD[:, :1], x_BTD], axis=1) + self.position(c.grid)[None]
        x_BTD, _ = self.stack(x_BTD, LayerInputs(), deterministic=deterministic)
        return self.predict(self.norm(x_BTD)[:, 1:]).astype(jnp.float32)


class MaeForPreTraining(MaeModel):
    """Encoder and decoder."""

    def setup(self) -> None:
        super().setup()
        self.reconstruction_head = MaeDecoder(self.config, self.compute)

    def reconstruct(self, states: VisibleStates, *, deterministic: bool = True) -> jax.Array:
        """Pixels of all patches, float32 [B, T, P * Q * C]; compare with ``targets``."""
        return self.reconstruction_head(
            states.last_hidden_state, states.ids_restore, deterministic=deterministic
        )

    def targets(self, pixel_values: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """``patch_targets`` of this model."""
        return patch_targets(self.config, pixel_values)


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ViTMAEForPreTraining": MaeForPreTraining,
    "ViTMAEModel": MaeModel,
    "ViTMAEForImageClassification": VisionForClassification,
}
"""The last is ours: what pretraining leads to, with every patch visible, read from the same files.
"""


@dataclass(frozen=True, kw_only=True)
class MaeConfig(VisionConfig):
    """The published MAE, ViT-B/16 by default."""

    architecture: str = "ViTMAEForPreTraining"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-12
    positions: Literal["learned", "sincos_2d"] = "sincos_2d"
    pooling: Literal["class", "average"] = "average"
    decoder_hidden_size: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    """Fraction of patches that is masked."""
    norm_pix_loss: bool = False
    """Targets are patches normalised to mean 0 and variance 1."""

    RANGES: ClassVar[ranges.Ranges] = {
        "decoder_hidden_size": ranges.WIDTH,
        "decoder_layers": ranges.LAYERS,
        "decoder_heads": ranges.WIDTH,
        "decoder_intermediate_size": ranges.WIDTH,
        "mask_ratio": ranges.RATE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.decoder
        except ValueError as error:
            raise ranges.OutOfRange(f"of the decoder, {error}") from None

    @property
    def tokens(self) -> tuple[str, ...]:
        return ("class_token",)

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """The encoder sees the visible patches, the decoder a token in place of each other one."""
        if self.architecture == "ViTMAEForImageClassification":
            return super().flops_groups(grid)
        patches, head = grid[0] * grid[1], "reconstruction_head"
        visible = int(patches * (1 - self.mask_ratio))
        return (
            FlopsGroup("embeddings", patches),
            FlopsGroup("stack", 1 + visible, self.attention_width),
            FlopsGroup(f"{head}/embed", 1 + visible),
            FlopsGroup(f"{head}/stack", 1 + patches, self.decoder.attention_width),
            FlopsGroup(f"{head}/predict", patches),
        )

    @property
    def decoder(self) -> VisionConfig:
        """The decoder's layers, as a config of their own."""
        shared = {field.name: getattr(self, field.name) for field in fields(VisionConfig)}
        own = {
            "pooling": "class",
            "hidden_size": self.decoder_hidden_size,
            "num_layers": self.decoder_layers,
            "num_heads": self.decoder_heads,
            "intermediate_size": self.decoder_intermediate_size,
            "drop_path": 0.0,
        }
        return VisionConfig(**(shared | own))


def _size(letters: str, patch_size: int = 16) -> MaeConfig:
    return MaeConfig(patch_size=patch_size, **vit.dimensions(letters))


SIZES: dict[str, MaeConfig] = {
    "mae-base": _size("b"),
    "mae-large": _size("l"),
    "mae-huge": _size("h", 14),
}
"""The published sizes, with their decoder."""

NUMBERS = vit.NUMBERS | {
    "decoder_hidden_size": "decoder_hidden_size",
    "decoder_layers": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "decoder_intermediate_size": "decoder_intermediate_size",
    "mask_ratio": "mask_ratio",
}
JSON = vit.VisionFields(
    defaults=MaeConfig(),
    fixed={"model_type": "vit_mae"},
    numbers=NUMBERS,
    switches={"qkv_bias": "qkv_bias", "norm_pix_loss": "norm_pix_loss"},
)


def weights(config: MaeConfig) -> WeightTable:
    """The names of MAE's tensors."""
    head = "reconstruction_head"
    table = WeightTable(
        weights=(
            *vit.embedding_weights("vit.embeddings"),
            *vit.layer_weights("stack", "vit.encoder.layer"),
            *norm("final_norm", "vit.layernorm"),
            *linear(f"{head}/embed", "decoder.decoder_embed", "D", "E"),
            Weight(f"{head}/mask_token/embedding", "decoder.mask_token", "D->11D"),
            Weight(f"{head}/position/embedding", "decoder.decoder_pos_embed", "TD->1TD"),
            *vit.layer_weights(f"{head}/stack", "decoder.decoder_layers"),
            *norm(f"{head}/norm", "decoder.decoder_norm"),
            *linear(f"{head}/predict", "decoder.decoder_pred", "D", "K"),
            *linear("classification_head", "classifier", "D", "C"),
        ),
        # transformers 5 saves the decoder's layers under a name that it alone reads.
        renames=(*vit.RENAMES, (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.")),
        prefix="vit.",
    )
    return table.bare() if config.architecture == "ViTMAEModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    only_here=("ViTMAEForImageClassification",),
    sizes=SIZES,
    weights=weights,
)
