"""What is saved comes back bit for bit, or is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_transformers.checkpointing import step_directories
from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    Checkpoints,
    find_checkpoint,
    restore_params,
)
from flax_transformers.config_json import to_json
from flax_transformers.errors import UserError
from flax_transformers.ranges import OutOfRange
from flax_transformers.storage import checksums
from tests.checkpointing.checkpointing import (
    Tree,
    abstract_state,
    files_of,
    fingerprint,
    flip_bit,
    make_mesh,
    make_state,
    names_in,
    restore_newest,
    write_steps,
)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    abstract = abstract_state(make_mesh(1, 1, 1))
    state = make_state(abstract)
    meta = {"config": {"width": 16}, "position": 12345678901234, "metrics": {"eval/loss": 2.5}}
    (tmp_path / "tokenizer" / "extra").mkdir(parents=True)
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "tokenizer" / "extra" / "merges.txt").write_text("a b\n")
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    assert checkpoints.restore_newest(abstract) is None

    files = {"tokenizer": tmp_path / "tokenizer", "note.txt": b"hello"}
    assert checkpoints.save(7, state, meta, files)
    checkpoints.wait()
    restored = checkpoints.restore_newest(abstract)
    checkpoints.close()

    assert (restored.step, restored.meta) == (7, meta)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert fingerprint(restored.state) == fingerprint(state)
    assert (restored.folder / "tokenizer" / "vocab.txt").read_text() == "[PAD]\n"
    assert (restored.folder / "tokenizer" / "extra" / "merges.txt").read_text() == "a b\n"
    assert (restored.folder / "note.txt").read_text() == "hello"
    assert checksums.verify(epath.Path(restored.folder)) == []


@pytest.mark.slow
def test_the_random_key_of_an_optimizer_comes_back(tmp_path: Path) -> None:
    params = {"kernel": jnp.ones((2, 3))}
    state = {"params": params, "opt_state": optax.noisy_sgd(0.1, seed=7).init(params)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.save(1, state, {})
    checkpoints.close()
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore_newest(abstract)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, *map(_key_data, (restored.state, state)))


def _key_data(tree: Any) -> Any:
    def data(leaf: jax.Array) -> jax.Array:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(data, tree)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 1), (2, 1, 4)])
def test_a_checkpoint_restores_onto_any_mesh(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    state = make_state(abstract_state(make_mesh(2, 2, 2)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.close()

    abstract = abstract_state(make_mesh(*shape))
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore_newest(abstract)

    assert fingerprint(restored.state) == fingerprint(state)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.sharding == b.sharding, restored.state, abstract)
    )


def rename_kernel(abstract: Tree) -> None:
    abstract["params"]["encoder"]["weight"] = abstract["params"]["encoder"].pop("kernel")


def halve_dtype(abstract: Tree) -> None:
    bias = abstract["params"]["encoder"]["bias"]
    abstract["params"]["encoder"]["bias"] = bias.update(dtype=jnp.bfloat16)


def widen(abstract: Tree) -> None:
    abstract.update(abstract_state(make_mesh(1, 1, 1), width=32))


def use_sgd(abstract: Tree) -> None:
    abstract["opt_state"] = optax.sgd(1e-3).init(abstract["params"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rename_kernel, r"lacks params/encoder/weight; also has params/encoder/kernel"),
        (halve_dtype, r"has params/encoder/bias as float32\[3,32\], not bfloat16\[3,32\]"),
        (widen, r"params/encoder/kernel as float32\[3,16,32\], not float32\[3,32,32\]"),
        (use_sgd, r"also has opt_state/0/count; .*; 4 more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_any_array_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, named: str
) -> None:
    write_steps(tmp_path, 5, 7)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)}
    abstract = abstract_state(make_mesh(1, 1, 1))
    change(abstract)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match=named):
        Checkpoints(tmp_path, CheckpointConfig()).restore_newest(abstract)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)} == before


def test_the_caller_can_refuse_a_checkpoint_by_its_meta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, 7)

    def refuse(meta: dict[str, Any]) -> None:
        raise UserError(f"not this {meta['config']} one")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", lambda *_, **__: pytest.fail("read"))
    abstract = abstract_state(make_mesh(1, 1, 1))
    with pytest.raises(UserError, match="not this tiny one"):
        Checkpoints(tmp_path, CheckpointConfig()).restore_newest(abstract, check=refuse)


def test_parameters_are_read_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(abstract_state(make_mesh(2, 2, 2)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, state, {"config": "tiny"})
    checkpoints.close()
    asked: list[list[str]] = []
    restore = ocp.args.PyTreeRestore
    monkeypatch.setattr(
        ocp.args,
        "PyTreeRestore",
        lambda item, **kw: asked.append(list(item)) or restore(item, **kw),
    )

    abstract = abstract_state(make_mesh(1, 4, 2))["params"]
    placed = restore_params(tmp_path, abstract)
    on_host = restore_params(find_checkpoint(tmp_path / "3"))

    assert asked == [["params"], ["params"]]
    assert fingerprint(placed) == fingerprint(on_host) == fingerprint(state["params"])
    assert placed["encoder"]["kernel"].sharding == abstract["encoder"]["kernel"].sharding
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, 3)
    abstract = abstract_state(make_mesh(1, 1, 1), width=8)["params"]
    with pytest.raises(UserError, match=r"has params/encoder/kernel as float32\[3,16,32\]"):
        restore_params(tmp_path, abstract)


def test_a_checkpoint_is_found_from_the_run_its_checkpoints_or_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoints"
    write_steps(directory, 5, 7, 9)
    flip_bit(directory / "9" / "meta" / "metadata")
    assert find_checkpoint(tmp_path).step == find_checkpoint(directory).step == 7
    assert find_checkpoint(tmp_path).meta == {"config": "tiny", "position": 56}
    assert find_checkpoint(directory / "5").meta == {"config": "tiny", "position": 40}
    assert "9 is damaged (meta/metadata has changed): skipped" in caplog.text
    assert names_in(directory) == ["5", "7", "9"]
    with pytest.raises(UserError, match="9 is damaged"):
        find_checkpoint(directory / "9")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        find_checkpoint(tmp_path / "elsewhere")


def test_saving_a_step_twice_changes_nothing(tmp_path: Path) -> None:
    abstract = abstract_state(make_mesh(1, 1, 1))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    first, second = make_state(abstract, 1), make_state(abstract, 2)
    assert checkpoints.save(4, first, {})
    assert not checkpoints.save(4, second, {})
    checkpoints.close()
    assert not Checkpoints(tmp_path, CheckpointConfig()).save(4, second, {})
    again = Checkpoints(tmp_path, CheckpointConfig())
    assert fingerprint(again.restore_newest(abstract).state) == fingerprint(first)
    assert not again.save(4, second, {})


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_that_the_caller_is_handling_is_not_that_of_the_save(
    tmp_path: Path, asynchronous: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    try:
        raise KeyError("of a first attempt")
    except KeyError:
        assert checkpoints.save(1, {"a": jnp.ones(3)}, {})
        checkpoints.close()
    assert find_checkpoint(tmp_path).step == 1


@pytest.mark.slow
def test_the_latest_the_regular_and_the_best_steps_are_kept(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_latest=2, keep_every=40, keep_best=1, best_metric="loss")
    state = make_state(abstract_state(make_mesh(1, 1, 1)))
    losses = {10: float("nan"), 20: 1.0, 30: 4.0, 40: 4.0, 50: 5.0, 60: 3.0, 70: 2.0}
    for steps in ((10, 20, 30, 40), (50, 60, 70)):  # the second run learns of the best from disk
        checkpoints = Checkpoints(tmp_path, config)
        for step in steps:
            checkpoints.save(step, state, {"metrics": {"loss": losses[step]}})
        checkpoints.close()
    assert Checkpoints(tmp_path, config).steps() == [20, 40, 60, 70]


@pytest.mark.slow
def test_the_highest_accuracy_is_the_best_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    state = make_state(abstract_state(make_mesh(1, 1, 1)))
    accuracies = {10: 0.1, 20: 0.9, 30: 0.5}
    for mode, best in ((None, 20), ("min", 10)):
        config = CheckpointConfig(1, keep_best=1, best_metric="eval/accuracy", best_mode=mode)
        checkpoints = Checkpoints(tmp_path / str(mode), config)
        for step, accuracy in accuracies.items():
            meta = {"position": {"step": step}, "metrics": {"eval/accuracy": accuracy}}
            checkpoints.save(step, state, meta | {"config": {"checkpoints": to_json(config)}})
        checkpoints.close()
        assert find_checkpoint(tmp_path / str(mode) / "best").step == best


def test_a_metric_of_the_user_s_own_needs_a_mode() -> None:
    with pytest.raises(OutOfRange, match="is 'eval/mine', .*; set checkpoints.best_mode to min"):
        CheckpointConfig(best_metric="eval/mine")
    assert CheckpointConfig(best_metric="eval/mine", best_mode="max").mode == "max"


def test_meta_that_is_set_later_keeps_a_step_intact_at_each_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, state = CheckpointConfig(keep_best=1), make_state(abstract_state(make_mesh(1, 1, 1)))
    saved = write_steps(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path, config)
    inode = (tmp_path / "5" / "state" / "_METADATA").stat().st_ino
    changes = {"metrics": {"eval/loss": 1.0}}
    with monkeypatch.context() as patched:
        patched.setattr(checksums, "seal", Mock(side_effect=KeyboardInterrupt))  # as if killed
        with pytest.raises(KeyboardInterrupt):
            checkpoints.update_meta(5, changes)
    restored = restore_newest(tmp_path)
    assert (fingerprint(restored.state), restored.meta["metrics"]) == (saved[5], changes["metrics"])
    checkpoints.update_meta(5, changes)
    assert checksums.verify(epath.Path(tmp_path / "5")) == []
    assert (tmp_path / "5" / "state" / "_METADATA").stat().st_ino == inode
    for step in (6, 7, 8, 9):  # it is the best from then on
        checkpoints.save(step, state, {"metrics": {"eval/loss": 2.0}})
    checkpoints.close()
    assert checkpoints.steps() == [5, 7, 8, 9]
    flip_bit(tmp_path / "5" / "meta_update.json")
    assert checksums.verify(epath.Path(tmp_path / "5")) == ["meta_update.json has changed"]


def test_what_a_killed_write_left_behind_is_removed_by_the_next_save(tmp_path: Path) -> None:
    saved = write_steps(tmp_path, 5)
    stale = tmp_path / "6.orbax-checkpoint-tmp" / "state"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"half")
    assert fingerprint(restore_newest(tmp_path).state) == saved[5]
    write_steps(tmp_path, 7)
    assert names_in(tmp_path) == ["5", "7"]


def test_training_goes_on_while_a_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proceed = threading.Event()
    write_index = checksums.write_checksum_index
    monkeypatch.setattr(
        checksums, "write_checksum_index", lambda f: proceed.wait(20) and write_index(f)
    )
    state = make_state(abstract_state(make_mesh(1, 1, 1)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.save(1, state, {})
    assert not checkpoints.save(1, state, {})
    assert checkpoints.steps() == []
    proceed.set()
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_a_synchronous_save_is_finished_when_it_returns(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    checkpoints.save(1, make_state(abstract_state(make_mesh(1, 1, 1))), {})
    assert checksums.verify(epath.Path(tmp_path / "1")) == []
    checkpoints.close()


@pytest.mark.slow
def test_donating_the_state_right_after_a_save_does_not_change_what_is_saved(
    tmp_path: Path,
) -> None:
    sharding = NamedSharding(make_mesh(1, 8, 1), P("fsdp"))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.device_put({"params": {str(i): np.zeros((512, 512)) for i in range(4)}}, sharding)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_latest=5))
    for step in range(1, 41):
        state = advance(state)
        if step % 8 == 0:
            checkpoints.save(step, state, {})
    checkpoints.close()
    assert checkpoints.steps() == [8, 16, 24, 32, 40]
    for step in checkpoints.steps():
        params = restore_params(tmp_path / str(step), abstract["params"])
        assert {float(v) for leaf in params.values() for v in np.unique(leaf)} == {step}


def test_a_write_beyond_the_limit_is_one_sentence_and_leaves_earlier_steps_intact(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    abstract = abstract_state(make_mesh(1, 1, 1), width=4096)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    states = {step: make_state(abstract, step) for step in (1, 2, 3)}
    checkpoints.save(1, states[1], {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        checkpoints.save(2, states[2], {})
        with pytest.raises(UserError, match=rf"written to {tmp_path} .File too large.*intact"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["1"]
    assert "Traceback" not in capfd.readouterr().err + caplog.text

    checkpoints.save(3, states[3], {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert (
        checksums.verify(epath.Path(tmp_path / "1"))
        == checksums.verify(epath.Path(tmp_path / "3"))
        == []
    )


def test_a_folder_that_a_failed_write_makes_anew_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = epath.Path(tmp_path / "2.orbax-checkpoint-tmp")
    late_writes = iter([folder])

    def write_late(seconds: float) -> None:
        for late in late_writes:
            (late / "state").mkdir(parents=True)

    monkeypatch.setattr(step_directories.time, "sleep", write_late)
    (folder / "meta").mkdir(parents=True)
    step_directories.remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize("surfaces_in", ["save", "wait", "close", "reached_preemption"])
def test_a_full_disk_in_the_background_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surfaces_in: str
) -> None:
    def fail(folder: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    state = make_state(abstract_state(make_mesh(1, 1, 1)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    monkeypatch.setattr(checksums, "write_checksum_index", fail)
    checkpoints.save(2, state, {})
    checkpoints._watcher.join()
    calls = {
        "save": lambda: checkpoints.save(3, state, {}),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "reached_preemption": lambda: checkpoints.reached_preemption(3),
    }
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        calls[surfaces_in]()
    checkpoints.close()
    assert names_in(tmp_path) == ["1"]


def test_an_error_that_is_not_the_disk_s_keeps_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "write_checksum_index", lambda folder: 1 // 0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, make_state(abstract_state(make_mesh(1, 1, 1))), {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()
    assert names_in(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written to .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig())

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(step_directories.absolute(tmp_path)), "write_text", read_only)
    with pytest.raises(UserError, match=r"Read-only file system.*--workdir"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_a_relative_directory_means_the_one_it_was_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints", CheckpointConfig())
    monkeypatch.chdir("/")
    checkpoints.save(1, make_state(abstract_state(make_mesh(1, 1, 1))), {})
    checkpoints.close()
    assert checksums.verify(epath.Path(tmp_path / "run" / "checkpoints" / "1")) == []


@pytest.mark.parametrize(
    "wrong", [{"keep_latest": 0}, {"every_steps": -1}, {"keep_best": -1}, {"keep_every": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"checkpoints.{next(iter(wrong))}"):
        CheckpointConfig(**wrong)


KILLED_WHILE_SAVING = """
import json, os, signal, sys
import jax, jax.numpy as jnp
from flax_transformers.storage import checksums
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints

directory, where = sys.argv[1:]
state = {"params": {str(i): jnp.full((64, 64), i, jnp.float32) for i in range(3)}}
checkpoints = Checkpoints(directory, CheckpointConfig())
checkpoints.save(1, state, {})
checkpoints.wait()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

write_index, seal = checksums.write_checksum_index, checksums.seal
if where == "before the checksums":
    checksums.write_checksum_index = lambda folder: die()
elif where == "before the commit":
    checksums.write_checksum_index = lambda folder: (write_index(folder), die())
elif where == "after the commit":
    checksums.seal = lambda folder: die()
checkpoints.save(2, jax.tree.map(lambda x: x + 10, state), {})
checkpoints.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "newest"),
    [("before the checksums", 1), ("before the commit", 1), ("after the commit", 2)],
)
def test_after_a_kill_in_the_middle_of_a_save_the_newest_committed_step_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, newest: int
) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), where]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    abstract = {"params": {str(i): jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(3)}}
    placed = jax.tree.map(
        lambda leaf: leaf.update(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        abstract,
    )
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(tmp_path, CheckpointConfig()).restore_newest(placed)
    assert restored.step == newest
    assert caplog.text == ""
    values = [float(np.unique(leaf).item()) for leaf in restored.state["params"].values()]
    assert values == [10 * (newest - 1) + i for i in range(3)]


def test_digests_are_json_that_people_can_read(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    files = json.loads((tmp_path / "1" / "DIGESTS.json").read_text())["files"]
    assert sorted([*files, "DIGESTS.json"]) == files_of(tmp_path / "1")
    raw = (tmp_path / "1" / "tokenizer" / "vocab.txt").read_bytes()
    assert files["tokenizer/vocab.txt"] == [len(raw), hashlib.sha256(raw).hexdigest()]
