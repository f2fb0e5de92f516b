"""Examples of labelled documents: whole, by words, or as windows of a long text."""

from __future__ import annotations

import logging

import numpy as np

from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.labelled import LabelledSpec

log = logging.getLogger(__name__)
_ROW = np.dtype([("document", "<i8"), ("begin", "<i8"), ("start", "<i8"), ("stop", "<i8")])


def choices_of(store: TokenStore) -> np.ndarray:
    """Number of choices of each document, int64 [documents]."""
    texts = np.searchsorted(store.sentence_ends, store.document_ends, side="right")
    return np.diff(texts, prepend=0) - 1


class LabelledExamples(Examples):
    """The documents of one split, in the form of ``prepare`` of labelled objectives.

    Raises UserError if the store has other labels than ``spec``, or none.
    """

    def __init__(self, store: TokenStore, spec: LabelledSpec) -> None:
        self.store, self.spec = store, spec
        self.read_threads = store.read_threads
        if store.label_kind != spec.labels:
            raise UserError(
                f"The documents of the token store in {store.directory} have other labels than "
                f"the objective needs, or none; set data.source to a {spec.source_kind} "
                f"whose labels are {spec.labels}, or choose another objective."
            )
        if spec.choices is not None:
            most = int(choices_of(store).max(initial=0))
            if most > spec.choices:
                raise UserError(
                    f"an example in {store.directory} has {most} choices, but objective.choices is "
                    f"{spec.choices}; set --objective.choices {most}"
                )
        rows = {"words": _words, "answers": _windows}.get(spec.rows, _documents)
        self._rows = rows(store, spec)
        self.scored_in_order = spec.rows == "answers"
        if spec.rows == "document":
            _say_longer(store, spec, self._rows["stop"] - self._rows["start"])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def documents(self) -> np.ndarray | None:
        return None if self.spec.rows == "document" else self._rows["document"]

    @property
    def classes(self) -> np.ndarray | None:
        if self.store.label_kind != "classes":
            return None
        return self.store.all_labels[self._rows["document"]]

    def document_of(self, index: int) -> int:
        """The index of the document of an example, which increases with the example's index."""
        return int(self._rows[index]["document"])

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        document, begin, start, stop = self._rows[index].tolist()
        tokens = self.store.tokens(start, stop - start)
        labels = self.store.labels(document)
        if self.spec.rows == "answers":
            context = int(self.store.sentence_ends_within(begin, start + 1)[0])
            return {
                "question_tokens": self.store.tokens(begin, context - begin),
                "tokens": tokens,
                "offset": np.array(start - context, np.int32),
                "spans": labels.reshape(-1, 2),
            }
        ends = self.store.sentence_ends_within(start, stop) - start
        if not len(ends) or ends[-1] < len(tokens):  # the last word is cut
            ends = np.append(ends, len(tokens))
        if self.spec.rows == "words":
            first = len(self.store.sentence_ends_within(begin, start))
            labels = labels[first : first + len(ends)]
        return {"tokens": tokens, "text_ends": ends.astype(np.int32), "labels": labels}


def _say_longer(store: TokenStore, spec: LabelledSpec, lengths: np.ndarray) -> None:
    """Special tokens are not counted, so a few more documents may be cut."""
    longer = int((lengths > spec.length).sum())
    if longer:
        log.warning(
            "%d of %d documents of %s (%s) have more tokens than a sequence, %d, and are cut; the "
            "longest has %d",
            longer,
            len(lengths),
            store.directory,
            store.split,
            spec.length,
            lengths.max(),
        )


def _documents(store: TokenStore, spec: LabelledSpec) -> np.ndarray:
    """One example for each document."""
    ends = store.document_ends
    rows = np.zeros(len(ends), _ROW)
    rows["document"] = np.arange(len(ends))
    rows["begin"] = rows["start"] = np.append(0, ends[:-1])[: len(ends)]
    rows["stop"] = ends
    return rows


def _words(store: TokenStore, spec: LabelledSpec) -> np.ndarray:
    """Examples of as many whole words as fit; a longer word is cut."""
    rows = _documents(store, spec)
    if (rows["stop"] - rows["start"] <= spec.length).all():
        return rows
    found = []
    for row in rows:
        document, begin, _, stop = row.tolist()
        start = begin
        while stop - start > spec.length:
            ends = store.sentence_ends_within(start, start + spec.length)
            following = ends[-1] if len(ends) else store.sentence_ends_within(start, stop)[0]
            found.append((document, begin, start, min(following, start + spec.length)))
            start = int(following)
        if start < stop:
            found.append((document, begin, start, stop))
    return np.array(found, _ROW)


def _windows(store: TokenStore, spec: LabelledSpec) -> np.ndarray:
    """Windows of the second text of each document; the last window ends with the text."""
    edges = np.concatenate([np.zeros(1, np.int64), store.sentence_ends])
    found = []
    for document in range(store.num_documents):
        begin, context, stop = edges[2 * document : 2 * document + 3].tolist()
        limit = spec.length - min(context - begin, spec.question_length)
        start = context
        while stop - start > limit:
            found.append((document, begin, start, start + limit))
            start += min(spec.stride, limit)
        found.append((document, begin, start, stop))
    return np.array(found, _ROW)
