"""Safetensors files, read and written one tensor at a time; weights of transformers' Flax classes.

The format is eight bytes with the length of a header, the header (JSON: name, dtype, shape and byte
range of every tensor), and the tensors. It has no checksum; files written here carry the sha256 of
their tensors in the header, which is checked when they are opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.storage.paths import is_bucket

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_DIGEST = "sha256"
_CHUNK_BYTES = 4 * 2**20
_MAX_JSON_BYTES = 256 * 2**20
_LFS_POINTER = "version https://git-lfs.github.com/spec"

T = TypeVar("T", dict[str, Any], list[Any])

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FileTensor:
    """A tensor on disk. ``np.asarray`` reads it, and raises UserError if it is not finite."""

    name: str
    file: Path
    start: int
    """Offset in the file, in bytes."""
    shape: tuple[int, ...]
    stored: str
    """The format's name for its dtype."""

    @property
    def dtype(self) -> np.dtype:
        """Raise UserError for a dtype that is not one of weights."""
        if self.stored not in _DTYPES:
            raise UserError(
                f"tensor {self.name} in {self.file} is stored as {self.stored}, which cannot be "
                "read; save the weights as F32, BF16 or F16"
            )
        return _DTYPES[self.stored]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Read and not mapped: pages of a mapped file would stay in memory.
        count = math.prod(self.shape)
        value = np.fromfile(self.file, self.dtype, count, offset=self.start).reshape(self.shape)
        if jnp.issubdtype(self.dtype, jnp.floating) and not np.isfinite(value).all():
            raise UserError(
                f"tensor {self.name} in {self.file} has values that are not finite; the file is "
                "damaged, or was saved from a model that had diverged: use another copy"
            )
        return value if dtype is None else value.astype(dtype)


def open_tensors(directory: Path) -> Mapping[str, Any]:
    """All tensors of a directory's model.safetensors, or of the shards in its index; else those of
    flax_model.msgpack, which are read at once.

    Only headers are read, and files with a digest once to check it. Raises UserError, naming the
    file, if one is missing, damaged or at odds with the index.
    """
    if os.path.lexists(directory / WEIGHTS):
        return {tensor.name: tensor for tensor in open_tensor_file(directory / WEIGHTS)}
    if files := flax_files(directory):
        return {name: value for file in files for name, value in _flax_tensors(file)}
    places = read_json(directory / INDEX).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
        raise UserError(f"{directory / INDEX} has no weight_map; download it again")
    shards = sorted(set(places.values()))
    absent = [
        file for file in shards if Path(file).name != file or not (directory / file).is_file()
    ]
    if absent:
        raise UserError(
            f"{directory / INDEX} names the shard {absent[0]!r}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, of {len(shards)}, which "
            "is not there; copy all shards"
        )
    tensors: dict[str, FileTensor] = {}
    for file in shards:
        for tensor in open_tensor_file(directory / file):
            if places.get(tensor.name, file) != file or tensor.name in tensors:
                raise UserError(
                    f"tensor {tensor.name} is in the shard {file} as well as in "
                    f"{places.get(tensor.name, file)}; use the files of one save only"
                )
            tensors[tensor.name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise UserError(
                f"{directory / INDEX} says that tensor {name} is in {file}, but it is not; "
                "use the index and the shards of one save"
            )
    return tensors


def read_json(file: epath.Path | Path, kind: type[T] = dict) -> T:  # type: ignore[assignment]
    """The content of a JSON file, which may be in a bucket: an object, or another ``kind``.

    Raises UserError if it is not there, is something else or is longer than such files are.
    """
    is_local = not is_bucket(file)
    if is_local:
        require_file(Path(file))
    try:
        if is_local and Path(file).stat().st_size > _MAX_JSON_BYTES:
            raise UserError(
                f"{file} is longer than {_MAX_JSON_BYTES // 2**20} MiB; it is not what "
                "transformers writes"
            )
        text = file.read_text("utf-8-sig")
        if text.startswith(_LFS_POINTER):
            raise UserError(_is_pointer(Path(file)))
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error!s:.200}); it should be JSON") from error
    if not isinstance(content, kind):
        kinds = {dict: "object", list: "array"}
        raise UserError(f"{file} holds no JSON {kinds[kind]}; it is not what transformers writes")
    return content


def require_file(file: Path) -> None:
    """Raise UserError unless ``file`` is a regular file: opening a pipe, for example, would block
    forever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        dangling = " (a link to nothing)" if file.is_symlink() else ""
        raise UserError(f"{file} is missing{dangling}; give the folder that it is in") from None
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}); copy it again"
        ) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{file} is no regular file; copy the model's folder again")


def _is_pointer(file: Path) -> str:
    return (
        f"{file} is a pointer of git-lfs and not the file itself; run `git lfs pull` in its "
        "repository, or download the file again"
    )


def open_tensor_file(file: Path) -> Iterator[FileTensor]:
    """The tensors of one file, whose values are not read. Raises UserError if it is damaged."""
    require_file(file)
    try:
        with file.open("rb") as raw:
            if raw.read(len(_LFS_POINTER)) == _LFS_POINTER.encode():
                raise UserError(_is_pointer(file))
        # The library checks that sizes, offsets and the length of the file agree.
        with safetensors.safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
        with file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
            if _DIGEST in metadata and _digest(raw) != metadata[_DIGEST]:
                raise UserError(
                    f"the tensors in {file} have changed since they were saved (their sha256 is "
                    "another); use another copy"
                )
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or no safetensors file ({error!s:.200}); download or copy it again"
        ) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start = 8 + size + entry["data_offsets"][0]
        yield FileTensor(name, file, start, tuple(entry["shape"]), entry["dtype"])


def _digest(raw: Any) -> str:
    digest = hashlib.sha256()
    while chunk := raw.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def flax_files(directory: Path) -> list[Path]:
    """The flax_model.msgpack, or the shards, that the Flax classes of transformers 4 wrote to a
    directory that has no safetensors."""
    if any(os.path.lexists(directory / name) for name in (WEIGHTS, INDEX)):
        return []
    return sorted(directory.glob("flax_model.msgpack")) or sorted(
        directory.glob("flax_model-*-of-*.msgpack")
    )


def _flax_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of one file by the names and in the layouts that safetensors have: weights of
    linear layers [outs, ins], of convolutions [outs, ins, height, width]. Raises UserError for a
    damaged file and for values that are not finite."""
    require_file(file)
    try:
        tree = flatten_dict(msgpack_restore(file.read_bytes()))
    except Exception as error:  # of msgpack, or of whatever else the bytes describe
        raise UserError(
            f"{file} is damaged or was not written by transformers ({error!s:.200}); copy it again"
        ) from error
    for path, value in tree.items():
        *place, last = map(str, path)
        value = np.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(value).all():
            raise UserError(
                f"{'/'.join((*place, last))} in {file} has values that are not finite; use another "
                "copy"
            )
        if last == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        name = "weight" if last in ("kernel", "scale", "embedding") else last
        yield ".".join((*place, name)), value


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header of a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def plan_shards(tensors: Iterable[TensorInfo], max_shard_bytes: int) -> dict[str, list[TensorInfo]]:
    """File names, each with its tensors in order; a tensor is never split."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    for shard in shards:
        # Wide types first, so that every tensor begins at a multiple of its item's size.
        shard.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem, ending = WEIGHTS.split(".")
    return {
        f"{stem}-{number:05}-of-{len(shards):05}.{ending}": shard
        for number, shard in enumerate(shards, 1)
    }


def write_shard_index(directory: Path, shards: Mapping[str, list[TensorInfo]]) -> None:
    """The index from tensors to shards, as transformers writes it."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.bytes for tensor in tensors),
        },
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX).write_text(text, "utf-8")


def write_file(file: Path, tensors: list[TensorInfo], values: Iterable[np.ndarray]) -> None:
    """Write ``values``, one for each of ``tensors`` in order, with one in memory at a time."""
    # transformers refuses a file that does not say which framework its layout follows.
    metadata = {"format": "pt", _DIGEST: "0" * 64}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.bytes],
        }
    digest = hashlib.sha256()
    with file.open("wb") as raw:
        raw.write(_encode(header))
        for tensor, value in zip(tensors, values, strict=True):
            if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{tensor} was to be written, not {value.dtype} {value.shape}")
            content = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            digest.update(content)
            raw.write(content)
        metadata[_DIGEST] = digest.hexdigest()  # of the same length: nothing moves
        raw.seek(0)
        raw.write(_encode(header))
        raw.flush()
        os.fsync(raw.fileno())


def _encode(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
