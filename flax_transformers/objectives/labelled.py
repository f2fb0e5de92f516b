"""What objectives of labelled texts share: which rows they ask for, and how texts make a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id, framing_ids, start_id

Framing = Literal["bert", "roberta", "t5", "llama", "gpt2"]
"""What stands around one text, or two, as Hugging Face's tokenizers put it:

- "bert" (also ModernBERT): [CLS] A [SEP], [CLS] A [SEP] B [SEP] with token types 0 and 1
- "roberta" (also XLM-R, BART): <s> A </s>, <s> A </s> </s> B </s>
- "t5": A </s>, A </s> B </s>
- "llama" (also Mistral, Gemma): <s> A, <s> A <s> B
- "gpt2": A, A B
"""
_OVERHEADS: dict[Framing, tuple[int, int]] = {
    "bert": (2, 3), "roberta": (2, 4), "t5": (1, 2), "llama": (1, 2), "gpt2": (0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class LabelledSpec(WindowSpec):
    """Labelled documents, each of them in one row or in several.

    ``rows``: "document" is one row each, of any length; with "words" a document that is longer than
    ``length`` takes several rows of whole texts, of a label each; with "answers" the second of two
    texts goes through windows that begin every ``stride`` tokens, and fill ``length`` with the
    first ``question_length`` tokens of the first text. ``labels`` is their kind.
    """

    rows: Literal["document", "words", "answers"] = "document"
    labels: Literal["classes", "tags", "numbers", "spans"] = "classes"
    stride: int = 0
    question_length: int = 0

    @property
    def source_kind(self) -> str:
        """The kind of source that has such documents."""
        kinds = {"document": "LabelledSource", "words": "TaggedSource", "answers": "QuestionSource"}
        return kinds[self.rows]


def overhead(framing: Framing, texts: int) -> int:
    """Places that the framing of one text or two takes."""
    return _OVERHEADS[framing][texts - 1]


def framed(
    texts: Sequence[np.ndarray], framing: Framing, vocab: Vocabulary
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A row of one text or two: ids and token types int32 [n], and where each text begins.

    Raises UserError for a tokenizer without the special tokens that it takes.
    """
    before, after = _marks(framing, vocab)
    parts: list[np.ndarray] = []
    types: list[int] = []
    starts: list[int] = []
    for number, text in enumerate(texts):
        opening = before if number == 0 or framing == "llama" else []
        if number and framing == "roberta":
            opening = after
        starts.append(len(types) + len(opening))
        parts += [np.array(opening, np.int32), text.astype(np.int32), np.array(after, np.int32)]
        types += [number] * (len(opening) + len(text) + len(after))
    return np.concatenate(parts), np.array(types, np.int32), starts


def _marks(framing: Framing, vocab: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids before the first text, and after each."""
    if framing in ("bert", "roberta"):
        cls_id, sep_id = framing_ids(vocab)
        return [cls_id], [sep_id]
    if framing == "t5":
        return [], [end_id(vocab)]
    start = start_id(vocab) if framing == "llama" else None
    return ([] if start is None else [start]), []


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """How much stays of one text or two so that they fit: the longer is cut until they are even.

    If both have to be cut by an odd number, the longer (of equals the second) keeps one more.
    """
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    short, long = (0, 1) if lengths[0] <= lengths[1] else (1, 0)
    kept = [0, 0]
    kept[short] = min(lengths[short], room // 2)
    kept[long] = room - kept[short]
    return kept
