"""The Transformer (Vaswani et al., arXiv:1706.03762), and Marian's weights (arXiv:1804.00344).

Pre-norm layers, learned positions and values of another width than the keys are options of ours
that no published file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families.bart import (
    ALIASES,
    BartFields,
    layer_rows,
    token_tables,
)
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import WeightTable
from flax_transformers.models.config import Activation, EncoderDecoderConfig
from flax_transformers.models.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderForConditionalGeneration,
)
from flax_transformers.models.layers.embeddings import learned_positions
from flax_transformers.models.parts import ModelParts


def sinusoidal_table(max_positions: int, width: int) -> np.ndarray:
    """Fixed positions of the 2017 Transformer, float32 [max_positions, width].

    The first half of the width holds sines and the second half cosines, as in tensor2tensor and
    Marian; arXiv:1706.03762 §3.5 interleaves the two, which is a permutation of the width.
    """
    frequency = 10000.0 ** (-2.0 * np.arange(width // 2) / width)
    angle = np.arange(max_positions)[:, None] * frequency[None, :]
    table = np.zeros((max_positions, width), np.float32)
    table[:, : width // 2] = np.sin(angle)
    table[:, width // 2 : 2 * (width // 2)] = np.cos(angle)
    return table


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "MarianMTModel": EncoderDecoderForConditionalGeneration,
    "MarianModel": EncoderDecoder,
}


@dataclass(frozen=True, kw_only=True)
class MarianConfig(EncoderDecoderConfig):
    """The base model of 2017: post-norm, sinusoidal positions, one table for all tokens."""

    architecture: str = "MarianMTModel"
    vocab_size: int = 37000
    decoder_vocab_size: int | None = None
    """Entries of the target vocabulary, if source and target do not share one."""
    hidden_size: int = 512
    num_layers: int = 6
    num_heads: int = 8
    intermediate_size: int = 2048
    max_positions: int | None = 1024
    sinusoidal: bool = True
    """Fixed sines and cosines (§3.5) instead of learned positions."""
    norm_position: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-5
    activation: Activation = "relu"
    scale_embeddings: bool = True
    logits_bias: bool = True
    dropout: float = 0.1
    classifier_dropout: float | None = 0.0
    value_head_dim: int | None = None
    """Width of a head's values; None: that of its keys, ``head_dim`` (table 3, rows B)."""

    RANGES: ClassVar[ranges.Ranges] = {
        "decoder_vocab_size": ranges.ENTRIES,
        "value_head_dim": ranges.WIDTH,
    }

    def __post_init__(self) -> None:
        if self.decoder_vocab_size == self.vocab_size:
            object.__setattr__(self, "decoder_vocab_size", None)
        if self.decoder_vocab_size is not None and self.share_embeddings:
            raise ranges.OutOfRange(
                f"model.decoder_vocab_size is {self.decoder_vocab_size} and model.vocab_size is "
                f"{self.vocab_size}; set model.share_embeddings to False or make them equal"
            )
        super().__post_init__()

    @property
    def value_width(self) -> int:
        return self.head_width if self.value_head_dim is None else self.value_head_dim

    def decoder_sizes(self) -> dict[str, Any]:
        sizes = {
            "vocab_size": self.decoder_vocab_size or self.vocab_size,
            "decoder_vocab_size": None,
        }
        return super().decoder_sizes() | sizes


class Sinusoids(nn.Module):
    """Vectors [B, T, D] of integer positions [B, T], without parameters; NaN beyond the last."""

    config: MarianConfig
    dtype: jnp.dtype

    def __call__(self, position_ids: jax.Array) -> jax.Array:
        c = self.config
        table_SD = jnp.asarray(sinusoidal_table(c.max_positions or 0, c.hidden_size), self.dtype)
        return jnp.take(table_SD, position_ids, axis=0)


def positions(config: MarianConfig, dtype: jnp.dtype) -> nn.Module:
    """Sinusoids, or the table of learned positions."""
    return Sinusoids(config, dtype) if config.sinusoidal else learned_positions(config, dtype)


_PUBLISHED = MarianConfig(
    vocab_size=58101,
    hidden_size=1024,
    num_layers=12,
    num_heads=16,
    intermediate_size=4096,
    activation="gelu",
    scale_embeddings=False,
    pad_id=58100,
    eos_ids=(0,),
    decoder_start_id=58100,
)
"""Defaults of Marian's config.json."""


def _opus(vocab_size: int) -> MarianConfig:
    """The base model with swish; padding is the last entry and also begins the target."""
    return MarianConfig(
        vocab_size=vocab_size,
        max_positions=512,
        activation="silu",
        pad_id=vocab_size - 1,
        eos_ids=(0,),
        decoder_start_id=vocab_size - 1,
    )


SIZES: dict[str, MarianConfig] = {
    "transformer-base": MarianConfig(),
    "transformer-big": MarianConfig(
        hidden_size=1024,
        num_heads=16,
        intermediate_size=4096,
        dropout=0.3,
    ),
    "opus-mt-en-de": _opus(58101),
    "opus-mt-en-fr": _opus(59514),
    "opus-mt-en-es": _opus(65001),
}
"""Those of the paper, for English to German, and some that Marian translated with."""


_SHARED = {"share_embeddings": "share_encoder_decoder_embeddings"}
_JSON = BartFields(defaults=_PUBLISHED, fixed={"model_type": "marian"})


def from_huggingface(config: Mapping[str, Any]) -> MarianConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    fields = _JSON.fields(config)
    shared = huggingface.read_switches(config, _SHARED, _PUBLISHED)["share_embeddings"]
    fields["share_embeddings"] = fields["tie_embeddings"] and shared
    number = {"decoder_vocab_size": "decoder_vocab_size"}
    other = huggingface.read_numbers(config, number, _PUBLISHED)
    return huggingface.make_config(
        MarianConfig, fields if fields["share_embeddings"] else fields | other
    )


def to_huggingface(config: MarianConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    return {
        **_JSON.write(config),
        "decoder_vocab_size": config.decoder.vocab_size,
        **huggingface.write_fields(config, _SHARED),
    }


def settle(config: MarianConfig, tensors: Mapping[str, Any]) -> MarianConfig:
    """The config as it is. Files hold the tables of positions, which are computed here: more exact
    than in a file of half precision, by up to 1e-3. Raises UserError for a table of anything else.
    """
    table = sinusoidal_table(config.max_positions or 0, config.hidden_size)
    for side in ("encoder", "decoder"):
        for name in (f"{prefix}{side}.embed_positions.weight" for prefix in ("model.", "")):
            found = tensors.get(name)
            if found is None or found.shape != table.shape:
                continue
            rounding = float(jnp.finfo(found.dtype).eps) + 1e-6
            if np.abs(np.asarray(found, np.float32) - table).max() > rounding:
                raise UserError(
                    f"tensor {name} holds other positions than sines and cosines, which this model "
                    "cannot have; it was trained by another program than Marian"
                )
    return config


def weights(config: MarianConfig) -> WeightTable:
    """The names of Marian's tensors."""
    tables, copies = token_tables(config, config.decoder_vocab_size)
    table = WeightTable(
        weights=(*tables, *layer_rows("encoder"), *layer_rows("decoder")),
        copies=copies,
        # Tables that are computed, and one that files keep where nothing uses it.
        ignorable=(
            r"model\.(encoder|decoder)\.embed_positions\.weight",
            *(() if config.share_embeddings else (r"model\.shared\.weight",)),
        ),
        prefix="model.",
    )
    return table.bare() if ARCHITECTURES[config.architecture] is EncoderDecoder else table


FAMILY = Family(
    config=MarianConfig,
    model_types=("marian",),
    architectures=ARCHITECTURES,
    parts=ModelParts(positions=positions),
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
    weights=weights,
    settle=settle,
    aliases=ALIASES,
)
