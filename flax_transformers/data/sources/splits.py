"""Chooses the files of a split by their names, as the Hugging Face hub does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flax_transformers.data.sources.corpus_files import Listing, ending
from flax_transformers.data.sources.documents import listed
from flax_transformers.errors import UserError

DEFAULT = "train"
_WORDS = {
    DEFAULT: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = frozenset(word for words in _WORDS.values() for word in words)
"""Words by which splits are recognized in the names of files, and of lists in a JSON file."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def named_split(parts: Sequence[str], split: str) -> str | None:
    """The split that a file is named by: ``split``, a common one, or that of numbered files.

    ``parts``: its folders and its name. A folder says it (``test/``), or else the name:
    ``snli_test.jsonl``, ``test-00000-of-00001.parquet``, ``dolly-test-00000-of-00001.parquet``, and
    of the split test_sft ``test_sft-00000-of-00001.parquet``.
    """
    *folders, name = parts
    for folder in reversed(folders):
        if (found := _known(folder, split)) is not None:
            return found
    stem = name.split(".")[0]
    if shard := _SHARD.match(name):
        return _word_in(shard[1], split, "[-. ]+") or shard[1]
    return _known(stem, split) or _word_in(name, split)


def _known(word: str, split: str) -> str | None:
    if word == split:
        return split
    return next((known for known, words in _WORDS.items() if word.lower() in words), None)


def _word_in(name: str, split: str, between: str = r"[-._ \d]+") -> str | None:
    words = [name, *re.split(between, name)]
    return next((found for word in words if (found := _known(word, split)) is not None), None)


def keep_split(listing: Listing, path: str, split: str, *, inside: bool) -> Listing:
    """The ``listing`` of ``path`` with the files of ``split`` alone; the others are ``unread``.

    A ``path`` of one file is of every split. The default split is all files unless each is named by
    a split, not all by the same one, and some by a common one. ``inside``: whether JSON files may
    contain the split. Raises UserError if no file is of it.
    """
    root, files = listing.root, listing.files
    if root in [file for _, file in files]:
        return listing
    named = [named_split(file.relative_to(root).parts, split) for _, file in files]
    splits = sorted({name for name in named if name is not None})
    common = any(_word_in(name, split) for name in splits)
    divided = None not in named and len(splits) > 1 and common
    chosen = [file for file, name in zip(files, named, strict=True) if name == split]
    if split == DEFAULT and not divided:
        return listing
    in_json = False
    if not chosen and split != DEFAULT and not divided:
        in_json = _known(root.name, split) != split
        is_json = [file for file in files if inside and ending(file[1], (".json",))]
        chosen = is_json if in_json else files
    if not chosen:
        there = f"only of {listed(splits)}" if splits else "as none is named by a split"
        remedy = "name one of them in" if splits else "leave out"
        raise UserError(
            f"{path} has no files of the split {split!r}, {there}; {remedy} the source's split."
        )
    kept = Listing(chosen, dict(listing.unread), root, in_json)
    for _, file in set(files).difference(chosen):
        kept.leave_out("other-split file", file.stat().st_size)
    return kept
