"""Pretrain transformers in JAX and Flax: one core, few families, one trainer, on any mesh."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flax_transformers import former_names

if TYPE_CHECKING:
    from flax_transformers.config_json import register
    from flax_transformers.huggingface.family import published_sizes
    from flax_transformers.pretrained import load_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained", "published_sizes", "register", "save_pretrained"]

_WHERE = {
    "load_pretrained": "flax_transformers.pretrained",
    "published_sizes": "flax_transformers.huggingface.family",
    "register": "flax_transformers.config_json",
    "save_pretrained": "flax_transformers.pretrained",
}

former_names.install()


def __getattr__(name: str) -> Any:
    # When asked for: data workers import this package, and have no use for jax.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
