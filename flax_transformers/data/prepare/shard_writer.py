"""Writes the files of one shard of a token store (see `token_store`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flax_transformers.data.sources.documents import LabelKind
from flax_transformers.data.store import token_store
from flax_transformers.storage.file_hashes import HashedFile
from flax_transformers.storage.folders import Folder, writing_below


class ShardWriter:
    """Writes one shard of one split; nothing is visible before ``finish``.

    A context manager, which removes the files if an exception is raised.
    """

    def __init__(
        self,
        folder: Folder,
        split: token_store.Split,
        shard: int,
        vocab_size: int,
        label_kind: LabelKind | None = None,
    ) -> None:
        self._folder, self._dtype, self.split = folder, token_store.token_dtype(vocab_size), split
        self._tokens = self._documents = self._sentences = self._skipped = 0
        self._names = {
            kind: token_store.shard_file(split, shard, kind)
            for kind in (*token_store.TEXT_KINDS, *token_store.LABELS[label_kind])
        }
        self._extras = {kind: 0 for kind in token_store.LABEL_DTYPES if kind in self._names}
        with writing_below(folder.path):
            self._files = {
                kind: HashedFile(folder.temporary(name)) for kind, name in self._names.items()
            }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            for file in self._files.values():
                file.discard()

    def add_document(
        self, sentences: Sequence[np.ndarray], labels: Sequence[np.ndarray] = ()
    ) -> int:
        """Appends the token ids of each sentence (integers [n]); returns the number of tokens.

        ``labels``: the arrays of a document's labels, in the order of `LABELS`.
        """
        lengths = np.array([len(sentence) for sentence in sentences if len(sentence)], np.int64)
        if not len(lengths):
            self._skipped += 1
            return 0
        tokens = np.concatenate(sentences)
        ends = self._tokens + np.cumsum(lengths)
        with writing_below(self._folder.path):
            self._files["tokens"].write(tokens.astype(self._dtype).tobytes())
            self._files["sentences"].write(ends.astype("<i8").tobytes())
            self._files["documents"].write(ends[-1:].astype("<i8").tobytes())
            for kind, values in zip(self._extras, labels, strict=True):
                self._extras[kind] += len(values)
                self._files[kind].write(values.astype(token_store.LABEL_DTYPES[kind]).tobytes())
                end = np.array([self._extras[kind]], "<i8")
                self._files["record_ends" if kind == "records" else "label_ends"].write(
                    end.tobytes()
                )
        self._tokens += len(tokens)
        self._sentences += len(lengths)
        self._documents += 1
        return len(tokens)

    def finish(self) -> token_store.ShardRecord:
        """Gives the files their names. They are durable after `Folder.sync`."""
        with writing_below(self._folder.path):
            records = {kind: file.finish() for kind, file in self._files.items()}
        for kind, file in self._files.items():
            self._folder.publish(file.path, self._names[kind], lasting=False)
        return token_store.ShardRecord(
            self._tokens, self._documents, self._sentences, self._skipped,
            {self._names[kind]: record for kind, record in records.items()},
        )  # fmt: skip
