"""The interface of tokenizers.

Created by `load.train_tokenizer` and `load.load_tokenizer`. For every kind:

* ``encode_batch`` adds no special tokens, and text never yields a special id: "[MASK]" or "</s>"
  in a document is encoded as ordinary characters. (Characters unknown to WordPiece become the
  unknown id; bytes and sentencepiece with byte fallback know all characters.)
* A tokenizer is pickled as its serialized model, so that data workers can receive it.
* ``fingerprint`` is the sha256 of what defines the mapping from text to ids.

Strings with lone surrogates are not Unicode text: bytes encodes them, the other kinds raise. The
result of ``decode`` is always Unicode text, so that it can be written to a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flax_transformers.data.tokenizers.facts import Facts
from flax_transformers.data.tokenizers.roles import Kind
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary

Files = Mapping[str, bytes]


class Tokenizer:
    """Text to ids and back: the base of all kinds. Objects are immutable and picklable."""

    kind: Kind
    vocabulary: Vocabulary
    fingerprint: str
    facts: Facts
    files: Files
    """The files that were read, by name; none for a tokenizer trained in this process."""

    finds_ends: bool = False
    """Whether ``encode_with_ends`` takes hardly longer than ``encode_batch``."""

    @property
    def prompt_names(self) -> Mapping[str, int] | None:
        """The ids of the names that `encode_prompt` reads and ``encode_batch`` does not; None if
        these are not known by their characters alone."""
        return None

    @property
    def safe_cut(self) -> re.Pattern[str] | None:
        """Matches, empty, at positions where a text may be cut without changing its ids; None if
        no such position is known."""
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [n] per text, without special tokens."""
        raise NotImplementedError

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text as by ``encode_batch``, and the start and end of each token, int32
        [n, 2] in characters; a token that is a part of a character spans all of it."""
        raise NotImplementedError

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text in which names of special tokens are read as these tokens, as in
        `transformers`: int32 [n], without the frame; and the start and end of each token."""
        raise NotImplementedError

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """The ids of each word of each sentence, as Hugging Face's ``is_split_into_words``."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special ids other than the unknown id."""
        raise NotImplementedError

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One readable string per id, special ids included."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        """Writes what ``load_tokenizer`` reads, the config file last. ``frame``: the special tokens
        that a run puts around its texts, recorded for prompts."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of `encode_prompt_with_offsets`."""
        return self.encode_prompt_with_offsets(text)[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of `encode_prompt` for each text, by ``encode_batch`` where these are the same,
        which takes a hundredth of the time."""
        if self.prompt_names is None:
            return [self.encode_prompt(text) for text in texts]
        encoded = self.encode_batch(texts)
        for i, text in enumerate(texts):
            if any(name in text for name in self.prompt_names):
                encoded[i] = self.encode_prompt(text)
        return encoded

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
        return Frame() if cls_id is None or sep_id is None else Frame((cls_id,), (sep_id,), ())

    def __call__(
        self, texts: str | Sequence[str], *, max_length: int | None = None, pad_to: int = 0
    ) -> dict[str, np.ndarray]:
        """``input_ids`` and ``attention_mask``, int32 [B, T], of texts with their frame.

        Names of special tokens in a text, such as "[MASK]", are read as these tokens. A text whose
        ids with the frame are more than ``max_length`` is cut at its end. T is the longest text's
        length, at least ``pad_to``; shorter ones are padded at their end. A single text is a batch
        of one. Raises UserError for no text, and for a ``max_length`` that leaves no token between
        the special tokens.
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
        rows = [[*before, *ids[:limit], *after] for ids in self.encode_prompts(texts)]
        length = max(pad_to, *map(len, rows))
        input_ids = np.full((len(rows), length), self.vocabulary.pad_id, np.int32)
        attention_mask = np.zeros((len(rows), length), np.int32)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}
