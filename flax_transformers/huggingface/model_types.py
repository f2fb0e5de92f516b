"""Which of a family's kinds a config.json describes, where one file holds several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_transformers.errors import UserError


def model_type_of(config: Mapping[str, Any], prefixes: Mapping[str, str]) -> str:
    """The ``model_type`` of a config.json; left out, that of its architecture, or else the first.

    ``prefixes`` are the family's model types, and how the names of their architectures begin.
    Raises UserError for another type, and for one that its architecture does not belong to.
    """
    architecture = (config.get("architectures") or [""])[0]
    named = [kind for kind, prefix in prefixes.items() if architecture.startswith(prefix)]
    model_type = config.get("model_type") or (named or list(prefixes))[0]
    if model_type not in prefixes:
        raise UserError(
            f"config.json has model_type {model_type!r}, which is not supported; only "
            f"{' and '.join(map(repr, prefixes))} are"
        )
    if architecture and not architecture.startswith(prefixes[model_type]):
        raise UserError(
            f"config.json has model_type {model_type!r}, which does not go with architecture "
            f"{architecture!r}; the names of its architectures begin with {prefixes[model_type]}"
        )
    return model_type
