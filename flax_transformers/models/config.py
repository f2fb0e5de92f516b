"""Configs of models: what a transformer computes, and how it is run.

Configs are data. They import no module of the model and build nothing: the modules read them, and
a family's file says which modules it uses (``Family`` in ``huggingface/family.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings

VOCABULARY_MULTIPLE = 128
"""Vocabulary tables have a multiple of so many rows: the lanes of a TPU, and divisible by every
usual mesh."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
"""``gelu`` is the exact form, ``gelu_tanh`` its tanh approximation, and ``quick_gelu`` its sigmoid
approximation (CLIP)."""

QueryKeyNorm = Literal["none", "shared", "each", "all"]
"""Which heads a norm of queries and keys takes together, and which share its scale; see
``layers.norms.HeadNorm``."""

Kernel = Literal["auto", "xla", "cudnn", "splash", "cudnn or xla", "splash or xla"]
"""Attention kernels. ``xla``: plain operations, on every platform. ``cudnn``: NVIDIA's flash
attention. ``splash``: flash attention for TPUs, JAX's own or, with dropout or a relative position
bias, ours. "... or xla" uses the first kernel where it supports the call. ``auto`` is resolved by
``ComputeConfig.resolve`` and means ``xla`` before that."""

DropoutGenerator = Literal["auto", "hash", "threefry"]

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": ("xla", "splash or xla", "splash"),
    "gpu": ("cudnn or xla", "cudnn", "xla"),
    "tpu": ("splash or xla", "splash", "xla"),
}
"""Attention kernels of each platform, the default first."""

BESIDE_THE_MODEL = frozenset({"hub_fields", "generation", "normalize_embeddings"})
"""Fields of a config that do not change the outputs of the layers."""


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run. It changes the outputs by rounding only, except for dropout masks."""

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Dtype of activations and matmul inputs; ``auto`` is bfloat16 on accelerators, and where a run
    begins on one CPU device whose processor has instructions for it, otherwise float32."""
    scan_layers: bool = True
    """Compile one layer and loop over it (short compile times), or unroll all layers (slightly
    faster)."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or everything except the outputs of
    linear layers, experts and TPU attention kernels, which are kept on the device (``dots``) or in
    host memory (``offload``)."""
    gradient_reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of gradient reductions across devices, in training with bfloat16 activations. Gradients
    are summed over micro-batches in float32. With float32 activations it is float32."""
    feed_forward_chunk: int | None = None
    """Number of positions per sequence and device that pass through a feed-forward layer at once;
    the backward pass recomputes each chunk, whatever ``remat`` is. None: all at once. A length that
    this does not divide is not chunked, and neither is a layer with active dropout inside."""
    attention: Kernel = "auto"
    """Attention kernel; ``auto`` is splash on TPUs and cuDNN on NVIDIA GPUs where they support the
    call, otherwise XLA. The kernel used, and the reason, is logged."""
    dropout_generator: DropoutGenerator = "auto"
    """What draws dropout masks: JAX's ``threefry``, or a ``hash`` of the index, which is faster and
    lets TPU kernels apply attention dropout; ``auto``: as the run began, ``hash`` in a new run."""

    RANGES: ClassVar[ranges.Ranges] = {"feed_forward_chunk": ranges.POSITIONS}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "compute")

    def resolve(self, platform: str) -> ComputeConfig:
        """Replace ``auto`` by the values for a platform ("cpu", "gpu", "tpu").

        Raises UserError for a kernel that is not available on the platform. (On CPU the TPU kernel
        runs interpreted, for tests.)
        """
        dtype, attention = self.dtype, self.attention
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        attention = _KERNELS[platform][0] if attention == "auto" else attention
        if attention not in _KERNELS[platform]:
            raise UserError(
                f"compute.attention is {attention!r}, which is not available on {platform}; set it "
                "to auto"
            )
        return replace(self, dtype=dtype, attention=attention)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (RoFormer, arXiv:2104.09864) and how they extend to longer sequences.

    ``linear`` divides positions by ``factor`` (arXiv:2306.15595). ``llama3`` and ``yarn`` divide
    only the low frequencies: with a ramp over wavelengths between two parts of
    ``original_max_positions`` (Llama 3.1, arXiv:2407.21783), or over frequency pairs between two
    numbers of turns in it, ``low_frequency_factor`` and ``high_frequency_factor``, rounded outward
    to whole pairs if ``truncate`` (YaRN, arXiv:2309.00071). YaRN multiplies queries and keys by
    ``attention_factor``, None for ``0.1 log(factor) + 1``.

    ``dynamic`` raises ``theta`` with the length of a sequence beyond ``original_max_positions``
    ("dynamic NTK"), so that shorter ones, in training too, are as without it. The length is the
    highest position of the row (in transformers that of the batch): of a packed row that of its
    longest example, without padding. Under an ``attention_mask`` alone, padding behind a text
    counts, as in transformers. With a cache, each call counts up to its own last token, and cached
    keys keep their rotation.
    """

    theta: float = 10000.0
    interleaved: bool = False
    """Rotate features 2i and 2i + 1, as in the paper, instead of i and i + H/2."""
    scaling: Literal["none", "linear", "llama3", "yarn", "dynamic"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float | None = None
    truncate: bool = True

    RANGES: ClassVar[ranges.Ranges] = {
        "theta": ranges.numbers(1, 1e12),
        "factor": ranges.numbers(0, 1e6, above=True),
        "low_frequency_factor": ranges.numbers(0, 1e6, above=True),
        "high_frequency_factor": ranges.numbers(0, 1e6, above=True),
        "original_max_positions": ranges.POSITIONS,
        "attention_factor": ranges.numbers(0, 1e6, above=True),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model.rope")


@dataclass(frozen=True)
class InputLimit:
    """Limits of an integer input [B, T]: ids below ``below``, at most ``length`` tokens; None for
    no limit. ``below_field`` is the config field that sets the first."""

    below: int | None
    below_field: str
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Fields of a stack of transformer layers, for text and images. Each changes the outputs."""

    architecture: str = ""
    """Hugging Face name of the model with its head, such as ``BertForMaskedLM``."""
    hidden_size: int
    """Model width D."""
    num_layers: int
    num_heads: int
    max_positions: int | None = None
    """Longest sequence; None for no limit. Scaled rotary positions may extend it."""
    num_key_value_heads: int | None = None
    """Number of key and value heads, each shared by a group of query heads (arXiv:2305.13245);
    None: one for each query head."""
    head_dim: int | None = None
    """Width of a head; None: ``hidden_size / num_heads``."""
    intermediate_size: int
    """Feed-forward width F."""
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    """Norm before each sub-layer (and one after the last layer), or after each residual sum."""
    norm_eps: float = 1e-6
    norm_bias: bool = True
    """Bias vectors of layer norms."""
    norm_offset: ClassVar[float] = 0.0
    """Added to the scale parameter of RMS norms (1 in Gemma)."""
    activation: Activation = "gelu"
    gated: bool = False
    """Gated feed-forward: SwiGLU with silu, GEGLU with gelu (arXiv:2002.05202)."""
    qkv_bias: bool = True
    """Bias vectors of the query, key and value projections."""
    output_bias: bool = True
    """Bias vector of attention's output projection."""
    mlp_bias: bool = True
    """Bias vectors of the feed-forward layers."""
    dropout: float = 0.0
    """Dropout rate after embeddings and sub-layers."""
    attention_dropout: float = 0.0
    """Dropout rate of attention probabilities."""
    activation_dropout: float = 0.0
    """Dropout rate inside the feed-forward, after the activation."""
    classifier_dropout: float | None = None
    """Dropout rate before a classification head; None: ``dropout``."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal that initialises kernels and tables."""
    scaled_residual_init: bool = False
    """Divide it by ``sqrt(2 * num_layers)`` for the two output projections of a layer, so that the
    scale of the residual stream at initialisation does not depend on depth (GPT-2)."""
    num_labels: int = 2
    """Number of outputs of a classification head, if the architecture has one."""
    label_names: tuple[str, ...] = ()
    """Names of these outputs, in order; may be empty."""
    problem_type: ProblemType | None = None
    """Meaning of the outputs of a sequence classifier. transformers applies a sigmoid to each for
    "multi_label_classification", nothing for "regression", otherwise a softmax."""
    hub_fields: tuple[tuple[str, str], ...] = ()
    """Fields of the config.json that the model was read from which describe no layer, with their
    JSON text; they are written back unchanged."""

    RANGES: ClassVar[ranges.Ranges] = {
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
            raise ranges.OutOfRange(
                f"model.hidden_size {self.hidden_size} does not divide by model.num_heads "
                f"{self.num_heads}; choose a width that is a multiple of the number of heads"
            )
        if self.num_heads % self.kv_heads:
            raise ranges.OutOfRange(
                f"model.num_heads {self.num_heads} does not divide by model.num_key_value_heads "
                f"{self.kv_heads}; each key-value head serves the same number of heads"
            )
        if self.label_names == tuple(f"LABEL_{i}" for i in range(self.num_labels)):
            object.__setattr__(self, "label_names", ())  # the default names of transformers
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ranges.OutOfRange(
                f"model.label_names has {len(self.label_names)} names, but model.num_labels is "
                f"{self.num_labels}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of a head's values."""
        return self.head_width

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer: in causal models the number of tokens up to and including
        the query, otherwise the number to each side; None: no window."""
        return (None,) * self.num_layers

    @property
    def head_dropout(self) -> float:
        """Dropout rate before a classification head."""
        return self.dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def residual_init_std(self) -> float:
        """Standard deviation that initialises the output projections of sub-layers."""
        shrink = (2 * self.num_layers) ** -0.5 if self.scaled_residual_init else 1.0
        return self.init_std * shrink

    def initial_std(self, name: str) -> float:
        """Standard deviation that initialises a kernel or table, by the name of its module.

        The names are ``words``, ``logits`` (an untied output table), those of a layer (``query``,
        ``key``, ``value``, ``output``, ``up``, which is also the gate's, ``down``), and those of a
        classifier: ``dense`` and ``labels`` (its last layer).
        """
        return self.residual_init_std if name in ("output", "down") else self.init_std

    @property
    def key_bias(self) -> bool:
        """Bias vector of the key projection, which softmax does not see."""
        return self.qkv_bias

    @property
    def length_limit(self) -> int | None:
        """Longest sequence, which scaled rotary positions extend; None for no limit."""
        length, rope = self.max_positions, getattr(self, "rope", None)
        if length is None or rope is None or getattr(self, "positions", "none") != "none":
            return length  # a table of positions has no further rows
        if rope.scaling == "dynamic":
            return None
        # A file with "linear" has the length before scaling or that after it; both are allowed.
        scaled = {"linear": length, "yarn": rope.original_max_positions}
        return max(length, int(rope.factor * scaled.get(rope.scaling, 0)))

    @property
    def image_encoder(self) -> VisionConfig | None:
        """The part that reads images."""
        return None

    def row_flops(self, size: int, modalities: Sequence[str] = ()) -> tuple[FlopsGroup, ...] | None:
        """Groups of kernels of an image of ``size`` pixels, or these modalities; None for text."""
        return None

    @property
    def attention_width(self) -> int:
        """Number of heads times head width, the mean of keys' and values', summed over layers."""
        return self.num_layers * self.num_heads * (self.head_width + self.value_width) // 2

    @property
    def layer_uses(self) -> int:
        """How often a token passes through each layer of parameters (ALBERT's are shared)."""
        return 1

    # Options of some decoders, whose configs have fields of these names.
    @property
    def attention_scale(self) -> float:
        """Factor on attention scores."""
        return self.head_width**-0.5

    @property
    def attention_softcap(self) -> float | None:
        """Bound c of attention scores s, as c * tanh(s / c) (Gemma 2); None for none."""
        return None

    @property
    def query_key_norm(self) -> QueryKeyNorm:
        """Norm of queries and keys before their rotation."""
        return "none"

    def input_limits(self) -> Mapping[str, InputLimit]:
        """Limits of the inputs, by name; tokens, positions and types beyond them give NaN."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A transformer over tokens."""

    vocab_size: int
    """Number of real vocabulary entries; tables are padded to a multiple of 128."""
    causal: bool = False
    """Tokens attend only to earlier tokens and themselves."""
    positions: Literal["learned", "none"] = "learned"
    """Position vectors added to the token embeddings; "none" for models with positions inside
    attention."""
    position_offset: int = 0
    """Row of the position table for the first position (2 in RoBERTa and BART)."""
    rope: Rope | None = None
    """Rotary positions inside attention (arXiv:2104.09864)."""
    token_types: int = 0
    """Rows of the token-type table (2 in BERT: sentences A and B); 0 for no table."""
    scale_embeddings: bool = False
    """Multiply token embeddings by ``sqrt(hidden_size)`` (arXiv:1706.03762 §3.4)."""
    embedding_norm: bool = False
    """Norm after the sum of embeddings."""
    tie_embeddings: bool = True
    """The embedding table is also the output table of the logits."""
    pad_id: int = 0
    """Id of padding tokens."""
    generation: GenerationSettings = NO_SETTINGS
    """Default generation settings, from generation_config.json."""

    @property
    def filler_id(self) -> int:
        """An id that fills rows where a mask says that there is nothing; one of the vocabulary."""
        return self.pad_id if 0 <= self.pad_id < self.decoder.vocab_size else 0

    RANGES: ClassVar[ranges.Ranges] = {
        "vocab_size": ranges.ENTRIES,
        "position_offset": ranges.integers(0, 2**20),
        "token_types": ranges.integers(0, 2**20),
        "pad_id": ranges.TOKEN_ID,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "none" and self.max_positions is None:
            raise ranges.OutOfRange(
                f"model.max_positions is None, but positions are {self.positions}"
            )
        if self.rope is not None and self.head_width % 2:
            raise ranges.OutOfRange(
                f"heads are {self.head_width} wide, but rotary positions need an even width; set "
                "model.head_dim, or another model.hidden_size or model.num_heads"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows V of vocabulary tables."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def embedding_width(self) -> int:
        """Width E of the embedding tables, and of what heads multiply with them."""
        return self.hidden_size

    @property
    def project_embeddings(self) -> bool:
        """Whether a linear layer leads from embeddings to the layers."""
        return self.embedding_width != self.hidden_size

    @property
    def decoder(self) -> Self:
        """The part that writes, as a config of its own."""
        return self

    @property
    def ends_in_embedding(self) -> bool:
        """Whether a text's embedding is that of its end token: what follows changes nothing."""
        return False

    @property
    def framing(self) -> str:
        """Special tokens around labelled texts; see ``objectives.labelled.Framing``."""
        return "llama" if self.causal else "bert"

    # What heads read; some families have fields of these names.
    @property
    def logit_scale(self) -> float:
        """Factor on the logits of the vocabulary."""
        return 1.0

    @property
    def logit_softcap(self) -> float | None:
        """Bound c of these logits l, as c * tanh(l / c) (Gemma 2); None for none."""
        return None

    @property
    def head_activation(self) -> Activation:
        """Activation of the transform before the logits of a masked language model."""
        return self.activation

    @property
    def head_bias(self) -> bool:
        """Whether the linear layer of this transform has a bias vector."""
        return True

    @property
    def decoder_bias(self) -> bool:
        """Whether the logits of a masked language model have a bias for each vocabulary entry."""
        return True

    @property
    def pooling(self) -> Literal["cls", "mean"]:
        """Input of sequence classifiers and sentence embeddings: first token, or mean of all."""
        return "cls"

    @property
    def normalize_embeddings(self) -> bool | None:
        """Whether sentence embeddings have length 1; None for a model that is no sentence
        encoder."""
        return None

    def input_limits(self) -> Mapping[str, InputLimit]:
        tokens = InputLimit(self.vocab_size, "model.vocab_size", self.length_limit)
        # Without a table, token types are not read.
        types = InputLimit(self.token_types or None, "model.token_types")
        return {"input_ids": tokens, "token_type_ids": types}


_OF_DECODER = {
    "num_layers": "num_decoder_layers",
    "num_heads": "num_decoder_heads",
    "intermediate_size": "decoder_intermediate_size",
}
"""Fields of a decoder of other sizes than the encoder."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TextConfig):
    """An encoder, and a decoder that attends to the encoder's output.

    The fields of ``TextConfig`` describe the encoder, and also the decoder unless it has a field of
    its own that is not None.
    """

    num_decoder_layers: int | None = None
    num_decoder_heads: int | None = None
    decoder_intermediate_size: int | None = None
    share_embeddings: bool = True
    """Encoder and decoder share one embedding table. ``tie_embeddings`` refers to the decoder's."""
    logits_bias: bool = False
    """Add a constant for each vocabulary entry to the logits; it comes from files, not training."""
    decoder_start_id: int | None = None
    """First input id of the decoder, if it is always the same."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (1,)
    """Ids at the start and the end of a sequence."""

    RANGES: ClassVar[ranges.Ranges] = {
        "num_decoder_layers": ranges.LAYERS,
        "num_decoder_heads": ranges.WIDTH,
        "decoder_intermediate_size": ranges.WIDTH,
        "decoder_start_id": ranges.integers(0, 2**24),
        "bos_id": ranges.TOKEN_ID,
        "eos_ids": ranges.TOKEN_ID,
    }
    output_dropout: ClassVar[bool] = False
    """Dropout after the final norm (T5)."""

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model")
        if self.causal:
            raise ranges.OutOfRange(
                "model.causal is True, but an encoder attends to its whole input; leave it out, "
                "the decoder is causal in any case"
            )
        if self.architecture.endswith("ForQuestionAnswering"):  # start and end logits
            object.__setattr__(self, "num_labels", 2)
            object.__setattr__(self, "label_names", ())
        super().__post_init__()
        for name, of_decoder in _OF_DECODER.items():
            if getattr(self, of_decoder) == getattr(self, name):  # equal models, equal configs
                object.__setattr__(self, of_decoder, None)
        sizes = self.decoder_sizes()
        if any(getattr(self, name) != value for name, value in sizes.items()):
            replace(self, **sizes)  # checks the decoder's sizes and ids
            return
        for name in ("pad_id", "decoder_start_id"):
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                raise ranges.OutOfRange(
                    f"model.{name} is {value}, but the decoder's vocabulary has only ids below "
                    f"{self.vocab_size}; choose one of these"
                )

    def input_limits(self) -> Mapping[str, InputLimit]:
        limits = dict(super().input_limits())
        if not self.causal:
            own = "" if self.decoder.vocab_size == self.vocab_size else "decoder_"
            tokens = self.decoder.input_limits()["input_ids"]
            limits["decoder_input_ids"] = replace(tokens, below_field=f"model.{own}vocab_size")
        return limits

    def decoder_sizes(self) -> dict[str, Any]:
        """Fields in which the decoder may differ, under the encoder's names."""
        sizes = {of: getattr(self, own) or getattr(self, of) for of, own in _OF_DECODER.items()}
        return sizes | dict.fromkeys(_OF_DECODER.values())

    @property
    def decoder(self) -> Self:
        """The decoder as a config of its own: the same fields with the decoder's sizes."""
        if self.causal:
            return self
        decoder = replace(self, **self.decoder_sizes())
        object.__setattr__(decoder, "causal", True)  # not allowed in any other config
        return decoder

    @property
    def target_starts_with_language(self) -> bool:
        """Whether the decoder's first input is the last label, a language id (mBART)."""
        return False

    def initial_std(self, name: str) -> float:
        # Scaled embeddings start at variance one, and so do the logits.
        if name in ("words", "logits") and self.scale_embeddings:
            return self.hidden_size**-0.5
        return super().initial_std(name)


@dataclass(frozen=True)
class FlopsGroup:
    """How many tokens of an image pass through the kernels below ``path``; "" for all others.

    ``attention``: number of heads times head width, summed over the layers of the group.
    """

    path: str
    tokens: int
    attention: int = 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A transformer over the patches of an image."""

    image_size: int | tuple[int, int] = 224
    """Side of the image in pixels, or height and width."""
    patch_size: int = 16
    """Side of a patch in pixels; an incomplete patch at the right or bottom edge is cut off."""
    num_channels: int = 3
    pooling: Literal["class", "average", "attention"] = "class"
    """Input of a classifier: the class token; or, unless a family says otherwise without one, the
    mean of all patches, or what a learned query attends to (``PoolingHead``)."""
    positions: Literal["learned", "sincos_2d"] = "learned"
    """A learned vector for each position, or fixed sines and cosines (``sincos_table``)."""
    drop_path: float = 0.0
    """Probability of skipping a sub-layer of the last layer in training (stochastic depth); it
    rises linearly from 0 in the first layer."""
    patch_bias: ClassVar[bool] = True
    """Bias vector of the map of patches."""

    RANGES: ClassVar[ranges.Ranges] = {
        "image_size": ranges.PIXELS,
        "patch_size": ranges.PIXELS,
        "num_channels": ranges.integers(1, 1024),
        "drop_path": ranges.RATE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.grid) < 1:
            raise ranges.OutOfRange(
                f"model.image_size {self.image_size} is less than one patch of model.patch_size "
                f"{self.patch_size}"
            )
        if self.positions == "sincos_2d" and self.hidden_size % 4:
            raise ranges.OutOfRange(
                f"model.hidden_size {self.hidden_size} does not divide by 4, as sincos_2d "
                "positions need"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of the learned tokens before the patches."""
        return ("class_token",) if self.pooling == "class" else ()

    @property
    def feature_pool(self) -> Literal["mean", "cls"]:
        """The features of an image: the mean of its patches, or the class token."""
        return "cls" if self.pooling == "class" else "mean"

    @property
    def token_positions(self) -> int:
        """Rows at the start of the position table that belong to these tokens."""
        return len(self.tokens)

    def position_grids(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Grids (rows, columns) of position tables, by the last two names on their path."""
        return {("position", "embedding"): self.grid}

    @property
    def image_encoder(self) -> VisionConfig | None:
        return self

    def row_flops(self, size: int, modalities: Sequence[str] = ()) -> tuple[FlopsGroup, ...]:
        return self.flops_groups((size // self.patch_size,) * 2)

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """Groups of kernels for an image of ``grid`` (rows, columns) patches; the first whose path
        matches counts."""
        patches = grid[0] * grid[1]
        attended = [f"pooling_head/attention/{name}" for name in ("key", "value")]
        return (
            *(FlopsGroup(path, patches) for path in attended if self.pooling == "attention"),
            FlopsGroup("embeddings", patches),
            FlopsGroup("stack", len(self.tokens) + patches, self.attention_width),
            FlopsGroup("", 1),  # heads read one vector
        )

    def drop_path_rates(self) -> np.ndarray:
        """Skip probability of each layer, float32 [num_layers]."""
        return np.linspace(0.0, self.drop_path, self.num_layers, dtype=np.float32)
