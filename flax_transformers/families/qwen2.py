"""Qwen 2 and 2.5 (arXiv:2407.10671, 2412.15115): Llama with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.families import llama
from flax_transformers.huggingface import fields as huggingface
from flax_transformers.models.config import Rope


@dataclass(frozen=True, kw_only=True)
class UpperWindows:
    """Fields of a config whose upper layers may have a window."""

    num_layers: int
    sliding_window: int | None = None
    """Number of tokens that a token of the upper layers attends to; None: all."""
    full_layers: int = 0
    """Number of lower layers without the window."""

    RANGES: ClassVar[ranges.Ranges] = {
        "sliding_window": ranges.POSITIONS,
        "full_layers": ranges.integers(0, 10_000),
    }

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.full_layers >= self.num_layers:  # equal models have equal configs
            object.__setattr__(self, "sliding_window", None)
        if self.sliding_window is None:
            object.__setattr__(self, "full_layers", 0)

    @property
    def windows(self) -> tuple[int | None, ...]:
        upper = max(0, self.num_layers - self.full_layers)
        return (None,) * (self.num_layers - upper) + (self.sliding_window,) * upper


LONG_ROPE = Rope(theta=1e6)


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(UpperWindows, llama.LlamaConfig):
    """Llama with biases of queries, keys and values; 7B by default."""

    architecture: str = "Qwen2ForCausalLM"
    vocab_size: int = 152064
    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_key_value_heads: int | None = 4
    intermediate_size: int = 18944
    max_positions: int | None = 32768
    rope: Rope | None = LONG_ROPE
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (151643,)


_SMALL = replace(Qwen2Config(), vocab_size=151936, tie_embeddings=True, num_key_value_heads=2)
_LONG = Qwen2Config(max_positions=131072)
_LARGE = replace(_LONG, norm_eps=1e-5)

SIZES: dict[str, Qwen2Config] = {
    "qwen2-0.5b": llama.sized(
        replace(_SMALL, max_positions=131072), layers=24, width=896, heads=14, inner=4864
    ),
    "qwen2-1.5b": llama.sized(
        replace(_SMALL, max_positions=131072), layers=28, width=1536, heads=12, inner=8960
    ),
    "qwen2-7b": _LONG,
    "qwen2-72b": llama.sized(_LARGE, layers=80, width=8192, heads=64, key_heads=8, inner=29568),
    "qwen2.5-3b": llama.sized(_SMALL, layers=36, width=2048, heads=16, inner=11008),
    "qwen2.5-14b": llama.sized(_LARGE, layers=48, width=5120, heads=40, key_heads=8, inner=13824),
    "qwen2.5-32b": llama.sized(_LARGE, layers=64, width=5120, heads=40, key_heads=8, inner=27648),
}
"""Published sizes of 2, and those of 2.5 that 2 does not have. Their files turn windows off."""

_TYPES = {True: "sliding_attention", False: "full_attention"}


_WINDOWS = SimpleNamespace(use_sliding_window=False, sliding_window=4096, full_layers=28)
"""What a config.json means by fields that it leaves out."""


def _read_windows(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """``sliding_window`` and ``full_layers``. Raises UserError for other patterns of layers."""
    switch = {"use_sliding_window": "use_sliding_window"}
    numbers = {"sliding_window": "sliding_window", "full_layers": "max_window_layers"}
    if config.get("sliding_window", 0) is None:
        del numbers["sliding_window"]
    given = huggingface.read_numbers(config, numbers, _WINDOWS)
    used = huggingface.read_switches(config, switch, _WINDOWS)["use_sliding_window"]
    window, full = given.get("sliding_window") if used else None, given["full_layers"]
    types = config.get("layer_types")
    if types is not None:
        full = sum(kind == "full_attention" for kind in types)
        pattern = [_TYPES[layer >= full and window is not None] for layer in range(num_layers)]
        if list(types) != pattern:
            raise UserError(
                f"config.json has layer_types {types}, which are not those of a window in the "
                "upper layers alone"
            )
    return {"sliding_window": window, "full_layers": 0 if window is None else full}


class WindowFields(llama.LlamaFields[llama.L]):
    """The config.json of Qwen 2 and 3: Llama's, and the windows."""

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields(config)
        return fields | _read_windows(config, fields["num_layers"])

    def write(self, config: Any) -> dict[str, Any]:
        return {
            **super().write(config),
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.full_layers,
            "layer_types": [_TYPES[window is not None] for window in config.windows],
        }


DEFAULTS = replace(
    Qwen2Config(),
    vocab_size=151936,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_key_value_heads=32,
    intermediate_size=22016,
    rope=Rope(),
    bos_id=None,
    eos_ids=(),
)
"""What a config.json means by fields that it leaves out."""


JSON = WindowFields(defaults=DEFAULTS, fixed={"model_type": "qwen2"})


FAMILY = llama.family(
    "Qwen2",
    JSON,
    sizes=SIZES,
    weights=llama.weights,
)
