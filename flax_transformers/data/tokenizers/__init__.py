from typing import Any

from flax_transformers.former_names import former_attribute


def __getattr__(name: str) -> Any:
    return former_attribute(__name__, name)
