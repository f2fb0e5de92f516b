"""Checkpoints: written in the background, verified before they are read, restored onto any mesh.

A step folder `checkpoints/<step>/` has `state/` (arrays), `meta/` (JSON), further small files of
the run (its tokenizers) and `DIGESTS.json` (see `storage.checksums`). A step is committed by one
rename, checksums included. A folder that fails its verification is renamed `invalid-<step>-<n>`,
never deleted. Only this file uses orbax, except for its barrier.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from flax_transformers.checkpointing import step_directories
from flax_transformers.checkpointing.compatibility import (
    as_saved,
    from_saved,
    is_array,
    require_same_structure,
    without_missing,
    without_unwanted,
)
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.retention import Retention
from flax_transformers.checkpointing.step_directories import Files, SavedStep
from flax_transformers.errors import UserError
from flax_transformers.optim.selection import joined, leaves_named_in
from flax_transformers.parallel.distributed import PATIENCE_SECONDS, wait_for_all
from flax_transformers.storage import checksums
from flax_transformers.storage.paths import is_bucket
from flax_transformers.storage.workdir import writing
from flax_transformers.storage.write_errors import (
    raise_read_error,
    raise_write_error,
    report_failed_writes_once,
)

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 8192
_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclass(frozen=True)
class RestoredState:
    """What `Checkpoints.restore_newest` found."""

    step: int
    state: Any
    meta: dict[str, Any]
    folder: epath.Path


class Checkpoints:
    """The checkpoints of one run. Every process creates one and makes the same calls.

    Raises UserError if `directory` cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig) -> None:
        self.directory = step_directories.absolute(directory)
        self.config = config
        self._manager: ocp.CheckpointManager | None = None
        self._watcher: threading.Thread | None = None
        self._failure: Exception | None = None
        self._last_step: int | None = None  # being written, or written last
        self._files: Files = {}
        self._handled: BaseException | None = None  # by the caller, while it saves
        self._retention = self._new_retention()
        report_failed_writes_once()
        _on_process_zero(lambda: step_directories.require_writable(self.directory))

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        files: Files | None = None,
    ) -> bool:
        """Starts writing `step`; False if that step exists already or is being written.

        Returns when the arrays are copied to the host, so that `state` may be donated to the next
        step. Waits for the write before it to end. `meta` must be JSON;
        `meta["metrics"][best_metric]` decides which steps are best, and a step with
        `meta["consecutive_skips"]` is kept only while it is the newest. `files` maps a name in the
        step folder to its bytes, or to a local file or folder to copy. Raises UserError if an
        earlier write failed because of missing space or permissions.
        """
        self._handled = sys.exception()
        self._raise_failure()
        if step == self._last_step:
            return False
        self.wait()
        manager = self._open_manager()
        if step in manager.all_steps():
            if step not in self._retention.foreign:
                return False
            self._close_manager()
            self._set_aside(step, "is not of this run", kind="foreign")
            self._retention = self._new_retention()
            manager = self._open_manager()
        self._files, self._last_step = dict(files or {}), step
        self._note(step, meta)
        # As it will be read back; a value that is not JSON fails here, not in the background.
        plain = json.loads(json.dumps(meta))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(as_saved(state)), meta=ocp.args.JsonSave(plain)
        )
        try:
            # This copy from the device is intended; the loop's guard is for others.
            with jax.transfer_guard("allow"):
                manager.save(step, args=items, force=True)
        except Exception as error:
            self._last_step = self._manager = None
            raise_write_error(error, self.directory)
        self._watcher = threading.Thread(
            target=self._watch, args=(manager, step), name="checkpoint"
        )
        self._watcher.start()
        if not self.config.asynchronous:
            self.wait()
        return True

    def restore_newest(
        self,
        abstract_state: Any,
        check: Callable[[dict[str, Any]], None] | None = None,
        refuse: Callable[[Any, dict[str, Any]], str | None] | None = None,
    ) -> RestoredState | None:
        """The newest step that passes its verification, sharded as `abstract_state`; None if none.

        `abstract_state`: a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh. Newer
        steps that fail are set aside and named in a warning. A step without checksums is used only
        if no step passes. Before arrays are read, `check` is called with the step's meta, and
        raises to refuse it. `refuse` is called with state and meta, and returns the reason not to
        use them (a phrase after "step 5"), or None; then older steps are tried, and the refused
        ones are set aside once one is found. A missing optional field of a dataclass is None, and
        is named in the log. Raises UserError if arrays are missing, unexpected, or of another shape
        or dtype, if all steps are refused, and if too many steps have been set aside.
        """
        self.wait()
        self._close_manager()
        self._retention = self._new_retention()
        refused: dict[int, str] = {}
        while True:
            found = self._choose(min(refused, default=None))
            if found is None and refused:
                raise _all_refused(self.directory, refused)
            if found is None:
                return None
            meta = found.meta
            if check is not None:
                check(meta)
            state = _read_state(found, abstract_state)
            reason = None if refuse is None else refuse(state, meta)
            if reason is None:
                break
            refused[found.step] = reason
            del state  # before the next is read: two may not fit into the memory of the devices
        for step, reason in refused.items():
            self._set_aside(step, reason)
        self._last_step = found.step
        return RestoredState(found.step, state, meta, found.folder)

    def _choose(self, before: int | None) -> SavedStep | None:
        """The newest step older than `before` that passes its verification."""
        limit = self.config.invalid_to_keep
        choice = _on_process_zero(
            lambda: _as_json(step_directories.choose_newest(self.directory, limit, before))
        )
        return None if choice is None else _found(choice)

    def _set_aside(self, step: int, reason: str, kind: str = "unused") -> None:
        limit = self.config.invalid_to_keep
        _on_process_zero(
            lambda: step_directories.set_aside_step(self.directory, kind, step, reason, limit)
        )

    def update_meta(self, step: int, changes: dict[str, Any]) -> None:
        """Sets fields of the JSON saved with `step`, whose arrays are not written again; not if it
        is a link to a step of another run. Raises UserError if that cannot be written."""
        self.wait()
        folder = self.directory / str(step)

        def update() -> None:
            with writing(folder):
                step_directories.update_meta(folder, changes)

        if not step_directories.is_link(folder):
            _on_process_zero(update)
            self._note(step, self.read_meta(step))

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with `step`."""
        return step_directories.read_meta(self.directory / str(step))

    def steps(self) -> list[int]:
        """The finished steps on disk, oldest first, verified or not."""
        return step_directories.finished_steps(self.directory)

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes should stop after `step`, because one received SIGTERM.

        Every process must call it at every step. It is always False without
        `jax.distributed.initialize`. Raises like `save` if an earlier write failed.
        """
        self._raise_failure()
        return bool(ocp.multihost.reached_preemption(step))

    def wait(self) -> None:
        """Returns when all writes have ended. Raises like `save`."""
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        self._raise_failure()

    def close(self) -> None:
        """Waits for the writes to end and releases all resources. Raises like `save`."""
        try:
            self.wait()
        finally:
            self._close_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for step in self.steps():
                self._note_saved(step)
            in_place = is_bucket(self.directory)
            mode = ocp.options.AtomicityMode
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    save_root_metadata=False,
                    cleanup_tmp_directories=True,
                    # Read no file of the older steps, any of which may be damaged, ...
                    lightweight_initialize=True,
                    # ... and let no process see an outdated listing on a shared file system.
                    single_host_load_and_broadcast=True,
                    preservation_policy=self._retention,
                    atomicity_options=ocp.options.AtomicityOptions(
                        mode=mode.COMMIT_FILE if in_place else mode.ATOMIC_RENAME
                    ),
                    async_options=ocp.options.AsyncOptions(
                        timeout_secs=PATIENCE_SECONDS,
                        barrier_sync_fn=self._barrier,
                        post_finalization_callback=self._before_commit,
                    ),
                ),
            )
        return self._manager

    def _close_manager(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _new_retention(self) -> Retention:
        config = self.config
        return Retention(config.keep_latest, config.keep_every, config.keep_best, config.mode)

    def _note(self, step: int, meta: dict[str, Any]) -> None:
        """Registers a step of this run with the retention."""
        self._retention.scores[step] = step_directories.score_of(meta, self.config.best_metric)
        if meta.get("consecutive_skips"):
            self._retention.unproven.add(step)

    def _note_saved(self, step: int) -> None:
        """As `_note` for a step on disk, which may be damaged or of another run."""
        folder = self.directory / str(step)
        if step_directories.is_link(folder):
            self._retention.links.add(step)
        try:
            meta = step_directories.read_meta(folder)
        except UserError:
            return
        if step_directories.named_step(meta) not in (None, step):
            self._retention.foreign.add(step)
        else:
            self._note(step, meta)

    def _unlink_old(self) -> None:
        """Removes links to steps that are not kept; the steps themselves stay."""
        steps = self.steps()
        for step in self._retention.links & (set(steps) - self._retention.kept(steps)):
            step_directories.unlink(self.directory / str(step))
            self._retention.links.discard(step)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier; before a process reports that its arrays are written, it hashes them.

        Orbax also calls it after a write that failed. The other processes then wait at another
        barrier, so that the failure is raised here.
        """
        failure = sys.exception()
        if failure is not None and failure is not self._handled:
            raise failure
        if "async_write_complete" in key and jax.process_index() != 0:
            for item in self._being_written().iterdir():
                own = item / f"ocdbt.process_{jax.process_index()}"
                if own.exists():
                    checksums.write_part(own)
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _before_commit(self) -> None:
        """On process 0, when all processes have written and before the step gets its name.

        (Orbax calls this hook "post finalization"; the rename comes after it.)
        """
        folder = self._being_written()
        step_directories.write_files(folder, self._files)
        checksums.write_checksum_index(folder)

    def _being_written(self) -> epath.Path:
        """The folder in which orbax writes a step: with another name, except in a bucket."""
        assert self._last_step is not None
        unfinished = self._unfinished(self._last_step)
        return unfinished if unfinished.exists() else self.directory / str(self._last_step)

    def _unfinished(self, step: int) -> epath.Path:
        return self.directory / f"{step}{_UNFINISHED}"

    def _watch(self, manager: ocp.CheckpointManager, step: int) -> None:
        """Waits for one write to end, in a separate thread."""
        try:
            manager.wait_until_finished()
        except Exception as error:
            # This manager would raise the error again; the next save creates a new one.
            self._failure, self._last_step, self._manager = error, None, None
            if jax.process_count() == 1:
                step_directories.remove(self._unfinished(step))  # frees the space on a full disk
            return
        folder = self.directory / str(step)
        if jax.process_index() == 0 and checksums.has_index(folder):
            try:
                checksums.seal(folder)
            except (OSError, ValueError) as error:
                log.warning("checkpoint %s could not be sealed (%s)", folder, error)
            self._unlink_old()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise_write_error(error, self.directory)


def find_checkpoint(path: str | os.PathLike[str]) -> SavedStep:
    """The step folder of `path`, which is one itself, or has the folders of a run.

    "RUN/checkpoints/best" is the step with the best ``checkpoints.best_metric``, or the best metric
    of early stopping if ``checkpoints.keep_best`` is 0, among those that were evaluated when they
    were saved. Of a run, it is the newest step that passes its verification; damaged steps are
    skipped with a warning and not renamed. Every process must call it. Raises UserError if there is
    no step, or if the given step folder is damaged.
    """
    root = step_directories.absolute(path)
    return _found(_on_process_zero(lambda: _as_json(step_directories.find_step(root))))


def restore_params(
    source: str | os.PathLike[str] | SavedStep,
    abstract_params: Any | None = None,
    *,
    averaged: bool = True,
) -> Any:
    """The parameters and running statistics of the model, in one tree, or their average if the run
    kept one and `averaged` is True.

    `abstract_params`: `jax.ShapeDtypeStruct` with shardings, checked as in
    `Checkpoints.restore_newest`. Without it, the result is a nested dict of numpy arrays as they
    were saved. Optimizer statistics are not read.
    """
    found = source if isinstance(source, SavedStep) else find_checkpoint(source)
    names = ("ema", "params") if averaged else ("params",)
    return _read_params(found, names, abstract_params)


def restore_arrays(source: str | os.PathLike[str] | SavedStep) -> Any:
    """The whole state of a checkpoint as numpy arrays: parameters, optimizer statistics, random
    key and counters."""
    found = source if isinstance(source, SavedStep) else find_checkpoint(source)
    with _readable(found) as folder:
        item, how = _as_numpy(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
        return _read_arrays(folder, item, how, partial=False)


class _Manager(ocp.CheckpointManager):
    """Disables orbax's own handling of preemption, which computes the time since the last save,
    and fails if that was made by another process."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _all_refused(directory: epath.Path, refused: dict[int, str]) -> UserError:
    which = step_directories.few([f"step {step} {reason}" for step, reason in refused.items()])
    return UserError(
        f"no checkpoint in {directory} can be used: {which}, and there is none before; start again "
        "in another --workdir, with a lower optimizer.learning_rate or a longer warm-up"
    )


def _read_state(found: SavedStep, abstract: Any) -> Any:
    """`abstract` with the arrays of `found`; None for an optional field that it lacks. Optional
    fields that are None in `abstract` are not read."""
    with _readable(found) as folder:
        saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        abstract, missing = without_missing(saved, abstract)
        if missing:
            log.info("checkpoint %s has no %s: initialized", found.folder, ", no ".join(missing))
        saved, unwanted = without_unwanted(saved, abstract)
        if unwanted:
            names = ", ".join(unwanted)
            log.info("checkpoint %s: %s is kept no longer and not read", found.folder, names)
        wanted, left_out = as_saved(abstract), {*missing, *unwanted}
        require_same_structure(found.folder, saved, wanted)
        # Orbax accepts no tree with a field, even of None, that the checkpoint does not name.
        left_out |= wanted.keys() - saved.keys()
        if left_out:
            wanted = {name: part for name, part in wanted.items() if name not in left_out}
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        state = _read_arrays(folder, wanted, how, partial=bool(left_out))
        return from_saved(abstract, state)


def _read_params(found: SavedStep, names: Sequence[str], abstract: Any | None) -> Any:
    """The first of `names` that `found` has, sharded as `abstract`, or as numpy arrays; parameters
    are read together with the running statistics beside them."""
    with _readable(found) as folder:
        saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        name = next((n for n in names if jax.tree.leaves(saved.get(n), is_leaf=is_array)), "params")
        params, statistics = saved.get(name, {}), None
        if name == "params" and jax.tree.leaves(saved.get("model_state"), is_leaf=is_array):
            statistics = saved["model_state"]
        if abstract is None:
            wanted, how = _as_numpy(joined(params, statistics))
        else:
            # The message says "params" also if the average is read.
            there = {"params": joined(params, statistics)}
            require_same_structure(found.folder, there, {"params": abstract})
            wanted, how = abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
        if statistics is None:
            return _read_arrays(folder, {name: wanted}, {name: how}, partial=True)[name]
        parts = {"params": params, "model_state": statistics}
        items, hows = (
            {each: leaves_named_in(part, tree) for each, part in parts.items()}
            for tree in (wanted, how)
        )
        return joined(**_read_arrays(folder, items, hows, partial=True))


def _as_numpy(saved: Any) -> tuple[Any, Any]:
    """Item and restore arguments for arrays as they were saved."""
    item = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), saved, is_leaf=is_array)
    return item, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)


def _read_arrays(folder: epath.Path, item: Any, how: Any, *, partial: bool) -> Any:
    with jax.transfer_guard("allow"), ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=partial)
        return checkpointer.restore(folder, args=args)


@contextlib.contextmanager
def _readable(found: SavedStep) -> Iterator[epath.Path]:
    """The folder of the arrays; an error in the body becomes a UserError about the step."""
    try:
        yield found.folder / "state"
    except UserError:
        raise
    except Exception as error:
        if found.verified:
            raise_read_error(error, found.folder)
        raise UserError(
            f"checkpoint {found.folder} has no checksums and cannot be read "
            f"({str(error).splitlines()[0]}); move it away to continue without it"
        ) from error


def _as_json(found: SavedStep | None) -> list[Any] | None:
    return None if found is None else [found.step, os.fspath(found.folder), found.verified]


def _found(fields: list[Any]) -> SavedStep:
    return SavedStep(fields[0], epath.Path(fields[1]), fields[2])


def _on_process_zero(action: Callable[[], Any]) -> Any:
    """Runs `action` on process 0; every process gets its result (JSON), or its UserError."""
    if jax.process_count() == 1:
        return action()
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if jax.process_index() == 0:
        try:
            answer = {"result": action()}
        except UserError as error:
            answer = {"error": str(error)[: _MESSAGE_BYTES // 8]}
        raw = json.dumps(answer).encode()
        message[: len(raw)] = np.frombuffer(raw, np.uint8)
    wait_for_all()  # as hashing may take longer than collectives wait
    answer = json.loads(multihost_utils.broadcast_one_to_all(message).tobytes().rstrip(b"\0"))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]
