"""Step folders of a run: lists and verifies them, and sets damaged ones aside.

Only one process may call these functions at a time; `manager` ensures it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from flax_transformers.checkpointing.metric_mode import mode_of
from flax_transformers.errors import UserError
from flax_transformers.storage import checksums
from flax_transformers.storage.paths import absolute, exists, is_bucket, is_folder, list_files

log = logging.getLogger(__name__)

Files = Mapping[str, bytes | str | os.PathLike[str]]

BEST = "best"
"""In place of a step's number: the best step by the metric that the run keeps its best steps by."""

_NEEDED = ("state/_METADATA", "state/manifest.ocdbt", "meta/metadata")
_STEP = re.compile(r"0|[1-9]\d*")
_intact: dict[str, list[tuple[str, int, int, int]]] = {}
"""The signature of each step folder that passed in this process."""
_SET_ASIDE = re.compile(r"(invalid|unverified|unused|foreign)-\d+-\d+")


@dataclass(frozen=True)
class SavedStep:
    """A verified step folder, or, if `verified` is false, one without checksums."""

    step: int
    folder: epath.Path
    verified: bool

    @property
    def meta(self) -> dict[str, Any]:
        return read_meta(self.folder)


def require_writable(directory: epath.Path) -> None:
    """Creates `directory` and writes a file in it. Raises UserError if that fails."""
    probe = directory / f".writable-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "choose another --workdir"
        raise UserError(
            f"checkpoints cannot be written to {directory} ({error.strerror or error}); {remedy}"
        ) from error


def finished_steps(directory: epath.Path) -> list[int]:
    """Committed steps, oldest first, without verifying them."""
    if not exists(directory):
        return []
    try:
        named = [path for path in directory.iterdir() if _STEP.fullmatch(path.name)]
    except FileNotFoundError:  # a folder in a bucket, which ends with its last file
        return []
    folders = [path for path in named if is_folder(path)]
    if is_bucket(directory):  # written in place; the commit writes a file
        folders = [path for path in folders if exists(path / checksums.COMMIT_FILES[1])]
    return sorted(int(path.name) for path in folders)


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a step folder or the folder of a run with a committed step. The folder of
    checkpoints may exist before the first step."""
    root = absolute(path)
    with reading_step(root):
        inner = root / "checkpoints"
        directory = inner if exists(inner) else root
        return exists(root / "state") or bool(finished_steps(directory))


def problems(folder: epath.Path) -> list[str] | None:
    """The problems of a step folder, one phrase per file; None if it has no checksums.

    A local folder that passed and has not changed since is not read again in this process. Raises
    UserError for a folder that cannot be read, which does not mean that it is damaged.
    """
    with reading_step(folder):
        if checksums.has_index(folder):
            before = _signature(folder)
            if before and _intact.get(str(folder)) == before:
                return []
            found = checksums.verify(folder)
            if not found:
                _intact[str(folder)] = before
            return found
        missing = [f"{name} is missing" for name in _NEEDED if not exists(folder / name)]
        return missing or None


def _signature(folder: epath.Path) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of the last change of each file; empty for remote storage."""
    if is_bucket(folder):
        return []
    try:
        stats = [(name, os.stat(folder / name)) for name in sorted(list_files(folder))]
    except OSError:  # which the check itself reports
        return []
    return [(name, one.st_ino, one.st_size, one.st_ctime_ns) for name, one in stats]


@contextlib.contextmanager
def reading_step(folder: epath.Path) -> Iterator[None]:
    """Turns a failure of the storage into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the clients of buckets have errors of their own
        if not is_bucket(folder) and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        where = getattr(error, "filename", None) or folder
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason or type(error).__name__}: {where}); "
            "nothing was changed: make it readable, or wait until the storage is available, "
            "and run the same command again"
        ) from error


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The JSON item of a step folder, with what was added later. Raises UserError if it is missing
    or invalid."""
    try:
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        with contextlib.suppress(FileNotFoundError):
            meta = meta | json.loads((folder / checksums.META_UPDATE).read_bytes())
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder} has no readable meta ({error}); use another"
        ) from error
    if not isinstance(meta, dict):
        raise UserError(f"checkpoint {folder} has a meta that is not a JSON object; use another")
    return meta


def config_of_run(meta: Mapping[str, Any], workdir: epath.Path) -> Any:
    """The config in a checkpoint's meta, as JSON. Raises UserError for converted weights."""
    if "config" not in meta:
        raise UserError(
            f"{workdir} holds converted weights and no run to resume; choose another --workdir, "
            f"and start from the weights with --init-from {workdir}"
        )
    return meta["config"]


def update_meta(folder: epath.Path, changes: Mapping[str, Any]) -> None:
    """Sets fields of the meta of a committed step. It stays intact if the process is killed."""
    checksums.write_late(folder, checksums.META_UPDATE, json.dumps(changes).encode())
    if checksums.has_index(folder):
        checksums.seal(folder)


def named_step(meta: Mapping[str, Any]) -> int | None:
    """The step in a checkpoint's meta; None if the meta has none."""
    position = meta.get("position")
    step = position.get("step") if isinstance(position, dict) else None
    return step if isinstance(step, int) else None


def score_of(meta: dict[str, Any], metric: str) -> float:
    """The metric of a checkpoint, nan if it was not evaluated at its own step."""
    try:
        return float(meta["metrics"].get(metric, math.nan)) if was_evaluated(meta) else math.nan
    except (TypeError, ValueError, AttributeError, LookupError):
        return math.nan


def was_evaluated(meta: Mapping[str, Any]) -> bool:
    """Whether the metrics in a checkpoint's meta are those of its own step."""
    evaluations = meta.get("evaluations")
    if evaluations is None:  # of earlier versions
        return True
    return bool(evaluations) and evaluations[-1]["step"] == named_step(meta)


def is_link(folder: epath.Path) -> bool:
    return not is_bucket(folder) and os.path.islink(folder)


def write_files(folder: epath.Path, files: Files) -> None:
    """Writes bytes, or copies of files and folders, under their names in `folder`."""
    for name, contents in files.items():
        target = folder / name
        if isinstance(contents, bytes):
            copies = {target: contents}
        elif (source := epath.Path(contents)).is_dir():
            copies = {target / n: (source / n).read_bytes() for n in list_files(source)}
        else:
            copies = {target: source.read_bytes()}
        for path, raw in copies.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)


def remove(folder: epath.Path) -> None:
    """Removes a folder as far as possible, also while a failed write still adds files, and once
    more if it makes the folder again."""
    absent = 0
    for _ in range(10):
        with contextlib.suppress(OSError):
            folder.rmtree(missing_ok=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == 2:
            return
        time.sleep(0.1)


def choose_newest(
    directory: epath.Path, set_aside_at_most: int | None, before: int | None = None
) -> SavedStep | None:
    """The newest step that passes verification, or, if none passes, the newest without checksums.

    Newer steps that fail are set aside, or with `set_aside_at_most=None` skipped, with a warning. A
    step whose meta names another step, as in a copied folder, is skipped with a warning. `before`:
    only older steps count. Raises UserError if more would be set aside than allowed, if all are
    set aside, or if a step cannot be read.
    """

    def reject(kind: str, step: int, reason: str) -> None:
        if set_aside_at_most is None:
            log.warning("checkpoint %s %s: skipped", directory / str(step), reason)
        else:
            set_aside_step(directory, kind, step, reason, set_aside_at_most)

    with reading_step(directory):
        steps = [s for s in finished_steps(directory) if before is None or s < before]
    unverified: list[int] = []
    for step in reversed(steps):
        folder = directory / str(step)
        wrong = problems(folder)
        if wrong:
            reject("invalid", step, f"is damaged ({few(wrong)})")
        elif _is_foreign(folder, step):
            continue
        elif wrong is None:
            unverified.append(step)
        else:
            for newer in unverified:
                reject("unverified", newer, f"has no checksums, and {step} has")
            return SavedStep(step, folder, verified=True)
    if not unverified:
        if set_aside_at_most is not None and before is None:
            _refuse_to_start_over(directory)
        return None
    newest = unverified[0]
    log.warning("no checkpoint in %s has checksums: using %d unverified", directory, newest)
    return SavedStep(newest, directory / str(newest), verified=False)


def best_of_folder(path: epath.Path) -> epath.Path | None:
    """The folder of checkpoints whose best step is meant by ``path``, RUN/checkpoints/best; None
    for other paths."""
    if path.name != BEST or exists(path):
        return None
    inner = path.parent / "checkpoints"
    return inner if exists(inner) else path.parent


def choose_best(directory: epath.Path) -> SavedStep:
    """The step with the best score, in the metric and mode of the newest one's config, that passes
    verification. Raises UserError if none has a score."""
    metas: dict[int, dict[str, Any]] = {}
    with reading_step(directory):
        for step in finished_steps(directory):
            with contextlib.suppress(UserError):
                meta = read_meta(directory / str(step))
                if named_step(meta) == step and not meta.get("consecutive_skips"):
                    metas[step] = meta
    metric, mode = _best_metric(metas[max(metas)].get("config") if metas else None)
    scores = {step: score_of(meta, metric) for step, meta in metas.items()}
    finite = [step for step, score in scores.items() if math.isfinite(score)]
    for step in sorted(finite, key=lambda one: scores[one], reverse=mode == "max"):
        wrong = problems(directory / str(step))
        if wrong:
            log.warning("checkpoint %s is damaged (%s): skipped", directory / str(step), few(wrong))
            continue
        log.info("the best step in %s is %d, %s %.4g", directory, step, metric, scores[step])
        return SavedStep(step, directory / str(step), verified=wrong is not None)
    raise UserError(
        f"no step in {directory} has the metric {metric!r} of an evaluation; name a step, or "
        "evaluate during training and set checkpoints.best_metric and checkpoints.keep_best"
    )


def _best_metric(config: Any) -> tuple[str, str]:
    """Metric and mode of a saved config, as of ``TrainConfig.retention``."""
    config = config if isinstance(config, dict) else {}
    settings, stopping = config.get("checkpoints") or {}, config.get("early_stopping") or {}
    stops = stopping.get("patience") is not None and stopping.get("metric") is not None
    if stops and not settings.get("keep_best"):
        return stopping["metric"], stopping["mode"]
    metric = settings.get("best_metric", "eval/loss")
    return metric, settings.get("best_mode") or mode_of(metric) or "min"


def _is_foreign(folder: epath.Path, step: int) -> bool:
    try:
        named = named_step(read_meta(folder))
    except UserError:  # raised again when it is read
        return False
    if named in (None, step):
        return False
    log.warning(
        "checkpoint %s is not used: it holds step %d, and folders are named by their step",
        folder,
        named,
    )
    return True


def _refuse_to_start_over(directory: epath.Path) -> None:
    """Raises UserError if there were checkpoints and all are set aside."""
    names = sorted(p.name for p in directory.iterdir()) if directory.exists() else []
    aside = [name for name in names if _SET_ASIDE.fullmatch(name)]
    if aside:
        raise UserError(
            f"no checkpoint in {directory} passes verification ({few(aside)} set aside): find the "
            "cause, then restore one from a copy, or move those folders away to start again"
        )


def find_step(path: epath.Path) -> SavedStep:
    """The step folder at `path`, its best if it ends in "best", or a run's newest verified one.

    Changes nothing. Raises UserError if there is none, or if the given step folder is damaged.
    """
    with reading_step(path):
        is_step, best = exists(path / "state"), best_of_folder(path)
    if best is not None:
        return choose_best(best)
    if is_step:
        wrong = problems(path)
        if wrong:
            raise UserError(f"checkpoint {path} is damaged ({few(wrong)}); use another step")
        if wrong is None:
            log.warning("checkpoint %s has no checksums: using it unverified", path)
        step = int(path.name) if _STEP.fullmatch(path.name) else -1
        return SavedStep(step, path, verified=wrong is not None)
    inner = path / "checkpoints"
    with reading_step(path):
        directory = inner if exists(inner) else path
    found = choose_newest(directory, set_aside_at_most=None)
    if found is None:
        raise UserError(
            f"there is no checkpoint in {path}; give a run's --workdir or one of its step folders"
        )
    return found


def few(names: Sequence[str], separator: str = ", ") -> str:
    """The first three names, and the number of the others."""
    rest = f"{separator}{len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + rest


def unlink(folder: epath.Path) -> None:
    """Removes a link, and not its target."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder)


def set_aside_step(directory: epath.Path, kind: str, step: int, reason: str, at_most: int) -> None:
    """Renames a step and logs the reason. Raises UserError if `at_most` others exist already."""
    folder = directory / str(step)
    present = {path.name for path in directory.iterdir()}
    before = sorted(name for name in present if _SET_ASIDE.fullmatch(name))
    if len(before) >= at_most:
        raise UserError(
            f"checkpoint {folder} {reason}, and no more may be set aside besides {few(before)}: "
            "find the cause, then move or delete those, or raise checkpoints.invalid_to_keep"
        )
    names = (f"{kind}-{step}-{n}" for n in itertools.count())
    target = next(name for name in names if name not in present)
    if is_bucket(directory):
        _move_objects(folder, directory / target)
    else:
        folder.rename(directory / target)
    log.warning("checkpoint %s %s: set aside as %s", folder, reason, target)


def _move_objects(source: epath.Path, target: epath.Path) -> None:
    """Copies and deletes objects, because a bucket has no folders to rename. The commit file is
    moved first, so that the source is no step any more."""
    commit = checksums.COMMIT_FILES[1]
    names = sorted(list_files(source), key=lambda name: name != commit)
    for name in names:
        (source / name).copy(target / name, overwrite=True)
        if name == commit:
            (source / name).unlink()
    source.rmtree()
