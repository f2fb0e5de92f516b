"""Masked autoencoder of several modalities with one shared trunk.

Images, videos, spectrograms, depth maps, point clouds and bytes each have a patcher and a light
decoder of their own; the layers between them are shared. A sequence holds one modality, as in
OmniMAE (arXiv:2206.08356); MultiMAE (arXiv:2204.01678) joins aligned modalities in one sequence,
which this model does not.

Shape letters: B batch, T tokens, V visible tokens, D width, K values of a token, G groups of points
of N points each, C the three coordinates of a point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.data.signals.names import check_modality
from flax_transformers.errors import UserError
from flax_transformers.families.mae import keep_least_noise
from flax_transformers.huggingface.family import Family
from flax_transformers.models.config import ComputeConfig, FlopsGroup, TransformerConfig
from flax_transformers.models.heads import classify_vectors, label_layer
from flax_transformers.models.layers.block import LayerInputs, TransformerBlock
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.patches import SINCOS_BASE
from flax_transformers.models.layers.stack import make_stack
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.models.vision import Vectors
from flax_transformers.parallel.partitioning import HIDDEN, constrain

NORM_PIX_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Base of the modalities: what the model needs to know of their arrays."""

    name: str
    """Name of the source of its arrays."""
    mask_ratio: float = 0.75
    """Fraction of tokens that is masked."""

    RANGES: ClassVar[ranges.Ranges] = {"mask_ratio": ranges.RATE}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model.modalities")
        check_modality(self.name, "model.modalities.name")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one array."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """Dtype of the arrays of an example; others are accepted, but not for bytes."""
        return "float32"

    @property
    def grid(self) -> tuple[int, ...]:
        """Numbers of tokens along each axis."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Number K of values that the decoder predicts for a token."""
        raise NotImplementedError

    @property
    def masked_together(self) -> int:
        """Number of tokens, one for each place on the first axis, that are masked together."""
        return 1

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return math.prod(self.grid)

    @property
    def visible(self) -> int:
        """Number of visible tokens V."""
        tubes = self.tokens // self.masked_together
        share = round(tubes * (1 - self.mask_ratio), 6)  # 10 * (1 - 0.9) is less than 1 in float64
        return int(share) * self.masked_together


@dataclass(frozen=True, kw_only=True)
class GridModality(Modality):
    """Arrays [*size, channels] cut into patches: images, depth maps and spectrograms [height,
    width, channels], videos [frames, height, width, channels]."""

    size: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int = 1
    mean: float = 0.0
    """Mean of the values; they are centred and scaled before all else."""
    std: float = 1.0
    """Standard deviation of the values."""
    tubes: bool = False
    """Mask the same patches at all places of the first axis (VideoMAE)."""
    norm_pix_loss: bool = False
    """Targets are patches normalised to mean 0 and variance 1."""

    RANGES: ClassVar[ranges.Ranges] = {
        "size": ranges.PIXELS,
        "patch": ranges.PIXELS,
        "channels": ranges.integers(1, 1024),
        "mean": ranges.numbers(-1e6, 1e6),
        "std": ranges.numbers(1e-6, 1e6),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) != len(self.patch) or any(
            a % b for a, b in zip(self.size, self.patch, strict=True)
        ):
            raise ranges.OutOfRange(
                f"the modality {self.name!r} has size {list(self.size)}, which patches of "
                f"{list(self.patch)} do not divide"
            )
        if self.norm_pix_loss and self.outputs < 2:
            raise ranges.OutOfRange(
                f"the modality {self.name!r} has patches of one value, which cannot be normalised; "
                "set its norm_pix_loss to False, or choose larger patches"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.size, self.channels)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(a // b for a, b in zip(self.size, self.patch, strict=True))

    @property
    def outputs(self) -> int:
        return math.prod(self.patch) * self.channels

    @property
    def masked_together(self) -> int:
        return self.grid[0] if self.tubes else 1


@dataclass(frozen=True, kw_only=True)
class ByteModality(Modality):
    """Text as bytes, one token each."""

    length: int
    mask_ratio: float = 0.3

    RANGES: ClassVar[ranges.Ranges] = {"length": ranges.POSITIONS}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def dtype(self) -> str:
        return "uint8"

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def outputs(self) -> int:
        return 256


@dataclass(frozen=True, kw_only=True)
class PointModality(Modality):
    """Point clouds [points, 3] in the unit ball, in groups of neighbours around centres that lie
    far apart (Point-MAE, arXiv:2203.06604)."""

    points: int
    groups: int
    group_size: int
    mask_ratio: float = 0.6

    RANGES: ClassVar[ranges.Ranges] = {
        "points": ranges.POSITIONS,
        "groups": ranges.POSITIONS,
        "group_size": ranges.POSITIONS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.groups, self.group_size) > self.points:
            raise ranges.OutOfRange(
                f"the modality {self.name!r} has {self.points} points; groups and group_size may "
                "not be larger"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.points, 3)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.groups,)

    @property
    def outputs(self) -> int:
        return self.group_size * 3


PRETRAINING, CLASSIFIER = "MultimodalMaeForPreTraining", "MultimodalMaeForClassification"


@dataclass(frozen=True, kw_only=True)
class MultimodalMaeConfig(TransformerConfig):
    """The shared layers, ViT-B by default, the modalities, and the size of each decoder."""

    architecture: str = PRETRAINING
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    modalities: tuple[Modality, ...] = (
        GridModality(name="image", size=(224, 224), patch=(16, 16), channels=3),
    )
    decoder_hidden_size: int = 256
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_intermediate_size: int = 1024

    RANGES: ClassVar[ranges.Ranges] = {
        "decoder_hidden_size": ranges.WIDTH,
        "decoder_layers": ranges.LAYERS,
        "decoder_heads": ranges.WIDTH,
        "decoder_intermediate_size": ranges.WIDTH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [one.name for one in self.modalities]
        if not names or len(set(names)) < len(names):
            raise ranges.OutOfRange(
                f"model.modalities are named {names}; give at least one, and each its own name"
            )
        for one in self.modalities:
            if not 0 < one.visible < one.tokens:
                raise ranges.OutOfRange(
                    f"of the {one.tokens} tokens of the modality {one.name!r}, {one.visible} are "
                    "visible; change its mask_ratio so that some are visible and some masked"
                )
        try:
            _ = self.decoder
        except ValueError as error:
            raise ranges.OutOfRange(f"of the decoders, {error}") from None

    @property
    def decoder(self) -> TransformerConfig:
        """The layers of a decoder, as a config of their own."""
        shared = {field.name: getattr(self, field.name) for field in fields(TransformerConfig)}
        own = {
            "hidden_size": self.decoder_hidden_size,
            "num_layers": self.decoder_layers,
            "num_heads": self.decoder_heads,
            "intermediate_size": self.decoder_intermediate_size,
        }
        return TransformerConfig(**(shared | own))

    def modality(self, name: str) -> Modality:
        """The modality ``name``. Raises UserError if there is none."""
        found = next((one for one in self.modalities if one.name == name), None)
        if found is None:
            names = ", ".join(one.name for one in self.modalities)
            raise UserError(f"the model has no modality {name!r}; it has {names}")
        return found

    def row_flops(self, size: int, modalities: Sequence[str] = ()) -> tuple[FlopsGroup, ...]:
        """An example of each of the ``modalities``: in pretraining the trunk sees visible tokens,
        and a decoder all."""
        trunk, decoder = (c.num_layers * c.num_heads * c.head_width for c in (self, self.decoder))
        used = [self.modality(name) for name in modalities]
        pretraining = self.architecture == PRETRAINING
        seen = {one.name: one.visible if pretraining else one.tokens for one in used}
        groups = [FlopsGroup("stack", sum(seen.values()))]
        for one in used:
            head = f"decoder_{one.name}"
            groups += [
                FlopsGroup("attention of the trunk", seen[one.name], trunk),
                FlopsGroup(f"patcher_{one.name}/", one.tokens),
                FlopsGroup(f"{head}/embed", seen[one.name]),
                FlopsGroup(f"{head}/", one.tokens, decoder if pretraining else 0),
            ]
        return (*groups, FlopsGroup("", 1))


def cut_grid(modality: GridModality, values: jax.Array) -> tuple[jax.Array, None]:
    """Arrays [B, *size, C] to patches float32 [B, T, K], the channels last; and no centres."""
    x = (values.astype(jnp.float32) - modality.mean) / modality.std
    batch, axes = x.shape[0], len(modality.grid)
    pairs = [n for both in zip(modality.grid, modality.patch, strict=True) for n in both]
    x = x.reshape(batch, *pairs, modality.channels)
    outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    x = x.transpose(0, *outer, *inner, 2 * axes + 1)
    return x.reshape(batch, modality.tokens, modality.outputs), None


def cut_bytes(modality: ByteModality, values: jax.Array) -> tuple[jax.Array, None]:
    """Bytes uint8 [B, T] to one-hot vectors float32 [B, T, 256]; and no centres.

    Raises UserError for another dtype, whose values need not be bytes."""
    if values.dtype != np.uint8:
        raise UserError(
            f"arrays of {modality.name!r} have dtype {values.dtype}, but those of a ByteModality "
            "must be uint8"
        )
    return jax.nn.one_hot(values, modality.outputs), None


def group_points(modality: PointModality, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Point clouds [B, points, 3] to groups of points relative to their centres, float32 [B, G,
    N * 3], and the centres [B, G, 3].

    Each centre is the point farthest from those before it, and its group the nearest points.
    """

    def one(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        def distances(centre: jax.Array) -> jax.Array:
            return jnp.square(points - centre[None]).sum(axis=1)

        def next_centre(nearest: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            centre = points[jnp.argmax(nearest)]
            return jnp.minimum(nearest, distances(centre)), centre

        first = points[jnp.argmax(distances(points.mean(axis=0)))]
        _, others = jax.lax.scan(next_centre, distances(first), length=modality.groups - 1)
        centres = jnp.concatenate([first[None], others])
        apart = jax.vmap(distances)(centres)
        _, near = jax.lax.top_k(-apart, modality.group_size)
        return (points[near] - centres[:, None]).reshape(modality.groups, -1), centres

    return jax.vmap(one)(values.astype(jnp.float32))


def squared_error(
    modality: GridModality, predicted_BTK: jax.Array, target_BTK: jax.Array
) -> jax.Array:
    """Mean squared error of each patch, float32 [B, T]."""
    if modality.norm_pix_loss:
        mean_BT1 = target_BTK.mean(axis=-1, keepdims=True)
        variance_BT1 = target_BTK.var(axis=-1, ddof=1, keepdims=True)
        target_BTK = (target_BTK - mean_BT1) / jnp.sqrt(variance_BT1 + NORM_PIX_EPS)
    return jnp.square(predicted_BTK - target_BTK).mean(axis=-1)


def byte_error(
    modality: ByteModality, predicted_BTK: jax.Array, target_BTK: jax.Array
) -> jax.Array:
    """Cross-entropy of each byte in nats, float32 [B, T]."""
    return -(target_BTK * jax.nn.log_softmax(predicted_BTK)).sum(axis=-1)


def chamfer_distance(
    modality: PointModality, predicted_BTK: jax.Array, target_BTK: jax.Array
) -> jax.Array:
    """Chamfer distance of each group, float32 [B, T]: the mean squared distance of a point to the
    nearest of the other set, from both sides."""
    shape = (*predicted_BTK.shape[:2], modality.group_size, 3)
    ours, theirs = predicted_BTK.reshape(shape), target_BTK.reshape(shape)
    apart = jnp.square(ours[:, :, :, None] - theirs[:, :, None]).sum(axis=-1)
    return apart.min(axis=3).mean(axis=2) + apart.min(axis=2).mean(axis=2)


CUT: dict[type, Any] = {
    GridModality: cut_grid,
    ByteModality: cut_bytes,
    PointModality: group_points,
}
"""From arrays to tokens, and the centres of these where the data say where they are."""
ERROR: dict[type, Any] = {
    GridModality: squared_error,
    ByteModality: byte_error,
    PointModality: chamfer_distance,
}
"""The error of each token."""


def sincos_positions(grid: tuple[int, ...], width: int) -> np.ndarray:
    """Fixed positions float32 [T, width]: an equal share of sines and cosines for each axis, and
    zeros in what is left."""
    half = width // (2 * len(grid))
    frequency = 1.0 / SINCOS_BASE ** (np.arange(half) / half)
    places = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1)
    angle = (places[:, :, None] * frequency).reshape(len(places), -1)
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.pad(waves, ((0, 0), (0, width - waves.shape[1]))).astype(np.float32)


class Mlp(nn.Module):
    """Two layers, [B, T, K] to [B, T, width]."""

    inputs: int
    width: int
    dtype: jnp.dtype
    init_std: float

    def setup(self) -> None:
        spec, std = "BTD,DE->BTE", self.init_std
        inner, outer = (self.inputs, self.width), (self.width, self.width)
        self.up = Linear(spec, inner, ("channels", "features"), self.dtype, init_std=std)
        self.down = Linear(spec, outer, ("features", "embed"), self.dtype, init_std=std)

    def __call__(self, x_BTK: jax.Array) -> jax.Array:
        return self.down(nn.gelu(self.up(x_BTK)))


class ModalityPositions(nn.Module):
    """Positions [B or 1, T, width] of tokens: a fixed table, or a map of their centres."""

    modality: Modality
    width: int
    dtype: jnp.dtype
    init_std: float

    @nn.compact
    def __call__(self, centres_BTC: jax.Array | None) -> jax.Array:
        if centres_BTC is not None:
            return Mlp(3, self.width, self.dtype, self.init_std, name="centres")(centres_BTC)
        table_TD = sincos_positions(self.modality.grid, self.width)
        return jnp.asarray(table_TD, self.dtype)[None]


class Patcher(nn.Module):
    """Tokens of a modality with their positions."""

    config: MultimodalMaeConfig
    modality: Modality
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens_BTK: jax.Array, centres_BTC: jax.Array | None) -> jax.Array:
        """[B, T, K] to [B, T, D]."""
        c, m = self.config, self.modality
        if centres_BTC is None:
            embed = Linear(
                "BTK,KD->BTD",
                (m.outputs, c.hidden_size),
                ("channels", "embed"),
                dtype=self.dtype,
                init_std=c.init_std,
                name="embed",
            )
            x_BTD = embed(tokens_BTK)
        else:  # a small PointNet: a map of each point, and the maximum over the group
            batch, groups = tokens_BTK.shape[:2]
            points = Mlp(3, c.hidden_size, self.dtype, c.init_std, name="points")(
                tokens_BTK.reshape(batch, -1, 3)
            )
            x_BTD = points.reshape(batch, groups, -1, c.hidden_size).max(axis=2)
        positions = ModalityPositions(m, c.hidden_size, self.dtype, c.init_std, name="position")
        return x_BTD + positions(centres_BTC)


class LightDecoder(nn.Module):
    """Hidden states of visible tokens to the values of all tokens of a modality."""

    config: MultimodalMaeConfig
    modality: Modality
    compute: ComputeConfig

    def setup(self) -> None:
        c, inner, m = self.config, self.config.decoder, self.modality
        dtype, width, std = jnp.dtype(self.compute.dtype), inner.hidden_size, c.init_std
        axes = ("embed", "features")
        self.embed = Linear("BTD,DE->BTE", (c.hidden_size, width), axes, dtype, init_std=std)
        self.mask_token = Vectors((width,), ("embed",), truncated_normal(std), dtype)
        self.position = ModalityPositions(m, width, dtype, std)
        self.stack = make_stack(inner, self.compute, TransformerBlock)
        self.norm = make_norm(inner, dtype)
        self.predict = Linear("BTD,DE->BTE", (width, m.outputs), axes, dtype, init_std=std)

    def __call__(
        self,
        hidden_BVD: jax.Array,
        restore_BT: jax.Array,
        centres_BTC: jax.Array | None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """float32 [B, T, K]."""
        x_BVD = self.embed(hidden_BVD)
        missing = restore_BT.shape[1] - x_BVD.shape[1]
        shape = (len(x_BVD), missing, x_BVD.shape[2])
        x_BTD = jnp.concatenate([x_BVD, jnp.broadcast_to(self.mask_token(), shape)], axis=1)
        x_BTD = jnp.take_along_axis(x_BTD, restore_BT[:, :, None], axis=1)
        x_BTD = constrain(x_BTD + self.position(centres_BTC), HIDDEN)
        x_BTD, _ = self.stack(x_BTD, LayerInputs(), deterministic=deterministic)
        return self.predict(self.norm(x_BTD)).astype(jnp.float32)


class MultimodalMaeModel(nn.Module):
    """The patchers and the trunk, and the base of the models with heads."""

    config: MultimodalMaeConfig
    compute: ComputeConfig = ComputeConfig()

    inputs: ClassVar[tuple[str, ...]] = ("signals",)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, Any]:
        """One array of zeros of each modality."""
        zeros = {one.name: jnp.zeros((1, *one.shape), one.dtype) for one in self.config.modalities}
        return {"signals": zeros}

    def setup(self) -> None:
        c = self.config
        for one in c.modalities:
            setattr(self, f"patcher_{one.name}", Patcher(c, one, self.dtype))
        self.stack = make_stack(c, self.compute, TransformerBlock)
        self.final_norm = make_norm(c, self.dtype)

    def cut(self, modality: str, values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Tokens [B, T, K] of arrays, and their centres if they have such.

        Raises UserError for arrays of another shape than the config says, and for bytes of another
        dtype than uint8."""
        one = self.config.modality(modality)
        if values.shape[1:] != one.shape:
            raise UserError(
                f"arrays of {modality!r} have shape {list(values.shape[1:])}, but the model's are "
                f"{list(one.shape)}"
            )
        return CUT[type(one)](one, values)

    def encode(self, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """The shared layers and the final norm."""
        x_BTD, _ = self.stack(constrain(x_BTD, HIDDEN), LayerInputs(), deterministic=deterministic)
        return self.final_norm(x_BTD)

    def hidden_states(
        self, signals: dict[str, jax.Array], *, deterministic: bool = True
    ) -> HiddenStates:
        """Hidden states [B, T, D] of arrays by modality, all tokens visible. Modalities do not see
        each other; their tokens follow one another in the order of the names."""
        found = []
        for name in sorted(signals):
            x_BTD = getattr(self, f"patcher_{name}")(*self.cut(name, signals[name]))
            found.append(self.encode(x_BTD, deterministic=deterministic))
        return HiddenStates(jnp.concatenate(found, axis=1))

    def __call__(self, signals: dict[str, jax.Array], *, deterministic: bool = True) -> ModelOutput:
        """Hidden states of all modalities; see ``hidden_states``."""
        states = self.hidden_states(signals, deterministic=deterministic)
        return ModelOutput(last_hidden_state=states.last_hidden_state)


class MultimodalMaeForPreTraining(MultimodalMaeModel):
    """The trunk and a light decoder for each modality."""

    def setup(self) -> None:
        super().setup()
        for one in self.config.modalities:
            decoder = LightDecoder(self.config, one, self.compute)
            setattr(self, f"decoder_{one.name}", decoder)

    def masked_errors(
        self,
        values: jax.Array,
        noise_BT: jax.Array,
        *,
        modality: str,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """The error of each token, float32 [B, T], and a mask float32 [B, T], 1 at masked tokens.

        ``values``: arrays of the modality. ``noise_BT``: the tokens with most noise are masked; of
        tubes the noise of their first token counts.
        """
        one = self.config.modality(modality)
        tokens_BTK, centres_BTC = self.cut(modality, values)
        x_BTD = getattr(self, f"patcher_{modality}")(tokens_BTK, centres_BTC)
        tubes = one.tokens // one.masked_together
        # Tokens of a tube have equal noise, and sorting keeps their order.
        noise_BT = jnp.tile(noise_BT[:, :tubes], (1, one.masked_together))
        visible_BV, mask_BT, restore_BT = keep_least_noise(noise_BT, one.visible)
        x_BVD = jnp.take_along_axis(x_BTD, visible_BV[:, :, None], axis=1)
        hidden_BVD = self.encode(x_BVD, deterministic=deterministic)
        decoder = getattr(self, f"decoder_{modality}")
        predicted_BTK = decoder(hidden_BVD, restore_BT, centres_BTC, deterministic=deterministic)
        return ERROR[type(one)](one, predicted_BTK, tokens_BTK), mask_BT

    def num_tokens(self, *, modality: str, deterministic: bool = True) -> int:
        """Number of tokens of an array of a modality."""
        return self.config.modality(modality).tokens

    def __call__(self, signals: dict[str, jax.Array], *, deterministic: bool = True) -> ModelOutput:
        for name, values in signals.items():  # creates the decoders
            noise_BT = jnp.zeros((len(values), self.config.modality(name).tokens), jnp.float32)
            self.masked_errors(values, noise_BT, modality=name, deterministic=deterministic)
        return super().__call__(signals, deterministic=deterministic)


class MultimodalMaeForClassification(MultimodalMaeModel):
    """Labels an array of any one modality by the mean of its tokens."""

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, self.config.num_labels)

    def classify(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, labels] of hidden states [B, T, D]."""
        pooled_BD = hidden_BTD.mean(axis=1, dtype=jnp.float32).astype(hidden_BTD.dtype)
        return classify_vectors(self.classification_head, pooled_BD)

    def __call__(self, signals: dict[str, jax.Array], *, deterministic: bool = True) -> ModelOutput:
        states = self.hidden_states(signals, deterministic=deterministic)
        self.classify(states.last_hidden_state)
        return ModelOutput(last_hidden_state=states.last_hidden_state)


def from_huggingface(config: Mapping[str, Any]) -> MultimodalMaeConfig:
    """The default config of an architecture; there is no config.json of this family to read."""
    return MultimodalMaeConfig(architecture=config["architectures"][0])


FAMILY = Family(
    config=MultimodalMaeConfig,
    architectures={
        PRETRAINING: MultimodalMaeForPreTraining,
        CLASSIFIER: MultimodalMaeForClassification,
    },
    only_here=(PRETRAINING, CLASSIFIER),
    from_huggingface=from_huggingface,
)
