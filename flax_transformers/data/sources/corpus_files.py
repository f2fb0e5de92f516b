"""Lists the files of a corpus that are read, in order, and counts the others."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flax_transformers.data.sources.files import COMPRESSED, reading_source
from flax_transformers.errors import UserError
from flax_transformers.storage.hub import find_data

Unread = dict[str, tuple[int, int]]
"""What is not read: count and bytes by kind. A kind is an ending (".csv") or a noun ("broken
link")."""
_SOLID = (".parquet",)
"""Endings of files that are not read if they are compressed."""


@dataclass
class Listing:
    """(name, path) of the ``files`` that are read, sorted by name, and what is ``unread``.

    Names are relative to the folder. ``root``: the folder that the files are in or below, or the
    one file. ``inside``: whether they are json files that have to contain the split.
    """

    files: list[tuple[str, Path]] = field(default_factory=list)
    unread: Unread = field(default_factory=dict)
    root: Path = Path()
    inside: bool = False

    def leave_out(self, kind: str, size: int = 0) -> None:
        """Counts a file or folder that is not read."""
        count, total = self.unread.get(kind, (0, 0))
        self.unread[kind] = count + 1, total + size


def list_corpus(path: str, endings: Sequence[str]) -> Listing:
    """The files at ``path``: a file, all files below a folder, or those that match a pattern; of
    this machine, or of a dataset of the Hugging Face hub (`find_data`).

    Links are followed, and each folder is read once. Hidden files and folders are not read. Raises
    UserError if there is no file, and if a file or pattern gives an ending that is not one of
    ``endings``.
    """
    path = find_data(path)
    if "://" in path:
        raise UserError(f"Text is read from local files or TFDS, not from {path}; copy it first.")
    root = Path(os.path.expanduser(path))
    listing = Listing(root=root)
    with reading_source(root):
        is_file, is_dir = root.is_file(), root.is_dir()
    if is_file:
        listing.files.append((root.name, root))
    elif is_dir:
        _list_folder(root, endings, listing)
        if not listing.files:
            there = f"; it has {unread_text(listing.unread)}" if listing.unread else ""
            raise UserError(
                f"The folder {path} has no text files ({endings_text(endings)}){there}."
            )
    elif glob.has_magic(path):
        _list_pattern(root, listing)
        while glob.has_magic(str(listing.root)):
            listing.root = listing.root.parent
        if not listing.files:
            raise UserError(f"No file matches the pattern {path}; check the path.")
    else:
        raise UserError(f"There is no file or folder {path}; check the path.")
    for _, file in listing.files:
        if not ending(file, endings):
            raise UserError(
                f"The ending of {file} is not supported; use one of {endings_text(endings)}."
            )
    listing.files.sort()
    return listing


def would_read(path: str, folder: str, endings: Sequence[str]) -> bool:
    """Whether files of ``endings`` in a local ``folder``, which need not exist, or below it may be
    among those at ``path``."""
    if "://" in path or "://" in folder:
        return False
    if glob.has_magic(path):
        endings = fnmatch.filter(endings, f"*{os.path.splitext(path)[1]}")
    if not endings:
        return False
    root = Path(os.path.expanduser(path))
    while glob.has_magic(str(root)):
        root = root.parent
    if not os.path.isdir(root) or (glob.has_magic(path) and "**" not in path):
        return False
    real = os.path.realpath(root)
    below = os.path.relpath(os.path.realpath(folder), real).split(os.sep)
    return below[0] != os.pardir and not any(part.startswith(".") for part in below if part != ".")


def ending(path: Path, endings: Sequence[str]) -> str | None:
    """The known ending of a file name, before an ending of compression; None for others."""
    plain = _plain_name(path)
    found = next((e for e in endings if plain.endswith(e)), None)
    return None if found in _SOLID and plain != path.name.lower() else found


def plain_suffix(path: Path) -> str:
    """The last ending of a file name, before an ending of compression."""
    return os.path.splitext(_plain_name(path))[1]


def _plain_name(path: Path) -> str:
    name = path.name.lower()
    return next((name.removesuffix(e) for e in COMPRESSED if name.endswith(e)), name)


def endings_text(endings: Sequence[str]) -> str:
    """Endings for a message."""
    return f"{', '.join(endings)}; compressed: {', '.join(COMPRESSED)}"


def unread_text(unread: Mapping[str, tuple[int, int]]) -> str:
    """Counts for people, such as "3 .csv, 1 broken link"; the most frequent first."""
    kinds = sorted(unread.items(), key=lambda item: (-item[1][0], item[0]))
    return ", ".join(
        f"{count:,} {kind}{'' if count == 1 or kind.startswith('.') else 's'}"
        for kind, (count, _) in kinds
    )


def _list_folder(root: Path, endings: Sequence[str], listing: Listing) -> None:
    seen: set[tuple[int, int]] = set()
    links = deque([root])
    while links:
        top = links.popleft()
        if _identity(top) in seen:
            listing.leave_out("repeated linked folder")
            continue
        for entry in _entries_below(top, seen):
            _list_entry(entry, root, endings, listing, links)


def _entries_below(top: Path, seen: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder and of all folders below it, except hidden, linked or ``seen``."""
    pending = [top]
    while pending:
        folder = pending.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        with reading_source(folder), os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        yield from entries
        pending += [
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]


def _identity(folder: Path) -> tuple[int, int]:
    with reading_source(folder):
        found = folder.stat()
    return found.st_dev, found.st_ino


def _list_entry(
    entry: os.DirEntry[str],
    root: Path,
    endings: Sequence[str],
    listing: Listing,
    links: deque[Path],
) -> None:
    path = Path(entry.path)
    try:
        found = path.stat()
    except OSError:  # links to nothing, and to themselves
        listing.leave_out("broken link")
        return
    folder = stat.S_ISDIR(found.st_mode)
    if entry.name.startswith("."):
        listing.leave_out("hidden folder" if folder else "hidden file")
    elif folder:
        if entry.is_symlink():
            links.append(path)
    elif not stat.S_ISREG(found.st_mode):
        listing.leave_out("special file")
    elif ending(path, endings):
        listing.files.append((path.relative_to(root).as_posix(), path))
    else:
        listing.leave_out(_kind(path.name.lower()), found.st_size)


def _kind(name: str) -> str:
    """The ending of a file that is not read; of a compressed file the last two."""
    suffixes = Path(name).suffixes
    if not suffixes:
        return "extensionless file"
    return "".join(suffixes[-2:] if suffixes[-1] in COMPRESSED else suffixes[-1:])


def _list_pattern(pattern: Path, listing: Listing) -> None:
    """The files that match; each once if several links lead to its folder."""
    seen: set[str] = set()
    for name in sorted(glob.glob(str(pattern), recursive=True), key=lambda n: (n.count("/"), n)):
        path = Path(name)
        with reading_source(path):
            is_file, is_dir = path.is_file(), path.is_dir()
        if is_file:
            place = os.path.join(os.path.realpath(path.parent), path.name)
            if place in seen:
                listing.leave_out("repeated linked file")
            else:
                seen.add(place)
                listing.files.append((name, path))
        elif is_dir and "**" not in pattern.parts:
            listing.leave_out("folder")
