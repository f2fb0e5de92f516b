"""What a store is made from, and who may write in its folder.

The first writer notes in ``corpus.json`` what the store is made from; anything else is refused from
then on. Paths and modification times are no part of it: a corpus that was moved, or a store that
was copied, are the same as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from flax_transformers.data.config import TextData
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.read import AnySource
from flax_transformers.data.store.files import digest, to_json
from flax_transformers.data.store.tokenizer import at_hand, load
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder

CORPUS = "corpus.json"
Compare = Literal["nothing", "sizes", "content"]
"""What of a corpus is compared with a finished store: its content is read for it."""


@dataclass(frozen=True)
class Corpus:
    """What a store is made from.

    ``settings``: the fields that its bytes depend on, as JSON, with ``defaults`` for fields that a
    store of an earlier version does not name. ``sizes`` and ``content`` find digests of its files:
    the first reads none of them. ``loaded`` are the tokenizers that come from a path: where that is
    there, they are compared by their content, when they are opened, and not by their settings.
    """

    path: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    sizes: Callable[[], str]
    content: Callable[[], str]
    loaded: Mapping[str, TokenizerConfig] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Digest of all that the store's bytes depend on."""
        loaded = {name: load(config).fingerprint for name, config in self.loaded.items()}
        made_of = {"settings": self.settings, "content": self.content()}
        return digest({**made_of, "loaded": loaded} if loaded else made_of)


def corpus_of(data: TextData) -> Corpus:
    """What the token store of ``data`` is made from."""
    used = [source for source in (data.source, data.validation_source) if source is not None]
    configs = {"tokenizer": data.tokenizer, "target_tokenizer": data.target_tokenizer}
    return Corpus(
        path=data.source.path,
        settings=settings_of(data),
        defaults=settings_of(_all_defaults(data)),
        sizes=partial(_of_all, sources.sizes, used),
        content=partial(_of_all, sources.fingerprint, used),
        loaded={name: one for name, one in configs.items() if one is not None and one.path},
    )


def _of_all(find: Callable[[AnySource], str], used: list[AnySource]) -> str:
    return digest({"sources": [find(source) for source in used]})


def settings_of(data: TextData) -> dict[str, Any]:
    """The fields that a store's bytes depend on, as JSON."""
    other = data.validation_source
    settings = {
        "source": source_settings(data.source),
        "validation_source": None if other is None else source_settings(other),
        "validation_fraction": data.validation_fraction,
        "tokenizer": data.tokenizer.settings,
        "gates": asdict(data.filters),
        "shards": data.shards,
    }
    if data.target_tokenizer is not None:
        settings["target_tokenizer"] = data.target_tokenizer.settings
    return without_paths(settings)


def source_settings(source: Any) -> dict[str, Any]:
    """The fields of a source and its type, which tells what the fields mean."""
    return {"type": type(source).__name__, **asdict(source)}


def _all_defaults(data: TextData) -> TextData:
    other = data.validation_source
    return TextData(
        source=type(data.source)(), validation_source=None if other is None else type(other)()
    )


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain JSON that say nothing of places; a tokenizer at a path is ``loaded``."""
    found: dict[str, Any] = {}
    for name, value in json.loads(to_json(settings)).items():
        if not isinstance(value, dict):
            found[name] = value
        elif name.endswith("tokenizer") and value.get("path") is not None:
            found[name] = {"loaded": True}
        else:
            found[name] = {key: v for key, v in value.items() if not key.endswith("path")}
    return found


def claim(folder: Folder, corpus: Corpus, *, by_size: bool = False) -> dict[str, Any]:
    """From now on the folder belongs to this corpus and these settings: the record of them.

    ``by_size``: the sizes of the files are compared and not their content, so that jobs beside each
    other do not all read the whole corpus; a record that is new then has no content.
    """
    if not folder.exists(CORPUS):
        content = None if by_size else corpus.content()
        record = {"settings": corpus.settings, "sizes": corpus.sizes(), "content": content}
        folder.write(CORPUS, to_json(record))
        return record
    claimed = _claimed(folder)
    refuse_other(folder, claimed, corpus)
    if "sizes" not in claimed:
        raise UserError(
            f"The store in {folder.path} was begun by an earlier version and is not finished; "
            "delete it and prepare it again."
        )
    if corpus.sizes() != claimed["sizes"] or not (by_size or _same_content(corpus, claimed)):
        raise UserError(_changed(folder, claimed, corpus))
    return claimed


def _same_content(corpus: Corpus, claimed: Mapping[str, Any]) -> bool:
    return claimed["content"] is None or corpus.content() == claimed["content"]


def _changed(folder: Folder, found: Mapping[str, Any], corpus: Corpus) -> str:
    made_from = str(found.get("content") or found["sizes"])[:12]
    return (
        f"The store in {folder.path} was made with corpus {made_from} ({corpus.path}), and the "
        "same files have changed since; choose another store directory, or delete that one to make "
        "it anew."
    )


def require_unchanged(folder: Folder, corpus: Corpus, claimed: Mapping[str, Any]) -> None:
    """Raises UserError if the corpus is no longer what the folder was claimed for.

    Without a content in the record, the sizes are compared alone.
    """
    if corpus.sizes() != claimed["sizes"] or not _same_content(corpus, claimed):
        raise UserError(
            f"The corpus {corpus.path} changed while it was prepared, so the store in "
            f"{folder.path} would hold parts of both; delete that store and prepare it again."
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


def refuse_other(folder: Folder, found: Mapping[str, Any], corpus: Corpus) -> None:
    """Raises UserError if a store made from ``found`` has other settings, naming both."""
    theirs, ours = _flat(without_paths(found["settings"])), _flat(corpus.settings)
    for name, value in _flat(corpus.defaults).items():
        if name in ours:
            theirs.setdefault(name, value)
    by_content = [name for name, config in corpus.loaded.items() if at_hand(config)]
    names = sorted(
        name
        for name in {*theirs, *ours}
        if theirs.get(name) != ours.get(name) and name.split(".")[0] not in by_content
    )
    if names:
        was, asked = (
            ", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (theirs, ours)
        )
        raise UserError(
            f"The store in {folder.path} was made with {was}; this run asks for {asked}; choose "
            "another store directory, or delete that one to make it anew."
        )


def refuse_changed(
    folder: Folder, found: Mapping[str, Any], corpus: Corpus, compare: Compare
) -> None:
    """Raises UserError if the corpus is at hand and is not what ``found`` says."""
    names = {"nothing": (), "sizes": ("sizes",), "content": ("sizes", "content")}[compare]
    for name in names:
        if name not in found or (name == "content" and "sizes" not in found):
            continue  # of an earlier version, which noted no sizes and another content
        try:
            now = getattr(corpus, name)()
        except UserError:  # a finished store can be used where its corpus is not at hand
            return
        if now != found[name]:
            raise UserError(_changed(folder, found, corpus))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
