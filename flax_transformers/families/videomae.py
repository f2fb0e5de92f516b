"""VideoMAE (Tong et al., arXiv:2203.12602): a masked autoencoder of videos.

A tubelet is a patch of a few consecutive frames. The encoder sees a tenth of the tubelets, a small
decoder predicts the pixels of the others. Shape letters as in ``layers/patches.py``, with F frames
and S frames in a tubelet; V visible and M masked tubelets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import mae, vit
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import ComputeConfig, FlopsGroup, VisionConfig
from flax_transformers.models.heads import classify_vectors, label_layer
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.linear import Linear, feature_map
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.patches import SINCOS_BASE, cut_patches
from flax_transformers.models.layers.stack import make_stack
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.models.vision import VisionBlock, token
from flax_transformers.parallel.partitioning import HIDDEN, constrain

NORM_PIX_EPS = 1e-6
"""Added to the standard deviation, not to the variance as in MAE."""
HEAD_NORM_EPS = 1e-5
"""Of the norms of the decoder and of the classifier, whatever ``norm_eps`` is."""

CLASSIFIER = "VideoMAEForVideoClassification"


@dataclass(frozen=True, kw_only=True)
class VideoMaeConfig(VisionConfig):
    """The published VideoMAE, ViT-B/16 of 16 frames by default.

    ``pooling`` is that of the classifier; "class" is the first tubelet, as there is no class token.
    """

    architecture: str = "VideoMAEForPreTraining"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-12
    pooling: Literal["class", "average"] = "average"
    num_frames: int = 16
    tubelet_size: int = 2
    """Frames in a tubelet."""
    final_norm: bool = False
    """Norm after the encoder's layers. A classifier has it with ``pooling`` "class" only: after
    average pooling it has a norm of its own."""
    decoder_hidden_size: int = 384
    decoder_layers: int = 4
    decoder_heads: int = 6
    decoder_intermediate_size: int = 1536
    mask_ratio: float = 0.9
    """Fraction of tubelets that is masked. Hugging Face takes it from the mask it is given."""
    norm_pix_loss: bool = True
    """Targets are tubelets whose channels are normalised to mean 0 and variance 1."""

    RANGES: ClassVar[ranges.Ranges] = {
        "num_frames": ranges.integers(),
        "tubelet_size": ranges.integers(),
        "decoder_hidden_size": ranges.WIDTH,
        "decoder_layers": ranges.LAYERS,
        "decoder_heads": ranges.WIDTH,
        "decoder_intermediate_size": ranges.WIDTH,
        "mask_ratio": ranges.RATE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames < self.tubelet_size:
            raise ranges.OutOfRange(
                f"model.num_frames {self.num_frames} is less than one tubelet of "
                f"model.tubelet_size {self.tubelet_size}"
            )
        try:
            _ = self.decoder
        except ValueError as error:
            raise ranges.OutOfRange(f"of the decoder, {error}") from None

    @property
    def tokens(self) -> tuple[str, ...]:
        return ()

    @property
    def key_bias(self) -> bool:
        return False

    @property
    def has_final_norm(self) -> bool:
        """Whether this architecture has a norm after the encoder."""
        return self.pooling == "class" if self.architecture == CLASSIFIER else self.final_norm

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Frames, channels, height and width."""
        return (self.num_frames, self.num_channels, *self.image_shape)

    @property
    def patches(self) -> int:
        """Number of patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tubelets(self) -> int:
        """Number of tubelets T of a video."""
        return self.num_frames // self.tubelet_size * self.patches

    @property
    def visible(self) -> int:
        """Number of visible tubelets V: whole tubes, of the same patches at all times."""
        return (self.patches - int(self.mask_ratio * self.patches)) * (
            self.num_frames // self.tubelet_size
        )

    @property
    def values(self) -> int:
        """Number of values of a tubelet."""
        return self.tubelet_size * self.patch_size**2 * self.num_channels

    def position_grids(self) -> dict[tuple[str, str], tuple[int, int]]:
        return {}

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """The encoder sees the visible tubelets, the decoder a token in place of each other one."""
        tubelets, head = self.tubelets, "reconstruction_head"
        if self.architecture == CLASSIFIER:
            return super().flops_groups((1, tubelets))
        return (
            FlopsGroup("embeddings", tubelets),
            FlopsGroup("stack", self.visible, self.attention_width),
            FlopsGroup(f"{head}/embed", self.visible),
            FlopsGroup(f"{head}/stack", tubelets, self.decoder.attention_width),
            FlopsGroup(f"{head}/predict", tubelets - self.visible),
        )

    @property
    def decoder(self) -> VideoMaeConfig:
        """The decoder's layers, as a config of their own."""
        if self.architecture == "":
            return self
        return replace(
            self,
            architecture="",
            hidden_size=self.decoder_hidden_size,
            num_layers=self.decoder_layers,
            num_heads=self.decoder_heads,
            intermediate_size=self.decoder_intermediate_size,
            drop_path=0.0,
        )


def sinusoid_table(positions: int, width: int) -> np.ndarray:
    """Fixed positions of arXiv:1706.03762 §3.5, sine and cosine alternating, float32 [T, width]."""
    exponent = 2 * (np.arange(width) // 2) / width
    angle_TD = np.arange(positions)[:, None] / np.power(SINCOS_BASE, exponent)[None]
    angle_TD[:, 0::2], angle_TD[:, 1::2] = np.sin(angle_TD[:, 0::2]), np.cos(angle_TD[:, 1::2])
    return angle_TD.astype(np.float32)


def cut_tubelets(pixel_values: jax.Array, tubelet_size: int, patch_size: int) -> jax.Array:
    """Videos [B, F, C, height, width] to tubelets [B, T, C, S, P, Q]: by time, then row by row."""
    batch, frames, channels, height, width = pixel_values.shape
    times = frames // tubelet_size
    kept = pixel_values[:, : times * tubelet_size]
    slices = kept.reshape(batch * times, tubelet_size * channels, height, width)
    patches = cut_patches(slices, patch_size)
    tubelets = patches.reshape(batch, -1, tubelet_size, channels, patch_size, patch_size)
    return tubelets.swapaxes(2, 3)


def tubelet_targets(config: VideoMaeConfig, pixels: jax.Array) -> jax.Array:
    """The targets of the decoder, float32 [B, T, S * P * Q * C], of videos [B, F, C, height, width]
    with values in [0, 1].

    With ``norm_pix_loss`` each channel of a tubelet has mean 0 and variance 1 (unbiased).
    """
    c = config
    tubelets = cut_tubelets(pixels.astype(jnp.float32), c.tubelet_size, c.patch_size)
    batch, count = tubelets.shape[:2]
    values_BTKC = tubelets.transpose(0, 1, 3, 4, 5, 2).reshape(batch, count, -1, c.num_channels)
    if c.norm_pix_loss:
        mean_BT1C = values_BTKC.mean(axis=2, keepdims=True)
        deviation_BT1C = values_BTKC.std(axis=2, ddof=1, keepdims=True)
        values_BTKC = (values_BTKC - mean_BT1C) / (deviation_BT1C + NORM_PIX_EPS)
    return values_BTKC.reshape(batch, count, -1)


class VideoStates(HiddenStates):
    """Hidden states [B, V, D] of the visible tubelets, all T if none is masked.

    ``visible`` int32 [B, V] and ``masked`` int32 [B, M]: indices of the tubelets.
    """

    visible: Any = None
    masked: Any = None


class TubeletEmbeddings(nn.Module):
    """From pixels to the input of the layers: one map of tubelets (a 3-D convolution in the paper),
    and fixed positions."""

    config: VideoMaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """[B, F, C, height, width] to [B, T, D]."""
        c = self.config
        if pixel_values.shape[1:] != c.video_shape:
            raise UserError(
                f"pixel_values have shape {list(pixel_values.shape)}; for this model they must be "
                f"[batch, {', '.join(map(str, c.video_shape))}]: frames, channels, height and width"
            )
        patches = Linear(
            "BTCSPQ,CSPQD->BTD",
            (c.num_channels, c.tubelet_size, c.patch_size, c.patch_size, c.hidden_size),
            ("channels", "patch_frames", "patch_height", "patch_width", "embed"),
            dtype=self.dtype,
            init_std=c.init_std,
            name="patches",
        )
        x_BTD = patches(cut_tubelets(pixel_values, c.tubelet_size, c.patch_size))
        position_TD = jnp.asarray(sinusoid_table(c.tubelets, c.hidden_size), self.dtype)
        return x_BTD + position_TD[None]


class VideoMaeModel(nn.Module):
    """The encoder, over visible tubelets if a mask is given."""

    config: VideoMaeConfig
    compute: ComputeConfig = ComputeConfig()

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "bool_masked_pos")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        c = self.config
        mask_T = jnp.arange(c.tubelets) >= c.visible
        shape = (1, *c.video_shape)
        return {"pixel_values": jnp.zeros(shape, jnp.float32), "bool_masked_pos": mask_T[None]}

    def setup(self) -> None:
        c = self.config
        self.embeddings = TubeletEmbeddings(c, self.dtype)
        self.embedding_dropout = Dropout(c.dropout, self.compute.dropout_generator)
        self.stack = make_stack(c, self.compute, VisionBlock)
        if c.has_final_norm:
            self.final_norm = make_norm(c, self.dtype)

    def hidden_states(
        self,
        pixel_values: jax.Array,
        bool_masked_pos: jax.Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> VideoStates:
        """Hidden states of videos [B, F, C, height, width], of the config's size only:
        ``interpolate_pos_encoding``, which objectives of images set, changes nothing.

        ``bool_masked_pos`` [B, T]: True at masked tubelets, of which each video has
        ``T - config.visible``; without it all are visible. Raises UserError for another number,
        which a compiled call does not check.
        """
        c = self.config
        x_BTD = self.embeddings(pixel_values)
        visible_BV = masked_BM = None
        if bool_masked_pos is not None:
            _check_number(c, bool_masked_pos)
            # Stable: visible and masked tubelets each stay in their order.
            order_BT = jnp.argsort(bool_masked_pos, axis=1, stable=True).astype(jnp.int32)
            visible_BV, masked_BM = order_BT[:, : c.visible], order_BT[:, c.visible :]
            x_BTD = jnp.take_along_axis(x_BTD, visible_BV[:, :, None], axis=1)
        x_BTD = self.embedding_dropout(x_BTD, deterministic=deterministic)
        hidden_BVD = self.encode(constrain(x_BTD, HIDDEN), deterministic=deterministic)
        return VideoStates(hidden_BVD, visible=visible_BV, masked=masked_BM)

    def encode(self, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """The layers, and the final norm if there is one."""
        c = self.config
        rates = None if deterministic or not c.drop_path else jnp.asarray(c.drop_path_rates())
        x_BTD, _ = self.stack(x_BTD, LayerInputs(), rates, deterministic=deterministic)
        return self.final_norm(x_BTD) if c.has_final_norm else x_BTD

    def __call__(
        self,
        pixel_values: jax.Array,
        bool_masked_pos: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Both halves at once; see ``hidden_states`` for the inputs."""
        states = self.hidden_states(pixel_values, bool_masked_pos, deterministic=deterministic)
        return ModelOutput(
            last_hidden_state=states.last_hidden_state,
            **self.outputs_of(states, deterministic),
        )

    def outputs_of(self, states: VideoStates, deterministic: bool) -> dict[str, jax.Array]:
        """The fields that the head adds to the output."""
        return {}


def _check_number(config: VideoMaeConfig, mask_BT: jax.Array) -> None:
    """Raises UserError for a mask of another number of tubelets, where its values are known."""
    wanted = config.tubelets - config.visible
    shape = tuple(mask_BT.shape)
    if len(shape) != 2 or shape[1] != config.tubelets:
        raise UserError(
            f"bool_masked_pos has shape {list(shape)}; it must be [batch, {config.tubelets}]"
        )
    if isinstance(mask_BT, jax.core.Tracer):
        return
    found = np.unique(np.asarray(mask_BT).sum(axis=1))
    if found.tolist() != [wanted]:
        raise UserError(
            f"bool_masked_pos masks {found.tolist()} of {config.tubelets} tubelets, but "
            f"model.mask_ratio {config.mask_ratio} masks {wanted}; set mask_ratio accordingly"
        )


class VideoMaeDecoder(nn.Module):
    """Hidden states of visible tubelets to the values of masked ones (§3.3)."""

    config: VideoMaeConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        inner = c.decoder
        width, std = inner.hidden_size, c.init_std
        self.embed = feature_map(c.hidden_size, width, dtype, use_bias=False, init_std=std)
        self.mask_token = token(inner, dtype)
        self.stack = make_stack(inner, self.compute, VisionBlock)
        self.norm = make_norm(replace(inner, norm_eps=HEAD_NORM_EPS), dtype)
        self.predict = feature_map(width, c.values, dtype, init_std=std)

    def __call__(self, states: VideoStates, *, deterministic: bool) -> jax.Array:
        """float32 [B, M, S * P * Q * C]."""
        c = self.config.decoder
        x_BVD = self.embed(states.last_hidden_state)
        position_TD = jnp.asarray(sinusoid_table(c.tubelets, c.hidden_size), x_BVD.dtype)
        hidden_BMD = self.mask_token()[None, None] + position_TD[states.masked]
        x_BTD = jnp.concatenate([x_BVD + position_TD[states.visible], hidden_BMD], axis=1)
        x_BTD, _ = self.stack(constrain(x_BTD, HIDDEN), LayerInputs(), deterministic=deterministic)
        hidden_BMD = x_BTD[:, x_BVD.shape[1] :]
        return self.predict(self.norm(hidden_BMD)).astype(jnp.float32)


class VideoMaeForPreTraining(VideoMaeModel):
    """Encoder and decoder. ``logits`` float32 [B, M, S * P * Q * C]: values of masked tubelets."""

    def setup(self) -> None:
        super().setup()
        self.reconstruction_head = VideoMaeDecoder(self.config, self.compute)

    def reconstruct(self, states: VideoStates, *, deterministic: bool = True) -> jax.Array:
        """Values of masked tubelets, float32 [B, M, S * P * Q * C]."""
        if states.masked is None:
            raise UserError(
                "pretraining predicts masked tubelets; give bool_masked_pos [batch, tubelets]"
            )
        return self.reconstruction_head(states, deterministic=deterministic)

    def targets(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """``tubelet_targets`` of this model."""
        return tubelet_targets(self.config, pixels)

    def tube_mask(self, noise_BT: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Masks bool [B, T] of whole tubes (§3.2): of the patches of a frame those with most noise
        are masked, in all frames. Only the noise of the first tubelets of each video is used."""
        c = self.config
        rank_BP = jnp.argsort(jnp.argsort(noise_BT[:, : c.patches], axis=1), axis=1)
        mask_BP = rank_BP >= c.patches - int(c.mask_ratio * c.patches)
        return jnp.tile(mask_BP, (1, c.tubelets // c.patches))

    def outputs_of(self, states: VideoStates, deterministic: bool) -> dict[str, jax.Array]:
        return {"logits": self.reconstruct(states, deterministic=deterministic)}


class VideoMaeForClassification(VideoMaeModel):
    """Labels each video."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def example_inputs(self) -> dict[str, jax.Array]:
        return {"pixel_values": super().example_inputs()["pixel_values"]}

    def setup(self) -> None:
        super().setup()
        c = self.config
        if c.pooling == "average":
            self.pooled_norm = make_norm(replace(c, norm_eps=HEAD_NORM_EPS), self.dtype)
        self.classification_head = label_layer(c, self.dtype, c.num_labels)
        self.head_dropout = Dropout(c.head_dropout, self.compute.dropout_generator)

    def classify(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, labels] of hidden states [B, T, D]."""
        if self.config.pooling == "average":
            pooled_BD = hidden_BTD.mean(axis=1, dtype=jnp.float32).astype(hidden_BTD.dtype)
            pooled_BD = self.pooled_norm(pooled_BD)
        else:
            pooled_BD = hidden_BTD[:, 0]
        pooled_BD = self.head_dropout(pooled_BD, deterministic=deterministic)
        return classify_vectors(self.classification_head, pooled_BD)

    def outputs_of(self, states: VideoStates, deterministic: bool) -> dict[str, jax.Array]:
        return {"logits": self.classify(states.last_hidden_state, deterministic=deterministic)}


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "VideoMAEForPreTraining": VideoMaeForPreTraining,
    CLASSIFIER: VideoMaeForClassification,
    "VideoMAEModel": VideoMaeModel,
}


def _size(letters: str, decoder_width: int, decoder_layers: int = 4) -> VideoMaeConfig:
    return VideoMaeConfig(
        **vit.dimensions(letters),
        final_norm=True,
        decoder_hidden_size=decoder_width,
        decoder_layers=decoder_layers,
        decoder_heads=decoder_width // 64,
        decoder_intermediate_size=4 * decoder_width,
    )


SIZES: dict[str, VideoMaeConfig] = {
    "videomae-small": _size("s", 192),
    "videomae-base": _size("b", 384),
    "videomae-large": _size("l", 512, 12),
    "videomae-huge": replace(_size("h", 640, 12), patch_size=16, decoder_heads=8),
}
"""The published sizes, with their decoder."""

_JSON = vit.VisionFields(
    defaults=VideoMaeConfig(),
    fixed={"model_type": "videomae"},
    numbers=mae.NUMBERS | {"num_frames": "num_frames", "tubelet_size": "tubelet_size"},
    switches={"norm_pix_loss": "norm_pix_loss", "qkv_bias": "qv_bias"},
)


def from_huggingface(config: Mapping[str, Any]) -> VideoMaeConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields.

    ``use_mean_pooling`` says of a classifier how it pools, and of the others that the encoder has
    no norm at its end.
    """
    given = {"qv_bias": config.get("qkv_bias", True), "use_mean_pooling": True} | dict(config)
    fields = _JSON.fields(given)
    switch = {"pooling": "use_mean_pooling"}
    mean = huggingface.read_switches(given, switch, _JSON.defaults)["pooling"]
    fields["final_norm"] = not mean
    if fields["architecture"] == CLASSIFIER:
        fields["pooling"] = "average" if mean else "class"
    return huggingface.make_config(VideoMaeConfig, fields)


def settle(config: VideoMaeConfig, tensors: Mapping[str, Any]) -> VideoMaeConfig:
    """A classifier on a file without one, as pretraining writes, pools as the paper does."""
    if config.architecture != CLASSIFIER or "classifier.weight" in tensors:
        return config
    return replace(config, pooling="average")


def to_huggingface(config: VideoMaeConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    return {**_JSON.write(config), "use_mean_pooling": not config.has_final_norm}


def _layer_weights(stack: str, theirs: str) -> tuple[Weight, ...]:
    """Those of ViT, but for the biases of queries and values, which are saved beside the maps."""
    names = {
        f"{theirs}.{{layer}}.attention.attention.query.bias": "q_bias",
        f"{theirs}.{{layer}}.attention.attention.value.bias": "v_bias",
    }
    return tuple(
        replace(row, theirs=f"{theirs}.{{layer}}.attention.attention.{names[row.theirs]}")
        if row.theirs in names
        else row
        for row in vit.layer_weights(stack, theirs)
    )


def weights(config: VideoMaeConfig) -> WeightTable:
    """The names of VideoMAE's tensors."""
    head, patches = "reconstruction_head", "videomae.embeddings.patch_embeddings.projection"
    table = WeightTable(
        weights=(
            Weight("embeddings/patches/kernel", f"{patches}.weight", "CSPQD->DCSPQ"),
            Weight("embeddings/patches/bias", f"{patches}.bias"),
            *_layer_weights("stack", "videomae.encoder.layer"),
            *norm("final_norm", "videomae.layernorm"),
            *linear(f"{head}/embed", "encoder_to_decoder", "D", "E"),
            Weight(f"{head}/mask_token/embedding", "mask_token", "D->11D"),
            *_layer_weights(f"{head}/stack", "decoder.decoder_layers"),
            *norm(f"{head}/norm", "decoder.norm"),
            *linear(f"{head}/predict", "decoder.head", "D", "K"),
            *norm("pooled_norm", "fc_norm"),
            *linear("classification_head", "classifier", "D", "C"),
        ),
        renames=(
            (r"\.attention\.attention\.query\.bias$", ".attention.attention.q_bias"),
            (r"\.attention\.attention\.value\.bias$", ".attention.attention.v_bias"),
        ),
        prefix="videomae.",
    )
    return table.bare() if config.architecture == "VideoMAEModel" else table


FAMILY = Family(
    config=VideoMaeConfig,
    model_types=("videomae",),
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    settle=settle,
)
