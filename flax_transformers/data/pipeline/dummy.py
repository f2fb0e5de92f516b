"""What an objective can learn from text sources, and examples without content for its shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flax_transformers.data.sources.records import Source
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, WindowSpec

_TOKENS = 8  # of a dummy text; few, because sequences may be short


def check_source_kinds(
    data: str, sources: Sequence[Source], objective: str, spec: WindowSpec
) -> None:
    """Raises UserError if an objective asks for pairs, labels or images that text sources lack.

    ``data``: the name of the config class, for the message.
    """
    if spec.data is not None:
        raise UserError(
            f"objective {objective} learns from {spec.data}, but data is a {data}; set data to "
            f"{spec.data}, or choose another objective"
        )
    wanted = spec.target_kind
    for source in sources:
        if wanted in (None, source.target_kind):
            continue
        what = wanted if wanted == "pairs" else f"the labels {wanted!r}"
        raise UserError(
            f"objective {objective} learns {what}, which the {type(source).__name__} of "
            f"{source.path} does not give; set data.source to a {spec.source_kind}, or choose "
            "another objective"
        )


def dummy_text(sources: Sequence[Source], spec: WindowSpec, token: int) -> Arrays:
    """A raw example of text for any objective; see `DataConfig.dummy_example`."""
    tokens = np.full(min(_TOKENS, spec.length), token, np.int32)
    return spec.dummy_example(tokens, max((source.texts for source in sources), default=1))
