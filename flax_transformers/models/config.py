"""Frozen descriptions of a transformer: what it computes, and how that is carried out.

A family's config is a dataclass below one of these. Its fields are what families share; what one
family does in its own way it says by overriding a method (``make_norm``, ``make_stack`` ...), so
that the shared modules need no flag for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.former_names import former_attribute
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from flax_transformers.models.kernels.dispatch import Kernel
from flax_transformers.models.layers.block import TransformerBlock
from flax_transformers.models.layers.embeddings import Embedding
from flax_transformers.models.layers.feed_forward import Activation
from flax_transformers.models.layers.kv_cache import Cache, next_positions
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.models.layers.positions import Rope, positions_from_segments, rotary_tables
from flax_transformers.models.layers.stack import Stack
from flax_transformers.ranges import Ranges

# TPU lanes are 128 wide, and 128 divides over every mesh people use.
VOCABULARY_MULTIPLE = 128


_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": ("xla", "splash or xla", "splash"),
    "gpu": ("cudnn or xla", "cudnn", "xla"),
    "tpu": ("splash or xla", "splash", "xla"),
}
"""What each platform has, the best first."""


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run. It changes the numbers by rounding alone, dtypes most."""

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Activations and matmul inputs; ``auto`` is bfloat16 on accelerators, float32 on CPU."""
    scan_layers: bool = True
    """One compiled layer in a loop (short compiles) or all layers written out (a little faster)."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or all but what linear layers,
    experts and attention kernels for TPUs give, which is kept on the device (``dots``) or in the
    host's memory (``offload``)."""
    gradient_reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What gradients of weights cross the mesh in, in training with bfloat16 activations; they add
    up over micro-batches in float32. With float32 activations they are float32 too."""
    feed_forward_chunk: int | None = None
    """Places of a row on a device that go through a feed-forward at once; the backward pass
    computes each chunk anew, whatever ``remat`` says. None: all at once. A row that this does not
    divide goes through whole, and so does one in which activations drop out."""
    attention: Kernel = "auto"
    """What computes attention; ``auto`` is splash on TPUs and cuDNN on NVIDIA, where they can do
    what a call needs, and else XLA. What is used, and why, is logged."""

    RANGES: ClassVar[Ranges] = {"feed_forward_chunk": ranges.POSITIONS}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "compute")

    def resolve(self, platform: str) -> ComputeConfig:
        """Settles ``auto`` for a platform ("cpu", "gpu", "tpu"); models need it settled.

        Raises UserError for a kernel that the platform does not have. (A CPU interprets that for
        TPUs, slowly: tests do.)
        """
        dtype, attention = self.dtype, self.attention
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        if attention == "auto":
            attention = _KERNELS[platform][0]
        if attention not in _KERNELS[platform]:
            raise UserError(
                f"compute.attention is {attention!r}, which there is not on {platform}; set it "
                "to auto"
            )
        return replace(self, dtype=dtype, attention=attention)


ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

BESIDE_THE_MODEL = frozenset({"problem_type", "hub_fields", "generation", "normalize_embeddings"})
"""Fields of a config that change no output of the model itself, but what is made of it."""


@dataclass(frozen=True)
class InputLimit:
    """What an input of integers [B, T] must keep to: ids below ``below``, at most ``length``
    tokens, None where anything goes; and the fields of the config that say so."""

    below: int | None
    below_field: str
    length: int | None = None
    length_field: str = ""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The layers, whatever goes into them. Changing any field changes the numbers."""

    architectures: ClassVar[Mapping[str, type[nn.Module]]] = {}
    """The modules of a family by their names in Hugging Face."""

    architecture: str = ""
    """The Hugging Face name of the model with its head, such as ``BertForMaskedLM``."""
    hidden_size: int
    """Model width D."""
    num_layers: int
    num_heads: int
    max_positions: int | None = None
    """Longest sequence; None where nothing sets a limit."""
    num_key_value_heads: int | None = None
    """Heads of keys and values that query heads share in groups (arXiv:2305.13245); None: one for
    each query head."""
    head_dim: int | None = None
    """Width of a head; None: the model width over the number of heads."""
    intermediate_size: int
    """Feed-forward width F."""
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    """Norm before each sub-layer (with one more after the last layer), or after each residual."""
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    """``gelu`` is the exact form, ``gelu_tanh`` its tanh approximation."""
    gated: bool = False
    """Gated feed-forward: SwiGLU with silu, GEGLU with gelu (arXiv:2002.05202)."""
    qkv_bias: bool = True
    """Bias vectors of the query, key and value projections."""
    output_bias: bool = True
    """Bias vector of attention's output projection."""
    mlp_bias: bool = True
    """Bias vectors of the feed-forward layers."""
    dropout: float = 0.0
    """Drop rate after embeddings and sub-layers."""
    attention_dropout: float = 0.0
    """Drop rate of attention probabilities."""
    activation_dropout: float = 0.0
    """Drop rate inside the feed-forward, after the activation."""
    classifier_dropout: float | None = None
    """Drop rate before a classification head; None: ``dropout``."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal that kernels and tables start from."""
    scaled_residual_init: bool = False
    """Divides that of a layer's two output projections by ``sqrt(2 * num_layers)``, so that the
    residual stream starts at the same size at any depth (GPT-2)."""
    num_labels: int = 2
    """Outputs of a classification head, where the architecture has one."""
    label_names: tuple[str, ...] = ()
    """Names of these outputs, in order; empty if they have none."""
    problem_type: ProblemType | None = None
    """What the outputs of a classifier of sequences mean. transformers applies a sigmoid to each
    for "multi_label_classification", nothing for "regression", else a softmax."""
    hub_fields: tuple[tuple[str, str], ...] = ()
    """Fields of the config.json that the model was read from which describe no layer, and their
    JSON text; they are written back unchanged."""

    RANGES: ClassVar[Ranges] = {
        "hidden_size": ranges.WIDTH,
        "num_layers": ranges.LAYERS,
        "num_heads": ranges.WIDTH,
        "max_positions": ranges.POSITIONS,
        "num_key_value_heads": ranges.WIDTH,
        "head_dim": ranges.WIDTH,
        "intermediate_size": ranges.WIDTH,
        "norm_eps": ranges.SHARE,
        "dropout": ranges.RATE,
        "attention_dropout": ranges.RATE,
        "activation_dropout": ranges.RATE,
        "classifier_dropout": ranges.RATE,
        "init_std": ranges.numbers(0, 1000),
        "num_labels": ranges.ENTRIES,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not divide by model.num_heads "
                f"{self.num_heads}; choose a width that is a multiple of the number of heads"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} does not divide by model.num_key_value_heads "
                f"{self.kv_heads}; each key-value head serves the same number of heads"
            )
        if self.label_names == tuple(f"LABEL_{i}" for i in range(self.num_labels)):
            object.__setattr__(self, "label_names", ())  # one way to say that they have none
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ValueError(
                f"model.label_names has {len(self.label_names)} names, but model.num_labels is "
                f"{self.num_labels}"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer's attention reaches: a causal one back, the token itself counted, any
        other to each side; None: all the way."""
        return (None,) * self.num_layers

    @property
    def head_dropout(self) -> float:
        """Drop rate before a classification head."""
        return self.dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def residual_init_std(self) -> float:
        """Standard deviation that output projections of sub-layers start from."""
        shrink = (2 * self.num_layers) ** -0.5 if self.scaled_residual_init else 1.0
        return self.init_std * shrink

    def initial_std(self, name: str) -> float:
        """Standard deviation that a kernel or table starts from, by the name of its module.

        The names are ``words``, ``logits`` (a word table of its own for these), those of a layer:
        ``query``, ``key``, ``value``, ``output``, ``up`` (also the gate's), ``down``, and of a
        classifier: ``dense``, ``labels`` (its last).
        """
        return self.residual_init_std if name in ("output", "down") else self.init_std

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied with."""
        return self.head_width**-0.5

    def input_limits(self) -> Mapping[str, InputLimit]:
        """What inputs must keep to, by name: beyond it a table gives NaN."""
        return {}

    def build(self, compute: ComputeConfig) -> nn.Module:
        """The module of the ``architecture``. Raises UserError, naming what there is, for none."""
        if not self.architectures:
            raise TypeError(f"{type(self).__name__} is not a family's config, such as BertConfig")
        if self.architecture not in self.architectures:
            raise UserError(
                f"model.architecture is {self.architecture!r}, which {type(self).__name__} cannot "
                f"be; choose among {', '.join(self.architectures)}"
            )
        return self.architectures[self.architecture](self, compute)

    @property
    def block(self) -> type[TransformerBlock]:
        """The layer, where all are of one kind."""
        return TransformerBlock

    def make_norm(self, dtype: jnp.dtype, name: str | None = None) -> nn.Module:
        """The norm that stands everywhere in the model."""
        return make_norm(self.norm, self.norm_eps, dtype, name)

    def make_stack(
        self, compute: ComputeConfig, *, cross_attention: bool = False, name: str | None = None
    ) -> Stack:
        """The layers; with ``cross_attention`` they also look at ``LayerInputs.context_BSD``."""
        block = partial(self.block, self, compute, cross_attention)
        return Stack(
            pattern=(block,),
            repeats=self.num_layers,
            scan=compute.scan_layers,
            remat=compute.remat,
            name=name,
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A transformer over tokens."""

    vocab_size: int
    """Number of real vocabulary entries; tables are padded up to a multiple of 128."""
    causal: bool = False
    """Tokens see only what came before."""
    positions: Literal["learned", "none"] = "learned"
    """Vectors added to the word vectors; "none" where attention knows positions itself."""
    position_offset: int = 0
    """Row of the learned table that the first position has (2 in RoBERTa and BART)."""
    rope: Rope | None = None
    """Rotary positions inside attention (arXiv:2104.09864)."""
    token_types: int = 0
    """Rows of the token-type table (2 in BERT: sentence A and B), 0 for none."""
    scale_embeddings: bool = False
    """Word vectors are multiplied with ``sqrt(hidden_size)`` (arXiv:1706.03762 §3.4)."""
    embedding_norm: bool = False
    """Norm after the sum of embeddings."""
    tie_embeddings: bool = True
    """The word table also makes the logits."""
    pad_id: int = 0
    """Id of padding tokens, where a model has to know it."""
    generation: GenerationSettings = NO_SETTINGS
    """How the model writes text unless a call says otherwise: its generation_config.json."""

    RANGES: ClassVar[Ranges] = {
        "vocab_size": ranges.ENTRIES,
        "position_offset": ranges.integers(0, 2**20),
        "token_types": ranges.integers(0, 2**20),
        "pad_id": ranges.TOKEN_ID,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "none" and self.max_positions is None:
            raise ValueError(f"model.max_positions is None, but positions are {self.positions}")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def input_limits(self) -> Mapping[str, InputLimit]:
        words = InputLimit(
            self.vocab_size, "model.vocab_size", self.max_positions, "model.max_positions"
        )
        # Without a table, token types are read by nobody.
        types = InputLimit(self.token_types or None, "model.token_types")
        return {"input_ids": words, "token_type_ids": types}

    def make_positions(self, dtype: jnp.dtype) -> nn.Module:
        """Called with integers [B, T], from ``position_offset`` on, it gives the vectors [B, T, D]
        that are added to the words'; NaN beyond the last."""
        rows, axes = (self.max_positions or 0) + self.position_offset, ("positions", "embed")
        return Embedding(rows, self.hidden_size, dtype, axes, self.init_std)

    def position_ids(self, input_ids: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Positions int32 [B, T] where none are given: from 0, starting anew in each segment."""
        one_segment = jnp.ones_like(input_ids)
        return positions_from_segments(one_segment if segment_ids is None else segment_ids)

    def next_position_ids(
        self, input_ids: jax.Array, segment_ids: jax.Array | None, cache: Cache | None
    ) -> jax.Array:
        """``position_ids``, or after what a cache holds the places of its slots."""
        if cache is None:
            return self.position_ids(input_ids, segment_ids)
        return next_positions(input_ids.shape, cache)

    def rotary_tables(self, position_ids: jax.Array) -> Any:
        """What layers need of rotary positions, for their ``LayerInputs.rotary``."""
        return (
            None if self.rope is None else rotary_tables(self.rope, self.head_width, position_ids)
        )


def __getattr__(name: str) -> Any:
    return former_attribute(__name__, name)
