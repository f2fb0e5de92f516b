"""What an objective can learn from text sources, and examples without content for its shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.records import Source
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.objectives.labelled import LabelledSpec
from flax_transformers.objectives.sequence_to_sequence import PairSpec

_TOKENS = 8  # of a dummy text; few, because sequences may be short
Arrays = dict[str, np.ndarray]


def check_source_kinds(
    data: str, sources: Sequence[Source], objective: str, spec: WindowSpec
) -> None:
    """Raises UserError if an objective asks for pairs, labels or images that text sources lack.

    ``data``: the name of the config class, for the message.
    """
    if isinstance(spec, ImageSpec):
        raise UserError(
            f"objective {objective} learns from images, but data is a {data}; choose another "
            "objective, or other data"
        )
    if spec.data is not None:
        raise UserError(
            f"objective {objective} learns from a {spec.data}, but data is a {data}; set data to "
            f"a {spec.data}, or choose another objective"
        )
    for source in sources:
        given = "pairs" if isinstance(source, PairSource) else source.label_kind
        if isinstance(spec, PairSpec) and given != "pairs":
            wanted, kind = "pairs", "PairSource"
        elif isinstance(spec, LabelledSpec) and given != spec.labels:
            wanted, kind = f"the labels {spec.labels!r}", spec.source_kind
        else:
            continue
        raise UserError(
            f"objective {objective} learns {wanted}, which the {type(source).__name__} of "
            f"{source.path} does not give; set data.source to a {kind}, or choose another objective"
        )


def dummy_text(sources: Sequence[Source], spec: WindowSpec, token: int) -> Arrays:
    """A raw example of text for any objective; see `DataConfig.dummy_example`."""
    tokens = np.full(min(_TOKENS, spec.length), token, np.int32)
    end = np.array([len(tokens)], np.int32)
    halves = np.array([len(tokens) // 2, len(tokens)] if len(tokens) > 1 else end, np.int32)
    if isinstance(spec, PairSpec):
        one = end // end
        return {
            "source_tokens": tokens[:1],
            "source_ends": one,
            "target_tokens": tokens[:1],
            "target_ends": one,
        }
    if isinstance(spec, LabelledSpec):
        two = spec.rows == "choices" or (
            any(source.texts > 1 for source in sources) and spec.rows == "document"
        )
        return _labelled(spec, tokens, halves if two else end)
    text: Arrays = {"tokens": tokens, "sentence_ends": halves}
    return (with_other(text) if spec.other else text) | {"document_ends": end}


def with_other(example: Arrays) -> Arrays:
    """An example with itself as the second one that ``spec.other`` asks for."""
    return example | {f"other_{name}": array for name, array in example.items()}


def _labelled(spec: LabelledSpec, tokens: np.ndarray, ends: np.ndarray) -> Arrays:
    if spec.rows == "answers":
        return {
            "question_tokens": tokens[:1],
            "tokens": tokens,
            "offset": np.zeros((), np.int32),
            "spans": np.zeros((1, 2), np.int32),
        }
    label = np.zeros(1, np.float32 if spec.labels == "numbers" else np.int32)
    return {"tokens": tokens, "text_ends": ends, "labels": label}
