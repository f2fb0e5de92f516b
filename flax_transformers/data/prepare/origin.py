"""What a store is made from.

The first writer notes it in ``corpus.json``; from then on the folder accepts nothing else. Paths
and modification times are not part of it, so that a corpus may be moved and a store copied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from flax_transformers.data.base import Compare
from flax_transformers.data.sources.records import LATER
from flax_transformers.data.store.files import digest, record_json
from flax_transformers.data.store.tokenizer import at_hand, load
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder

log = logging.getLogger(__name__)

CORPUS = "corpus.json"
_VERSION = "store_version"  # of a source; left out if it is 1


@dataclass(frozen=True)
class Origin:
    """What a store is made from.

    ``path``: the source, for messages. ``settings``: the settings that its bytes depend on, as
    JSON, with ``defaults`` for those that stores of earlier versions do not name. ``sizes`` and
    ``content`` compute hashes of the source's files; ``sizes`` does not read them. ``all_sizes``
    and ``all_content`` do so for the files of all splits, which earlier versions read, and with
    ``all_splits`` this one. ``loaded``: the tokenizers with a path; if the path exists they are
    compared by content, not by settings.
    """

    path: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    sizes: Callable[[], str]
    content: Callable[[], str]
    loaded: Mapping[str, TokenizerConfig] = field(default_factory=dict)
    all_sizes: Callable[[], str] | None = None
    all_content: Callable[[], str] | None = None
    all_splits: bool = False

    @property
    def version(self) -> int:
        """The newest version of its sources."""
        sections = (value for value in self.settings.values() if isinstance(value, dict))
        return max((section.get(_VERSION, 1) for section in sections), default=1)

    def former(self, version: int, *, all_splits: bool) -> Origin:
        """The same with sources of at most this version, or that read the files of all splits, as
        earlier versions name its store."""
        settings = {name: _of_version(value, version) for name, value in self.settings.items()}
        former = replace(self, settings=settings)
        if not all_splits or self.all_sizes is None or self.all_content is None:
            return former
        return replace(former, sizes=self.all_sizes, content=self.all_content, all_splits=True)

    @property
    def identity(self) -> str:
        """Hash of everything that the store's bytes depend on."""
        loaded = {name: load(config).fingerprint for name, config in self.loaded.items()}
        made_of = {"settings": self.settings, "content": self.content()}
        return digest({**made_of, "loaded": loaded} if loaded else made_of)


def _of_version(settings: Any, version: int) -> Any:
    if not isinstance(settings, dict) or settings.get(_VERSION, 1) <= version:
        return settings
    others = {key: value for key, value in settings.items() if key != _VERSION}
    return others | ({_VERSION: version} if version > 1 else {})


def source_settings(source: Any) -> dict[str, Any]:
    """The fields of a source and its type, which defines their meaning."""
    version = getattr(source, _VERSION, 1)
    settings = {"type": type(source).__name__, **asdict(source)}
    for one in fields(source):
        if one.metadata.items() >= LATER.items() and settings[one.name] == one.default:
            del settings[one.name]
    return settings | ({_VERSION: version} if version > 1 else {})


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain JSON without paths; a tokenizer with a path is noted as ``loaded``."""
    found: dict[str, Any] = {}
    for name, value in json.loads(record_json(settings)).items():
        if not isinstance(value, dict):
            found[name] = value
        elif name.endswith("tokenizer") and value.get("path") is not None:
            found[name] = {"loaded": True}
        else:
            found[name] = {key: v for key, v in value.items() if not key.endswith("path")}
    return found


def claim(folder: Folder, origin: Origin, *, by_size: bool = False) -> dict[str, Any]:
    """Reserves the folder for a store of this origin and returns the record of it.

    ``by_size``: compares the sizes of the files instead of their content, so that not every job
    reads the whole corpus; a new record then has no content. Raises UserError if the folder is
    reserved for something else.
    """
    if not folder.exists(CORPUS):
        content = None if by_size else origin.content()
        record = {"settings": origin.settings, "sizes": origin.sizes(), "content": content}
        folder.write(CORPUS, record_json(record))
        return record
    claimed = _claimed(folder)
    earlier = require_same_settings(folder, claimed, origin)
    if earlier or "sizes" not in claimed:
        raise UserError(
            f"The store in {folder.path} was started by an earlier version and is not finished; "
            "delete it and prepare it again."
        )
    if origin.sizes() != claimed["sizes"] or not (by_size or _same_content(origin, claimed)):
        raise UserError(_changed(folder, claimed, origin))
    return claimed


def _same_content(origin: Origin, claimed: Mapping[str, Any]) -> bool:
    return claimed["content"] is None or origin.content() == claimed["content"]


def _changed(folder: Folder, found: Mapping[str, Any], origin: Origin) -> str:
    made_from = str(found.get("content") or found["sizes"])[:12]
    return (
        f"The store in {folder.path} was made with corpus {made_from} ({origin.path}), and the "
        "same files have changed since; choose another store directory, or delete that one to "
        "prepare it again."
    )


def require_unchanged(folder: Folder, origin: Origin, claimed: Mapping[str, Any]) -> None:
    """Raises UserError if the source has changed since the folder was reserved.

    If the record has no content, only sizes are compared.
    """
    if origin.sizes() != claimed["sizes"] or not _same_content(origin, claimed):
        raise UserError(
            f"The corpus {origin.path} changed while it was prepared, so the store in "
            f"{folder.path} would mix both versions; delete that store and prepare it again."
        )


def _claimed(folder: Folder) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(CORPUS))
        if isinstance(found["settings"], dict) and isinstance(found["content"], str | None):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"The file {CORPUS} of the unfinished store in {folder.path} is damaged; delete the "
        "store and prepare it again."
    )


def require_same_settings(folder: Folder, found: Mapping[str, Any], origin: Origin) -> bool:
    """Whether ``found`` has another version of a source. Raises UserError, naming both, if it has
    other settings."""
    from flax.traverse_util import flatten_dict  # imports jax, which configs do not need

    theirs, ours, defaults = (
        flatten_dict(settings, sep=".")
        for settings in (without_paths(found["settings"]), origin.settings, origin.defaults)
    )
    for name, value in defaults.items():
        if name in ours and not name.endswith(_VERSION):
            theirs.setdefault(name, value)
    by_content = [name for name, config in origin.loaded.items() if at_hand(config)]
    different = sorted(
        name
        for name in {*theirs, *ours}
        if theirs.get(name) != ours.get(name) and name.split(".")[0] not in by_content
    )
    names = [name for name in different if not name.endswith(_VERSION)]
    if names:
        was, asked = (
            ", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (theirs, ours)
        )
        raise UserError(
            f"The store in {folder.path} was made with {was}; this run asks for {asked}; choose "
            "another store directory, or delete that one to prepare it again."
        )
    return different != names


def require_same_source(
    folder: Folder, found: Mapping[str, Any], origin: Origin, compare: Compare
) -> bool:
    """Whether ``found`` has the files of all splits, as in earlier versions. Raises UserError if
    the source exists and is another one, or logs it."""
    sizes = ("sizes",)
    names = {
        "nothing": (), "warning": sizes, "sizes": sizes, "content": (*sizes, "content")
    }[compare]  # fmt: skip
    earlier = False
    for name in names:
        if name not in found or (name == "content" and "sizes" not in found):
            continue  # earlier versions noted no sizes and another content
        try:
            same = found[name] == getattr(origin, name)()
            whole = origin.former(origin.version, all_splits=True)
            former = not same and found[name] == getattr(whole, name)()
        except UserError:  # a finished store can be used without its source
            return earlier
        earlier |= former
        if not same and not former and compare == "warning":
            log.warning("%s It is used as it is.", _changed(folder, found, origin))
        elif not same and not former:
            raise UserError(_changed(folder, found, origin))
    return earlier
