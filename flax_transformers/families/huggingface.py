"""What the config.json files of Hugging Face have in common, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.models.config import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names for an activation to ours; of several, the first is the one that we write."""


def activation_from(name: Any) -> Activation:
    """Our name for their ``hidden_act``. Raises UserError if there is none."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json asks for activation {name!r}, which is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_to(name: Activation) -> str:
    """Their name for our activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def read_numbers(
    config: Mapping[str, Any], names: Mapping[str, str], defaults: object
) -> dict[str, Any]:
    """Numeric fields by our names. ``names`` maps ours to theirs.

    Older files leave out what is default: such a field is taken from ``defaults``. Raises UserError
    for a value that is not a number of the right kind.
    """
    numbers = {}
    for ours, theirs in names.items():
        default = getattr(defaults, ours)
        value = config.get(theirs, default)
        kinds = (int, float) if isinstance(default, float) else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"config.json has {theirs} {value!r}; it must be a number")
        numbers[ours] = type(default)(value)
    return numbers


def refuse(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if a field of ``config`` is there and is not as ``wanted``."""
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json has {name} {config[name]!r}, which is not supported; "
                f"only {value!r} is"
            )
