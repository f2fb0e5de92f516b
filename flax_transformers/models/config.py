"""Frozen descriptions of a transformer: what it computes, and how that is carried out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn

# TPU lanes are 128 wide, and 128 divides over every mesh people use.
VOCABULARY_MULTIPLE = 128

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and choices that families share. Changing any of them changes the numbers."""

    vocab_size: int
    """Number of real vocabulary entries; tables are padded up to a multiple of 128."""
    hidden_size: int
    """Model width D."""
    num_layers: int
    num_heads: int
    intermediate_size: int
    """Feed-forward width F."""
    max_positions: int
    """Longest sequence the position table holds."""
    norm: Literal["layer", "rms"] = "layer"
    norm_place: Literal["pre", "post"] = "pre"
    """Norm before each sub-layer (with one more after the last layer), or after each residual."""
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    """``gelu`` is the exact form, ``gelu_tanh`` its tanh approximation."""
    gated: bool = False
    """Gated feed-forward: SwiGLU with silu, GEGLU with gelu (arXiv:2002.05202)."""
    use_bias: bool = True
    """Bias vectors in linear layers and layer norms."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    token_types: int = 0
    """Rows of the token-type table (2 in BERT: sentence A and B), 0 for none."""
    embedding_norm: bool = False
    """Norm after the sum of embeddings."""
    dropout: float = 0.0
    """Drop rate after embeddings and sub-layers."""
    attention_dropout: float = 0.0
    """Drop rate of attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal that kernels and tables start from."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "intermediate_size", "max_positions")
        for name in ("vocab_size", "num_layers", *sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("token_types", "norm_eps", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must not be negative")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not divide by model.num_heads "
                f"{self.num_heads}; choose a width that is a multiple of the number of heads"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")

    def build(self, execution: Execution) -> nn.Module:
        """The module that a family's config describes; this class alone describes none."""
        raise TypeError(f"{type(self).__name__} is not a family's config, such as BertConfig")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class Execution:
    """How a model is run. Only ``dtype`` changes the numbers, and only by rounding."""

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Activations and matmul inputs; ``auto`` is bfloat16 on accelerators, float32 on CPU."""
    scan_layers: bool = True
    """One compiled layer in a loop (short compiles) or all layers written out (a little faster)."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or all but the matmul outputs."""

    def resolve(self, platform: str) -> Execution:
        """Settles ``auto`` for a platform ("cpu", "gpu", "tpu"); models need it settled."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype="float32" if platform == "cpu" else "bfloat16")
