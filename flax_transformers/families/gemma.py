"""Gemma, the first (arXiv:2403.08295): Llama with wide heads, GEGLU and norms around one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax_transformers.errors import UserError
from flax_transformers.families import llama
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.models.config import Activation
from flax_transformers.ranges import OutOfRange

ARCHITECTURES = llama.architectures("Gemma")
del ARCHITECTURES["GemmaForQuestionAnswering"]  # the original has none


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(llama.LlamaConfig):
    """Llama with heads 256 wide, tied and scaled token embeddings; the 7B by default."""

    architecture: str = "GemmaForCausalLM"
    vocab_size: int = 256000
    hidden_size: int = 3072
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int | None = 256
    intermediate_size: int = 24576
    max_positions: int | None = 8192
    activation: Activation = "gelu_tanh"
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    pad_id: int = 0
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    norm_offset: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "rms":
            raise OutOfRange(f"model.norm is {self.norm!r}; Gemma has only 'rms'")


_BASE = GemmaConfig()

SIZES: dict[str, GemmaConfig] = {
    "gemma-2b": llama.sized(_BASE, layers=18, width=2048, heads=8, key_heads=1, inner=16384),
    "gemma-7b": _BASE,
}
"""The published sizes; they are named without their token embeddings."""


def _activation(config: Mapping[str, Any]) -> Activation:
    """Early files ask for "gelu" and mean its tanh approximation; some have a second field."""
    asked = config.get("hidden_act", "gelu_pytorch_tanh")
    activation = huggingface.activation_from("gelu_pytorch_tanh" if asked == "gelu" else asked)
    second = config.get("hidden_activation")
    if second is not None and huggingface.activation_from(second) != activation:
        raise UserError(
            f"config.json has hidden_act {asked!r} and hidden_activation {second!r}, which are "
            "two different activations; keep the one that the model was trained with"
        )
    return activation


_JSON = llama.LlamaFields(
    defaults=GemmaConfig(),
    fixed={"model_type": "gemma"},
    switches=llama.TIED | llama.ATTENTION_BIAS,
)


def from_huggingface(config: Mapping[str, Any]) -> GemmaConfig:
    """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
    given = {name: value for name, value in config.items() if value is not None}
    huggingface.refuse_values(given, {"use_bidirectional_attention": False})
    fields = _JSON.fields(config) | {"activation": _activation(config)}
    return huggingface.make_config(GemmaConfig, fields)


def to_huggingface(config: GemmaConfig) -> dict[str, Any]:
    """The config.json that `transformers` reads."""
    activation = huggingface.activation_to(config.activation)
    if config.activation == "gelu_tanh":
        activation = "gelu_pytorch_tanh"  # as it is published
    # Which of the two counts, and what "gelu" means there, depends on the release.
    second = {} if config.activation == "gelu" else {"hidden_activation": activation}
    return {**_JSON.write(config), "hidden_act": activation, **second}


FAMILY = llama.family(
    "Gemma",
    _JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    from_huggingface=from_huggingface,
    to_huggingface=to_huggingface,
)
