"""Examples of labelled texts: their specification, special tokens and truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, Frame, Vocabulary, WindowSpec, halves_of
from flax_transformers.objectives.rows import (
    bert_frame,
    end_id,
    framing_ids,
    padded_tokens,
    start_id,
)

Framing = Literal["bert", "roberta", "t5", "llama", "gpt2"]
"""Special tokens around one or two texts, as in Hugging Face's tokenizers:

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
    """How labelled documents are divided into examples.

    Attributes:
      rows: "document": one example of any length for each document. "words": a document that is
        longer than ``length`` becomes several examples of whole words, which have a label each.
        "answers": the second of two texts is divided into windows that begin every ``stride``
        tokens, and have ``length`` tokens together with the first ``question_length`` tokens of
        the first text. "choices": one example for each document, whose first text goes with each
        of the others.
      labels: the kind of labels.
      stride: distance between the starts of windows.
      question_length: maximum number of tokens of the first text.
      choices: largest number of choices of an example; None: not limited.
    """

    rows: Literal["document", "words", "answers", "choices"] = "document"
    labels: Literal["classes", "tags", "numbers", "spans", "choices"] = "classes"
    stride: int = 0
    question_length: int = 0
    choices: int | None = None

    @property
    def target_kind(self) -> str:
        return self.labels

    @property
    def source_kind(self) -> str:
        return {
            "document": "LabelledSource", "words": "TaggedSource", "answers": "QuestionSource",
            "choices": "ChoiceSource",
        }[self.rows]  # fmt: skip

    def dummy_example(self, tokens: np.ndarray, texts: int) -> Arrays:
        if self.rows == "answers":
            return {
                "question_tokens": tokens[:1],
                "tokens": tokens,
                "offset": np.zeros((), np.int32),
                "spans": np.zeros((1, 2), np.int32),
            }
        two = self.rows == "choices" or (texts > 1 and self.rows == "document")
        ends = halves_of(tokens) if two else halves_of(tokens)[-1:]
        label = np.zeros(1, np.float32 if self.labels == "numbers" else np.int32)
        return {"tokens": tokens, "text_ends": ends, "labels": label}


class FramingMixin:
    """An objective, a dataclass, on texts with the special tokens of its ``framing``."""

    framing: Framing

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around the texts."""
        return frame_of(self.framing, vocab)


def overhead(framing: Framing, texts: int) -> int:
    """Number of special tokens around one or two texts."""
    return _OVERHEADS[framing][texts - 1]


def framed(
    texts: Sequence[np.ndarray], framing: Framing, vocab: Vocabulary
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One or two texts with special tokens: ids and token types int32 [n], and the start of each.

    Raises UserError if the tokenizer lacks one of the special tokens.
    """
    frame = frame_of(framing, vocab)
    parts: list[np.ndarray] = []
    types: list[int] = []
    starts: list[int] = []
    for number, text in enumerate(texts):
        opening = frame.before_second if number else frame.before
        assert opening is not None
        starts.append(len(types) + len(opening))
        parts += [np.array(ids, np.int32) for ids in (opening, text, frame.after)]
        types += [number] * (len(opening) + len(text) + len(frame.after))
    return np.concatenate(parts), np.array(types, np.int32), starts


def framed_row(
    texts: Sequence[np.ndarray], framing: Framing, vocab: Vocabulary, sequence_length: int
) -> tuple[Arrays, bool]:
    """One or two texts, truncated to fit with their special tokens, as arrays int32 [T]; and
    whether they were truncated.

    ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids``. Raises UserError
    if not a token of each fits.
    """
    lengths = [len(text) for text in texts]
    total = sequence_length - overhead(framing, len(texts))
    if total < len(texts):
        raise UserError(
            f"sequences of {sequence_length} tokens are too short for a text; use longer ones"
        )
    kept = longest_first(lengths, total)
    texts = [text[:length] for text, length in zip(texts, kept, strict=True)]
    ids, types, _ = framed(texts, framing, vocab)
    token_types = types if framing == "bert" else None
    return padded_tokens(ids, sequence_length, vocab, token_types), kept != lengths


def frame_of(framing: Framing, vocab: Vocabulary) -> Frame:
    """The special tokens of a framing. Raises UserError if the tokenizer lacks one of them."""
    if framing == "bert":
        return bert_frame(vocab)
    if framing == "roberta":
        cls_id, sep_id = framing_ids(vocab)
        return Frame((cls_id,), (sep_id,), (sep_id,))
    if framing == "t5":
        return Frame((), (end_id(vocab),), ())
    start = start_id(vocab) if framing == "llama" else None
    before = () if start is None else (start,)
    return Frame(before, (), before)


def longest_first(lengths: Sequence[int], total: int) -> list[int]:
    """Lengths of one or two texts truncated to ``total`` tokens: the longer one first.

    If both are truncated and ``total`` is odd, the longer (the second of equal ones) has one more.
    """
    if sum(lengths) <= total:
        return list(lengths)
    if len(lengths) == 1:
        return [total]
    short, long = (0, 1) if lengths[0] <= lengths[1] else (1, 0)
    kept = [0, 0]
    kept[short] = min(lengths[short], total // 2)
    kept[long] = total - kept[short]
    return kept
