"""Texts to padded batches, in the form that models take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from flax_transformers.data.tokenizers.facts import Facts
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary


class EncodesBatches:
    """The call that tokenizers of every kind have."""

    vocabulary: Vocabulary
    facts: Facts

    finds_ends: ClassVar[bool] = False

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        raise NotImplementedError

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of `encode_prompt_with_offsets`."""
        return self.encode_prompt_with_offsets(text)[0]

    def encode_with_ends(
        self, texts: Sequence[str], ends: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        """The ids of each text, and how many of its tokens end at or before each of its ``ends``,
        increasing positions in characters."""
        return [
            # Offsets increase; two tokens may span the same character.
            (ids, np.searchsorted(offsets[:, 1], at, side="right").tolist())
            for (ids, offsets), at in zip(self.encode_with_offsets(texts), ends, strict=True)
        ]

    @property
    def frame(self) -> Frame:
        """The special tokens around one text: those that the model was trained with, as its run
        noted them or the tokenizer's files say; else [CLS] and [SEP], where there are these."""
        noted = self.facts.run_frame or self.vocabulary.frame
        if noted is not None:
            return noted
        cls_id, sep_id = self.vocabulary.cls_id, self.vocabulary.sep_id
        return Frame() if cls_id is None or sep_id is None else Frame((cls_id,), (sep_id,))

    def __call__(
        self, texts: str | Sequence[str], *, max_length: int | None = None, pad_to: int = 0
    ) -> dict[str, np.ndarray]:
        """``input_ids`` and ``attention_mask``, int32 [B, T], of texts with their frame.

        A text whose ids with the frame are more than ``max_length`` is cut at its end. T is the
        longest text's length, at least ``pad_to``; shorter ones are padded at their end. A single
        text is a batch of one. Raises UserError for no text, and for a ``max_length`` that leaves
        no token between the special tokens.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("there is no text to encode; give at least one")
        before, after = self.frame.before, self.frame.after
        limit = None if max_length is None else max_length - len(before) - len(after)
        if limit is not None and limit < 1:
            raise UserError(
                f"max_length is {max_length}, but the special tokens around a text are "
                f"{len(before) + len(after)}; set it higher"
            )
        rows = [[*before, *ids[:limit], *after] for ids in self.encode_batch(texts)]
        length = max(pad_to, *map(len, rows))
        input_ids = np.full((len(rows), length), self.vocabulary.pad_id, np.int32)
        attention_mask = np.zeros((len(rows), length), np.int32)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}
