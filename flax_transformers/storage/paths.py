"""Paths of workdirs and checkpoints, local or in a bucket.

They are `epath.Path`, because orbax reads and writes checkpoints through it. Token stores use
`folders.Folder` instead, which reads byte ranges and needs no cloud client.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.storage.s3 import patch_orbax


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a URL and not a local path."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """``path`` as an absolute path or a URL. Raises UserError as `bucket_path`."""
    if is_bucket(path):
        return bucket_path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def bucket_path(url: str | os.PathLike[str]) -> epath.Path:
    """``url`` as a path. Raises UserError unless it is gs:// or s3://, its client is installed and
    the bucket can be reached."""
    text = os.fspath(url).rstrip("/")
    if not text.startswith(("gs://", "s3://")):
        raise UserError(
            f"{text} cannot be reached; a workdir is a folder, or in gs:// or s3://: choose one of "
            "these"
        )
    try:
        import fsspec

        # Orbax writes without this client, which would keep listing what was there before.
        for client in ("gcs", "gs", "s3"):
            fsspec.config.conf.setdefault(client, {})["use_listings_cache"] = False
        folder = epath.Path(text)
        folder.exists()
        bucket = text.removeprefix("s3://").partition("/")[0]
        if text.startswith("s3://") and not epath.Path(f"s3://{bucket}").exists():
            # Its client would create a bucket of that name.
            raise FileNotFoundError("there is no such bucket")
    except ImportError as error:
        raise UserError(
            f"{text} cannot be reached ({error}); run pip install 'flax-transformers[buckets]'"
        ) from error
    except Exception as error:  # each client has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{text} cannot be reached ({reason}); check its name and your access, or use a local "
            "folder"
        ) from error
    if text.startswith("s3://"):
        patch_orbax()
    return folder


def list_files(folder: epath.Path) -> list[str]:
    """Relative POSIX paths of all files below ``folder``, sorted."""
    names, pending = [], [(folder, "")]
    while pending:
        parent, prefix = pending.pop()
        for child in parent.iterdir():
            if is_folder(child):
                pending.append((child, f"{prefix}{child.name}/"))
            else:
                names.append(prefix + child.name)
    return sorted(names)


def is_there(file: epath.Path | Path) -> bool:
    """Whether there is a file, of any kind but a folder.

    Raises UserError for a link to nothing, as in a folder of a hub's cache that was copied without
    the files that its links point to: without its side files a model would be another one.
    """
    if not is_bucket(file) and os.path.islink(file) and not os.path.exists(file):
        raise UserError(
            f"{file} is a link to nothing; copy the folder again, following its links (cp -rL)"
        )
    return file.exists() and not file.is_dir()


def exists(path: epath.Path) -> bool:
    """Whether the file or folder exists. Unlike `Path.exists`, raises OSError, or an error of the
    bucket's client, if the storage fails."""
    return _is_folder(path) is not None


def is_folder(path: epath.Path) -> bool:
    """Whether the folder exists. Raises as `exists`."""
    return bool(_is_folder(path))


def _is_folder(path: epath.Path) -> bool | None:
    """None if nothing is there."""
    try:
        if not is_bucket(path):
            return stat.S_ISDIR(os.stat(path).st_mode)
        import fsspec

        # Its own `exists` takes any failure for a no.
        client, name = fsspec.core.url_to_fs(os.fspath(path))
        return client.info(name)["type"] == "directory"
    except (FileNotFoundError, NotADirectoryError):
        return None
