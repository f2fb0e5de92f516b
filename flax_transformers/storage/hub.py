"""Repositories of the Hugging Face hub: the local cache, downloads and uploads."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from flax_transformers.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
DATA = "hf://datasets/"
BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja")
"""Endings of configs, tokenizers and chat templates."""
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?P<name>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>[\w][\w./-]*))?")
_DATA = re.compile(rf"{DATA}(?P<name>{_NAME}/{_NAME})(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit."""

    name: str
    revision: str = "main"
    kind: Kind = "model"

    @classmethod
    def of_id(cls, text: str) -> Repository | None:
        """The model of an id such as "gpt2" or "google-bert/bert-base-cased@v1.0"; None for a text
        that cannot be one."""
        found = _ID.fullmatch(text)
        return found and cls(found["name"], found["revision"] or "main")

    def cached(self) -> Path | None:
        """The folder of its snapshot in the local cache."""
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
        entry = cache / "--".join((f"{self.kind}s", *self.name.split("/")))
        reference, commit = entry / "refs" / self.revision, self.revision
        if reference.is_file():
            commit = reference.read_text().strip()
        snapshot = entry / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None

    def download(self, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path | None:
        """The folder of its snapshot with those files that ``choose`` takes from their names.

        None if there is no such repository, or HF_HUB_OFFLINE is set. Raises UserError if the hub
        cannot be reached, refuses, or has no such revision.
        """
        if is_offline():
            return None
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        place: dict[str, Any] = {"repo_id": self.name, "repo_type": self.kind}
        place["revision"] = self.revision
        try:
            info: Any = huggingface_hub.HfApi().repo_info(**place)
            names = list(choose([file.rfilename for file in info.siblings or ()]))
            log.info("downloading %d files of %s", len(names), self.name)
            home = os.environ.get("HF_HUB_CACHE") or None
            return Path(
                huggingface_hub.snapshot_download(**place, allow_patterns=names, cache_dir=home)
            )
        except RepositoryNotFoundError as error:
            if not isinstance(error, GatedRepoError):
                return None
            raise UserError(
                f"{self.name} is a gated {self.kind} of the Hugging Face hub; accept its terms on "
                "its page, and log in with hf auth login"
            ) from error
        except Exception as error:  # of the client, of its transport, or of the cache's disk
            raise UserError(
                f"{self.name} at revision {self.revision} is not on this machine, and cannot be "
                f"downloaded from the Hugging Face hub ({_reason(error)}); check the name and the "
                "connection"
            ) from error


def is_offline() -> bool:
    """Whether the environment forbids downloads, by HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def find_data(path: str) -> str:
    """A local path for "hf://datasets/OWNER/NAME[@REVISION]/FILE"; other paths as they are.

    FILE may be a folder or a glob. What the cache does not hold is downloaded. Raises UserError for
    a malformed path, and for what is in neither place.
    """
    return _found_data(path) if path.startswith("hf://") else path


@cache
def _found_data(path: str) -> str:
    found = _DATA.fullmatch(path)
    if found is None:
        raise UserError(f"{path} is no path of a dataset's file; write {DATA}OWNER/NAME/FILE")
    repository = Repository(found["name"], found["revision"] or "main", "dataset")
    wanted = found["file"].rstrip("/")

    def choose(names: Sequence[str]) -> list[str]:
        return [name for name in names if _matches(name, wanted)]

    folder = repository.download(choose) or repository.cached()
    if folder is None:
        raise UserError(
            f"there is no dataset {repository.name} on the Hugging Face hub or in its local cache; "
            "check the name (HF_HUB_OFFLINE turns downloads off)"
        )
    return str(folder / wanted)


def _matches(name: str, wanted: str) -> bool:
    return fnmatchcase(name, wanted) or name.startswith(f"{wanted}/")


def upload(folder: Path, name: str, *, private: bool, revision: str | None, message: str) -> str:
    """Creates the model repository ``name`` if there is none, commits the files of ``folder`` to
    it, and returns its URL. Raises UserError if the hub refuses."""
    import huggingface_hub

    if (found := Repository.of_id(name)) is None or found.name != name or "/" not in name:
        raise UserError(f"{name!r} is no name of a repository; write OWNER/NAME")
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
