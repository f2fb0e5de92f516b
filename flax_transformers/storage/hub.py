"""Repositories of the Hugging Face hub: the local cache, downloads and uploads."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from flax_transformers.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
DATA = "hf://datasets/"
BESIDE_WEIGHTS = (".json", ".txt", ".model", ".spm", ".jinja")
"""Endings of configs, tokenizers and chat templates."""
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?P<name>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>[\w][\w./-]*))?")
_REVISION = r"refs/convert/[^/]+|refs/pr/\d+|[^/]+"
_DATA = re.compile(rf"{DATA}(?P<name>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?/(?P<file>.+)")
_TRUE = ("1", "ON", "YES", "TRUE")
_FILE_ENDINGS = (
    *BESIDE_WEIGHTS, ".jsonl", ".safetensors", ".msgpack", ".bin", ".pt", ".csv", ".tsv",
    ".parquet", ".tar", ".gz", ".zst", ".yaml", ".yml", ".py",
)  # fmt: skip
"""Endings that paths of files have, and names of models do not."""


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit."""

    name: str
    revision: str = "main"
    kind: Kind = "model"

    @classmethod
    def of_id(cls, text: str) -> Repository | None:
        """The model of an id such as "gpt2" or "google-bert/bert-base-cased@v1.0".

        None for a text that cannot be one and, if it has no revision, for one that is the path of a
        file by its ending, or whose first folder is on this machine.
        """
        found = _ID.fullmatch(text)
        if found is None or is_path(text):
            return None
        return cls(found["name"], found["revision"] or "main")

    def cached(self) -> Path | None:
        """The folder of its snapshot in the local cache; a download may have left it incomplete."""
        entry = _cache_folder() / "--".join((f"{self.kind}s", *self.name.split("/")))
        reference, commit = entry / "refs" / self.revision, self.revision
        if reference.is_file():
            commit = reference.read_text().strip()
        snapshot = entry / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None

    def complete(
        self, cached: Path, choose: Callable[[Sequence[str]], Sequence[str]]
    ) -> Path | None:
        """As ``download``, of the commit of ``cached``, its snapshot in the local cache."""
        return replace(self, revision=cached.name).download(choose)

    def download(self, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path | None:
        """The folder of its snapshot with those files that ``choose`` takes from their names.

        Files that are there already are not downloaded again. None if there is no such repository,
        or the environment forbids downloads. Raises UserError if the hub cannot be reached,
        refuses, or has no such revision.
        """
        if is_offline():
            return None
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        place: dict[str, Any] = {"repo_id": self.name, "repo_type": self.kind}
        place["revision"] = self.revision
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT  # the default is none
            info: Any = huggingface_hub.HfApi().repo_info(**place, timeout=timeout)
            names = list(choose([file.rfilename for file in info.siblings or ()]))
            log.info("downloading %d files of %s", len(names), self.name)
            return Path(
                huggingface_hub.snapshot_download(
                    **place, allow_patterns=list(map(glob.escape, names)), cache_dir=_cache_folder()
                )
            )
        except RepositoryNotFoundError as error:
            if not isinstance(error, GatedRepoError):
                return None
            raise UserError(
                f"{self.name} is a gated {self.kind} of the Hugging Face hub; accept its terms on "
                "its page, and log in with hf auth login"
            ) from error
        except Exception as error:  # of the client, of its transport, or of the cache's disk
            here = f"there is no folder {self.name} here, and " if self.kind == "model" else ""
            raise UserError(
                f"{here}{self.name} at revision {self.revision} is not complete in the local cache "
                f"and cannot be downloaded from the Hugging Face hub ({_reason(error)}); check the "
                "name and the connection"
            ) from error


def may_have(snapshot: Path, name: str) -> bool:
    """Whether a repository may have a file that its ``snapshot`` in the cache does not have."""
    return not (snapshot / name).is_file() and not _absence(snapshot, name).is_file()


def record_absence(snapshot: Path, name: str) -> None:
    """Record in the cache, as huggingface_hub does, that a repository has no such file."""
    with contextlib.suppress(OSError):  # of a cache that others own
        _absence(snapshot, name).parent.mkdir(parents=True, exist_ok=True)
        _absence(snapshot, name).touch()


def _absence(snapshot: Path, name: str) -> Path:
    return snapshot.parent.parent / ".no_exist" / snapshot.name / name


def is_path(text: str) -> bool:
    """Whether a text that could be an id is read as a path, as ``Repository.of_id`` says."""
    found = _ID.fullmatch(text)
    if found is None or found["revision"] is not None:
        return False
    first, _, rest = text.partition("/")
    return text.lower().endswith(_FILE_ENDINGS) or (rest != "" and Path(first).exists())


def _cache_folder() -> Path:
    """Where huggingface_hub has its snapshots, by the environment of now."""
    variables = os.environ
    above = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or os.path.join(above, "huggingface")
    found = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(found or os.path.join(home, "hub"))))


def is_offline() -> bool:
    """Whether the environment forbids downloads, by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def find_data(path: str) -> str:
    """A local path for "hf://datasets/OWNER/NAME[@REVISION]/FILE"; other paths as they are.

    REVISION may be a reference such as refs/convert/parquet, also written refs%2Fconvert%2Fparquet.
    FILE may be a folder or a glob, whose ``*`` ends at a ``/``. A single file in the cache is taken
    from there. For the others the hub is asked which files there are; where that fails, those in
    the cache are taken, with a warning. Raises UserError for a malformed path, and for what is in
    neither place.
    """
    return _found_data(path) if path.startswith("hf://") else path


@cache
def _found_data(path: str) -> str:
    found = _DATA.fullmatch(path)
    if found is None:
        raise UserError(f"{path} is no path of a dataset's file; write {DATA}OWNER/NAME/FILE")
    repository = Repository(found["name"], unquote(found["revision"] or "main"), "dataset")
    wanted = found["file"].rstrip("/")

    def choose(names: Sequence[str]) -> list[str]:
        return [name for name in names if _matches(name, wanted)]

    cached = repository.cached()
    here = choose(_files(cached)) if cached else []
    if cached and here == [wanted]:
        return str(cached / wanted)
    try:
        folder = repository.download(choose)
    except UserError as error:
        if not here:
            raise
        log.warning("%d files of %s are taken from the local cache: %s", len(here), path, error)
        folder = None
    folder = folder or (cached if here else None)
    if folder is None:
        missing = (
            "is not in the local cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids "
            "downloads; unset it, or check the path"
            if is_offline()
            else "is neither in the local cache nor on the Hugging Face hub, which has no dataset "
            f"{repository.name}; check the name"
        )
        raise UserError(f"{path} {missing}")
    if not choose(_files(folder)):
        raise UserError(f"the dataset {repository.name} has no file {wanted}; check the path")
    return str(folder / wanted)


def _files(snapshot: Path) -> list[str]:
    files = (file for file in snapshot.rglob("*") if file.is_file())
    return [file.relative_to(snapshot).as_posix() for file in files]


def _matches(name: str, wanted: str) -> bool:
    """Whether a file has the name, the pattern, or the folder that is ``wanted``; as in ``glob``,
    only ``**`` stands for several folders."""
    return (
        name == wanted or name.startswith(f"{wanted}/") or _fits(name.split("/"), wanted.split("/"))
    )


def _fits(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":
        return patterns == ["**"] or _fits(parts, patterns[1:]) or _fits(parts[1:], patterns)
    return fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def require_name(name: str) -> None:
    """Raise UserError if ``name`` is not OWNER/NAME."""
    if (found := _ID.fullmatch(name)) is None or found["name"] != name or "/" not in name:
        raise UserError(f"{name!r} is no name of a repository; write OWNER/NAME")


def upload(folder: Path, name: str, *, private: bool, revision: str | None, message: str) -> str:
    """Creates the model repository ``name`` if there is none, commits the files of ``folder`` to
    it, and returns its URL. Raises UserError if the hub refuses."""
    import huggingface_hub

    require_name(name)
    api = huggingface_hub.HfApi()
    try:
        url = str(api.create_repo(name, private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message
        )
    except Exception as error:  # of the client, or of its transport
        raise UserError(
            f"{folder} is not uploaded to {name} ({_reason(error)}); log in with hf auth login, "
            "and check the name and the connection"
        ) from error
    return url


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
