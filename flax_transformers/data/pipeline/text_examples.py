"""Examples of text: the windows of a token store."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.windows import cached_window_index, shared_window_index
from flax_transformers.data.store.files import StoreArray
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec


class TextExamples(Examples):
    """The windows of one split as raw examples, in the form of `Objective.prepare`.

    Raises UserError for a training split shorter than one window across documents (a validation
    split then has one short window), and for one document if two are needed.
    """

    def __init__(self, store: TokenStore, spec: WindowSpec) -> None:
        self.store, self.spec = store, spec
        self.read_threads = store.read_threads
        self._windows = cached_window_index(store, spec)
        if spec.other and store.num_documents < 2:
            raise UserError(
                f"The {store.split} split has one document, but the objective needs pairs of "
                "documents; use more text, or an objective without pairs."
            )
        if store.split == "train" and spec.cross_documents and len(self._windows) == 1:
            separators = store.num_documents - 1
            if store.num_tokens + separators < spec.length:
                raise UserError(
                    f"The corpus has {store.num_tokens} tokens in {store.num_documents} "
                    f"documents, one training window needs {spec.length}; use more text or "
                    "shorter sequences."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Of an index in a file only the length: the file is opened again."""
        kept = isinstance(self._windows, StoreArray)
        return {**self.__dict__, "_windows": len(self._windows) if kept else self._windows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["_windows"], int):
            self._windows = shared_window_index(self.store, self.spec, state["_windows"])

    def __len__(self) -> int:
        return len(self._windows)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        start, length = self._window(index)
        ends = self.store.document_ends_within(start, start + length) - start
        tokens = self.store.tokens(start, length)
        example = {"tokens": tokens, "document_ends": ends.astype(np.int32)}
        if self.spec.sentence_ends:
            example["sentence_ends"] = self._sentence_ends(start, length)
        if self.spec.other:
            other = self._elsewhere(start, rng)
            example["other_tokens"] = self.store.tokens(*other)
            if self.spec.sentence_ends:
                example["other_sentence_ends"] = self._sentence_ends(*other)
        return example

    def _window(self, index: int) -> tuple[int, int]:
        window = self._windows[index]
        return int(window["start"]), int(window["length"])

    def _sentence_ends(self, start: int, length: int) -> np.ndarray:
        return (self.store.sentence_ends_within(start, start + length) - start).astype(np.int32)

    def _elsewhere(self, start: int, rng: np.random.Generator) -> tuple[int, int]:
        """A random window of another document than the one at ``start``."""
        document = self.store.document_of(start)
        while True:
            other = self._window(int(rng.integers(len(self._windows))))
            if self.store.document_of(other[0]) != document:
                return other
