"""Two processes save, check and restore one checkpoint together."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROCESS = """
import hashlib, json, logging, pathlib, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
directory, process, processes, port, action, *to_damage = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4 // int(processes))
if processes != "1":
    patience = 10 if action == "fail" else 20
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout_seconds=patience
    )
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from flax_transformers.errors import UserError
from flax_transformers.parallel.distributed import leave_if_not_alone
from flax_transformers.storage import checksums
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints, restore_params

logging.basicConfig(level=logging.WARNING)
devices = np.array(jax.devices()).reshape(2, 2)
mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
specs = {"kernel": P("fsdp", None), "wide": P(None, ("data", "fsdp")), "bias": P()}
shapes = {"kernel": (64, 32), "wide": (8, 512), "bias": (128,)}

def values(step):
    return {name: np.random.default_rng([step, i]).standard_normal(shape).astype(np.float32)
            for i, (name, shape) in enumerate(shapes.items())}

shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
abstract = {"params": {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=shardings[name])
                       for name, shape in shapes.items()}}
hashed, hash_file = [], checksums._hash_file
checksums._hash_file = lambda path: hashed.append(str(path)) or hash_file(path)

def place(tree):
    return {name: jax.make_array_from_callback(
                raw.shape, shardings[name], lambda index, raw=raw: raw[index])
            for name, raw in tree.items()}

def digest(params):
    whole = hashlib.sha256()
    for name in sorted(params):
        whole.update(multihost_utils.process_allgather(params[name], tiled=True).tobytes())
    return whole.hexdigest()

def damage(name):
    if process == "0":
        path = pathlib.Path(directory, name)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    multihost_utils.sync_global_devices("damaged " + name)

def newest(checkpoints):
    restored = checkpoints.restore_newest(abstract)
    params = restore_params(directory, abstract["params"])
    assert digest(params) == digest(restored.state["params"])
    return {"digest": digest(params), "step": restored.step, "meta": restored.meta,
            "right": digest(place(values(restored.step))) == digest(params)}

def main():
    try:
        checkpoints = Checkpoints(directory, CheckpointConfig(invalid_to_keep=1))
        if action == "save":
            for step in (1, 2, 3):
                params = place(values(step))
                checkpoints.save(step, {"params": params}, {"step": step}, {"note": b"same"})
                assert not checkpoints.save(step, {"params": params}, {"step": step})
            checkpoints.close()
            return {"digest": digest(params), "hashed": hashed,
                    "preempted": checkpoints.reached_preemption(3)}
        if action == "fail":
            if process == "1":
                def refuse(folder):
                    raise OSError(28, "No space left on device")
                checksums.write_part = refuse
            checkpoints.save(1, {"params": place(values(1))}, {"step": 1})
            checkpoints.wait()
        found = newest(checkpoints)
        for name in to_damage:
            damage(name)
            try:
                found["after " + name] = newest(checkpoints)
            except UserError as error:
                found["after " + name] = str(error)
        return found
    except UserError as error:
        return {"error": str(error)}

print("RESULT " + json.dumps(main()), flush=True)
if action == "fail":
    leave_if_not_alone(2)
"""


def start(
    directory: Path, processes: int, action: str, *to_damage: str
) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rest = [str(processes), str(port), action, *to_damage]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, directory, str(i), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def run(directory: Path, processes: int, action: str, *to_damage: str) -> list[dict[str, Any]]:
    """Runs the same action in so many processes; what each returned."""
    started = start(directory, processes, action, *to_damage)
    try:
        results = []
        for process in started:
            out, err = process.communicate(timeout=120)
            line = next((line for line in out.splitlines() if line.startswith("RESULT ")), None)
            assert line is not None, err
            results.append(json.loads(line.removeprefix("RESULT ")) | {"stderr": err})
        return results
    finally:
        for process in started:
            process.kill()


@pytest.mark.multi_process
@pytest.mark.slow
def test_two_processes_save_and_restore_together_and_agree_on_the_step(tmp_path: Path) -> None:
    saved = run(tmp_path, 2, "save")
    assert saved[0]["digest"] == saved[1]["digest"]
    assert [result["preempted"] for result in saved] == [False, False]

    # Every file of the arrays is covered, those of the second process included, and no part stays.
    covered = json.loads((tmp_path / "3" / "DIGESTS.json").read_text())["files"]
    on_disk = {
        str(p.relative_to(tmp_path / "3")) for p in (tmp_path / "3").rglob("*") if p.is_file()
    }
    assert covered.keys() | {"DIGESTS.json"} == on_disk
    own = [name for name in covered if name.startswith("state/ocdbt.process_1/d/")]
    assert own
    hashed = [[name for name in r["hashed"] if "ocdbt.process_1" in name] for r in saved]
    assert hashed[0] == []
    assert len(hashed[1]) >= len(own)

    (result,) = run(tmp_path, 1, "restore")
    assert (result["step"], result["meta"]) == (3, {"step": 3})
    assert result["digest"] == saved[0]["digest"]

    # Two restore what is whole, then the step before, then find none.
    arrays, meta = f"3/{own[0]}", "2/meta/metadata"
    results = run(tmp_path, 2, "restore", arrays, meta)
    assert [(result["step"], result["right"]) for result in results] == [(3, True), (3, True)]
    before = [result[f"after {arrays}"] for result in results]
    assert [(found["step"], found["right"]) for found in before] == [(2, True), (2, True)]
    assert f"{own[0]} has changed): set aside as invalid-3-0" in results[0]["stderr"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "invalid-3-0"]
    assert all("2 is damaged (meta/metadata has changed)" in r[f"after {meta}"] for r in results)


@pytest.mark.multi_process
@pytest.mark.slow
def test_a_process_that_cannot_write_says_so_and_the_others_do_not_wait_for_it(
    tmp_path: Path,
) -> None:
    started = start(tmp_path, 2, "fail")
    try:
        out, err = started[1].communicate(timeout=60)
        assert "could not be written" in out and "No space left on device" in out, err
        assert started[1].returncode == 2
        assert started[0].wait(timeout=60) not in (0, 2)
    finally:
        for process in started:
            process.kill()
