"""A text corpus as preparation reads it: its sources, divided into shards, and its documents."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.sources.corpus_files import ending, would_read
from flax_transformers.data.sources.documents import Document
from flax_transformers.data.sources.read import CorpusReader, tied_shards
from flax_transformers.data.sources.records import Source
from flax_transformers.data.sources.row_files import has_splits
from flax_transformers.data.sources.tfds import PREFIX
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError

_WRITTEN = (".json", ".txt")  # endings of files of a store, such as the vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """What to read, which documents to keep and to hold out, and in how many shards."""

    source: Source
    validation_source: Source | None
    held_out_fraction: float
    filters: Filters
    shards: int

    @property
    def sources(self) -> dict[Split, Source]:
        """The source of the training split, and that of the validation split if it has its own."""
        found: dict[Split, Source] = {"train": self.source}
        if self.validation_source is not None:
            found["validation"] = self.validation_source
        return found

    def refuse_store_inside(self, folder: str) -> None:
        """Raises UserError if the files of a store in ``folder`` would be read as text."""
        for source in self.sources.values():
            if would_read(source.path, folder, [e for e in _WRITTEN if e in source.endings]):
                raise UserError(
                    f"The store {folder} is in the corpus {source.path}, and its files would be "
                    "read as text; choose a store outside of it."
                )

    def warn_of_shared_files(self) -> None:
        """A warning if a file is read for training and for validation."""
        if self.validation_source is None:
            return
        ours, theirs = self.source, self.validation_source
        common = set(self._files(ours)) & set(self._files(theirs))
        splits = ours.split, theirs.split
        if splits[0] != splits[1]:  # a json file may contain both
            common = {
                file
                for file in common
                if not ending(Path(file), (".json",)) or not has_splits(Path(file), splits)
            }
        if common:
            log.warning(
                "%s is read for source and for validation_source: the scores are of texts that the "
                "model is trained on",
                min(common),
            )

    @staticmethod
    def _files(source: Source) -> list[str]:
        if source.path.startswith(PREFIX):
            return [f"{source.path}, split {source.split},"]
        return [os.path.realpath(path) for _, path in source.files()]

    def readers(self, run: Sequence[int]) -> dict[Split, CorpusReader]:
        """Readers of the shards ``run`` of each source."""
        return {
            split: CorpusReader(source, run, self.shards) for split, source in self.sources.items()
        }

    def tied_shards(self) -> list[bool]:
        """For each shard, whether writing it requires reading over the one before in a source."""
        tied = [tied_shards(source, self.shards) for source in self.sources.values()]
        return [any(of_sources) for of_sources in zip(*tied, strict=True)]

    def holds_out(self, document: Document) -> bool:
        """Whether a document of ``source`` is for validation: a hash of its group or text
        decides."""
        key = document.whole if document.group is None else document.group
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.held_out_fraction * 2.0**64
