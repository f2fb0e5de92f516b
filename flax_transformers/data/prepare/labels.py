"""Labels of documents as numbers, and the names of classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.records import Source
from flax_transformers.data.sources.squad import Question, token_spans
from flax_transformers.data.store.files import record_json
from flax_transformers.data.tokenizers.base import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder

NAMES = "labels.json"


def has_names(source: Source) -> bool:
    """Whether the labels of a source are names."""
    return source.label_kind in ("classes", "tags")


class LabelNames:
    """Finds and writes the names of the classes of a store: those of the source, or else those of
    the training documents, sorted."""

    def __init__(self, folder: Folder, source: Source) -> None:
        self._folder = folder
        self._wanted = has_names(source) and not folder.exists(NAMES)
        self._source = source
        self._found: set[str] = set()

    def seen(self, training: Iterable[Document]) -> Iterator[Document]:
        """Yields the documents and notes their labels."""
        for document in training:
            self._found.update(map(str, document.labels))
            yield document

    def keep(self, rest: Iterable[Document]) -> None:
        """Writes the names, if the labels have names. ``rest``: the documents not yet seen."""
        if not self._wanted:
            return
        names = list(self._source.known_classes)
        if not names:
            for _ in self.seen(rest):
                pass
            numbers = all(name.removeprefix("-").isdecimal() for name in self._found)
            names = sorted(self._found, key=(lambda n: (int(n), n)) if numbers else None)
        self._folder.write(NAMES, record_json({"names": names}))


def kept_label_names(folder: Folder) -> tuple[str, ...]:
    """What `LabelNames` wrote; empty without names."""
    if not folder.exists(NAMES):
        return ()
    return tuple(json.loads(folder.read(NAMES))["names"])


@dataclass(frozen=True)
class Labeller:
    """Converts the labels of documents to the arrays of a store."""

    source: Source
    names: Sequence[str]
    tokenizer: Tokenizer
    counts: Counts

    def arrays(self, document: Document, *, scored: bool) -> list[np.ndarray] | None:
        """The arrays in the order of `token_store.LABELS`; None for a document that is left out.

        ``scored``: whether to keep the record for scoring. Raises UserError for an unknown class,
        unless the source's ``on_invalid`` leaves the document out.
        """
        if self.source.label_kind is None:
            return []
        if document.arrays is not None:
            return list(document.arrays)
        if isinstance(document, Question):
            ((_, offsets),) = self.tokenizer.encode_with_offsets([document.text[1]])
            spans = token_spans(document.answers, offsets)
            record = document.record if scored else b""
            return [spans.ravel(), np.frombuffer(record, np.uint8)]
        if self.source.label_kind == "numbers":
            return [np.array(document.labels, np.float32)]
        if self.source.label_kind == "choices":
            return [np.array(document.labels, np.int32)]
        unknown = [label for label in document.labels if label not in self.names]
        if not unknown:
            return [np.array([self.names.index(str(n)) for n in document.labels], np.int32)]
        if self.source.on_invalid == "error":
            raise UserError(
                f"{self.source.path} has a document of class {unknown[0]!r} ({_begin(document)}), "
                "which is not among the classes of the training documents; fix it, name all "
                "classes in the source's label_names, or set on_invalid to skip."
            )
        self.counts.invalid += 1
        return None


def _begin(document: Document) -> str:
    text = document.whole.replace("\0", " ")
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
