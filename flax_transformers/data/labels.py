"""Labels of documents as numbers: which classes there are, and what the store keeps of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flax_transformers.data.documents import Counts, Document, Source
from flax_transformers.data.folders import Folder
from flax_transformers.data.squad import Question, token_spans
from flax_transformers.data.store import to_json
from flax_transformers.data.tokenizer_kinds import Tokenizer
from flax_transformers.errors import UserError

NAMES = "labels.json"


def has_names(source: Source) -> bool:
    """Whether the labels of a source are names."""
    return source.label_kind in ("classes", "tags")


def keep_label_names(folder: Folder, source: Source, training: Iterable[Document]) -> None:
    """Writes the names of the classes beside the tokenizer, if there are any and they are not there
    yet: those that ``source`` gives, else those of the ``training`` documents, sorted."""
    if not has_names(source) or folder.exists(NAMES):
        return
    names = list(getattr(source, "label_names", ()))
    if not names:
        found = {str(label) for document in training for label in document.labels}
        numbers = all(name.removeprefix("-").isdecimal() for name in found)
        names = sorted(found, key=(lambda name: (int(name), name)) if numbers else None)
    folder.write(NAMES, to_json({"names": names}))


def kept_label_names(folder: Folder) -> tuple[str, ...]:
    """What `keep_label_names` wrote; none where it did not."""
    if not folder.exists(NAMES):
        return ()
    return tuple(json.loads(folder.read(NAMES))["names"])


@dataclass(frozen=True)
class Labeller:
    """Turns what a document has to be learned of it into the arrays that a store keeps."""

    source: Source
    names: Sequence[str]
    tokenizer: Tokenizer
    counts: Counts

    def arrays(self, document: Document, *, scored: bool) -> list[np.ndarray] | None:
        """In the order of `store.LABELS`; None for a document that is left out and counted.

        ``scored`` documents keep what scores take. Raises UserError for a class that is not among
        the names, unless the source's policy is to skip what is not valid.
        """
        if self.source.label_kind is None:
            return []
        if isinstance(document, Question):
            spans = token_spans(document.answers, self.tokenizer.offsets(document.text[1]))
            record = document.record if scored else b""
            return [spans.ravel(), np.frombuffer(record, np.uint8)]
        if self.source.label_kind == "numbers":
            return [np.array(document.labels, np.float32)]
        unknown = [label for label in document.labels if label not in self.names]
        if not unknown:
            return [np.array([self.names.index(str(n)) for n in document.labels], np.int32)]
        if self.source.on_invalid == "error":
            raise UserError(
                f"{self.source.path} has a document of class {unknown[0]!r} ({_begin(document)}), "
                "which is not among the classes of the training documents; mend it, name all "
                "classes in the source's label_names, or set on_invalid to skip."
            )
        self.counts.invalid += 1
        return None


def _begin(document: Document) -> str:
    text = document.whole.replace("\0", " ")
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
