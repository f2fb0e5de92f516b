"""Start-up of several processes, and their end when one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import traceback
import urllib.request
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.watchdog import RESTART, watchdog

PREEMPTED = 42
"""Exit code after a requested stop: the state is saved; restart to resume."""
PEER_LOST = RESTART
"""Exit code of a process whose peer was lost, or that hung: restart all processes."""
HEARTBEAT_VARIABLE = "FLAX_TRANSFORMERS_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 10
"""A process without a heartbeat for this time counts as lost, and the others abort."""
SLOW_START_SECONDS = 20.0
PATIENCE_SECONDS = 7 * 24 * 3600
"""Time limit of barriers and of JAX's start-up and shut-down: the watchdog has its own limits."""
_MAX_PROCESSES = 2**20
_PORTS = ranges.integers(1, 65_535)
_barriers = itertools.count()

_FOLDER = "flax_transformers"
_ESTABLISHED = "01"  # in /proc/net/tcp

_TPU_METADATA = "computeMetadata/v1/instance/attributes"
_METADATA_SECONDS = 10.0

_LOST = re.compile("Gloo|NCCL|coordination service|Connection (reset|closed) by peer")


def start_processes(limits: Limits | None = None, platform: str | None = None) -> None:
    """Connect this process to the others of the job, if there are any. Call before using arrays.

    Also starts the watchdog: the job ends with code 75 if not all processes have joined within
    ``limits.start_s``.

    A job is defined by ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    or detected by JAX (SLURM, Open MPI 4, TPU slices; then the address can be set alone); under
    Open MPI 5 the address must be set. On GPUs, a process uses those of `_local_device_ids`. The
    hosts of a TPU VM slice are not connected if ``platform`` or ``JAX_PLATFORMS`` is another one. A
    single process is not connected, and a second call has no effect.
    ``FLAX_TRANSFORMERS_HEARTBEAT_SECONDS`` replaces the 10 seconds after which a process without
    heartbeat counts as lost. Raises UserError if only some of the three variables are set.
    """
    if jax.distributed.is_initialized():
        return
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    remedy = "set all three or none"
    if _by_open_mpi_5() and not any(map(os.environ.get, names[1:])):
        names[1:] = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
        remedy = f"name the host of process 0 and a free port: mpirun -x {names[0]}=HOST:PORT"
    given = [name for name in names if os.environ.get(name)]
    if len(given) == len(names):
        address = os.environ[names[0]]
        count, index = (ranges.parse_integer(os.environ[name]) for name in names[1:])
        if count is None or index is None or not 0 <= index < count <= _MAX_PROCESSES:
            raise UserError(
                f"{names[2]} {os.environ[names[2]]} of {names[1]} {os.environ[names[1]]} is not "
                f"valid; number the processes from 0 to {names[1]} - 1"
            )
        host, _, port = address.rpartition(":")
        if not host or not _PORTS.admits(ranges.parse_integer(port)):
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is {address!r}; give the host of process 0 and a free "
                "port, such as 10.0.0.1:1234"
            )
        _initialize(address, count, index, limits or Limits())
    elif given and not (given == [names[0]] and _launched_with_others(platform)):
        missing = ", ".join(name for name in names if name not in given)
        raise UserError(f"{', '.join(given)} set but not {missing}; {remedy}")
    elif _launched_with_others(platform):
        _initialize(None, None, None, limits or Limits())


def _initialize(address: str | None, count: int | None, index: int | None, limits: Limits) -> None:
    heartbeat = ranges.from_environment(
        HEARTBEAT_VARIABLE, ranges.integers(1, 86_400), HEARTBEAT_SECONDS
    )
    # JAX would wait silently, and then abort without naming the process.
    others = f"the {count} processes of this job at {address}" if address else "the other processes"
    waiting = f"flax-transformers: still waiting for {others}"
    patience = threading.Timer(SLOW_START_SECONDS, print, [waiting], {"file": sys.stderr})
    patience.daemon = True
    patience.start()
    watchdog.start(limits, watchdog.dump_seconds)
    if index is not None:
        watchdog.name = f"process {index} of {count}"
    watchdog.ignore_signals()  # JAX installs its own handler
    try:
        with watchdog.phase("start", lambda: _who_joined(address, count, index)):
            jax.distributed.initialize(
                address,
                count,
                index,
                local_device_ids=_local_device_ids(),
                heartbeat_timeout_seconds=int(heartbeat),
                initialization_timeout=PATIENCE_SECONDS,
                shutdown_timeout_seconds=PATIENCE_SECONDS,
            )
    finally:
        patience.cancel()
        watchdog.listen()
    watchdog.join(_KeyValueStore())
    sys.excepthook = _exit_at_once
    # Called in reverse order, and before JAX's own exit function, which first closes connections.
    atexit.register(watchdog.leave)
    atexit.register(jax.distributed.shutdown)


def _local_device_ids() -> list[int] | None:
    """[] for all GPUs that this process sees: the only one of its node, or with GPUs of its own.

    Otherwise the GPU of its number on the node for a process of Open MPI 5, and None for JAX's
    choice: `JAX_LOCAL_DEVICE_IDS`, or for a task of SLURM or Open MPI 4 the GPU of its number.
    """
    seen, of_node = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_GPUS_ON_NODE", "")
    has_own = seen and len(seen.split(",")) < max(ranges.parse_integer(of_node) or 0, 2)
    tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{part}") for part in ("TASKS", "NODES"))
    is_alone = tasks is not None and tasks == nodes
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:  # SLURM's tasks are Open MPI's daemons
        is_alone = os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    if os.environ.get("JAX_LOCAL_DEVICE_IDS") or not (has_own or is_alone or _by_open_mpi_5()):
        return None
    return [] if has_own or is_alone else [int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])]


class _KeyValueStore:
    """JAX's key-value store, which process 0 holds, with the interface of `Peers`."""

    def __init__(self) -> None:
        state = jax_distributed.global_state
        self.index, self.count = state.process_id, state.num_processes
        self._client: Any = state.client

    def put(self, folder: str, value: str) -> None:
        self._client.key_value_set(f"{_FOLDER}/{folder}/{self.index}", value, allow_overwrite=True)

    def values(self, folder: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{_FOLDER}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}


def _who_joined(address: str | None, count: int | None, index: int | None) -> str:
    """For a job that is not complete: what this process observes, and what to check."""
    remedy = (
        "check that every process was started and reaches the host and port of "
        "JAX_COORDINATOR_ADDRESS, and that JAX_NUM_PROCESSES is their number"
    )
    if address is None or count is None:
        return f"not all processes of the job have joined; {remedy}"
    host, _, port = address.rpartition(":")
    if index == 0:
        joined = min(count, max(1, _connections_to(int(port))))
        return f"{joined} of {count} processes joined at {address}; {remedy}"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return f"process 0 is at {address}, but not all {count} processes joined; {remedy}"
    except OSError as error:
        reason = error.strerror or str(error)
        return f"process 0 of {count} does not answer at {address} ({reason}); {remedy}"


def _connections_to(port: int) -> int:
    """Number of open connections to a port of this machine, one for each process of a job."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines][1:]
            found += sum(
                int(row[1].rpartition(":")[2], 16) == port for row in rows if row[3] == _ESTABLISHED
            )
    return found


def _has_several(variable: str) -> bool:
    return (ranges.parse_integer(os.environ.get(variable, "1")) or 0) > 1


def _by_open_mpi_5() -> bool:
    # JAX detects only mpirun of earlier versions, by the address of its daemon.
    return _has_several("OMPI_COMM_WORLD_SIZE") and "OMPI_MCA_orte_hnp_uri" not in os.environ


def _launched_with_others(platform: str | None) -> bool:
    # srun sets SLURM_STEP_NUM_TASKS for its tasks. SLURM_NTASKS is also set in the shells of sbatch
    # and salloc, which are single processes.
    several = _has_several("SLURM_STEP_NUM_TASKS") or _has_several("OMPI_COMM_WORLD_SIZE")
    if several or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return True
    # GKE lists all hosts of a slice.
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return "," in os.environ[name]
    return _on_slice_of_tpu_vms(platform)


def _on_slice_of_tpu_vms(platform: str | None) -> bool:
    """Whether the metadata server of this TPU VM lists several hosts, or several slices."""
    # JAX sets jax_platforms to "tpu,cpu" where it finds chips and libtpu, and TPU_SKIP_MDS_QUERY
    # where it finds no chips. With TPU_PROCESS_BOUNDS, libtpu uses only a part of the slice.
    if "tpu" not in (platform or jax.config.values["jax_platforms"] or "").split(","):
        return False
    if not os.environ.keys().isdisjoint({"TPU_SKIP_MDS_QUERY", "TPU_PROCESS_BOUNDS"}):
        return False
    return "," in _tpu_metadata("worker-network-endpoints") or (
        "MEGASCALE_COORDINATOR_ADDRESS" in _tpu_metadata("tpu-env")
    )


def _tpu_metadata(name: str) -> str:
    """An attribute of this TPU VM, or "" if there is none or no server answers."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as in JAX
    request = urllib.request.Request(
        f"http://{server}/{_TPU_METADATA}/{name}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as response:
            return response.read().decode()
    except OSError:
        return ""


def of_all_processes(value: Any) -> np.ndarray:
    """The ``value`` that each process has called this with, a number or a bool: [processes]."""
    if jax.process_count() > 1:
        wait_for_all()
    return multihost_utils.process_allgather(np.array([value]), tiled=True)


def check_equal(what: str, value: str, remedy: str) -> None:
    """Raise UserError, ending with ``remedy``, unless all processes have the same ``value``."""
    everywhere = of_all_processes(np.uint32(zlib.crc32(value.encode())))
    different = np.flatnonzero(everywhere != everywhere[0])
    if len(different):
        others = ", ".join(map(str, different))
        raise UserError(f"{what} of process 0 and of {others} differ; {remedy}")


def raise_together(fault: UserError | None, what: str) -> None:
    """Raise UserError in all processes if one of them has a ``fault``; ``what`` it has found."""
    everywhere = of_all_processes(fault is not None)
    if fault is not None:
        raise fault
    if everywhere.any():
        raise UserError(f"process {int(everywhere.argmax())} {what}; see the error that it printed")


def wait_for_all() -> None:
    """Wait until all processes have called this, within the limits of the watchdog.

    Collectives of devices, in contrast, fail after seconds to minutes.
    """
    from orbax.checkpoint import multihost  # noqa: TID251 (JAX has no barrier that is public)

    key = f"barrier_{next(_barriers)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=PATIENCE_SECONDS * 1000)


def compiled_together(step: jax.stages.Wrapped) -> Callable[..., Any]:
    """``step``, compiled in all processes before any of them runs it.

    Otherwise, the first process would wait for the others in a collective, which fails after 30
    seconds on CPUs.
    """
    compiled = False

    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled:
            return step(*args)
        with watchdog.phase("compile"):
            if jax.process_count() > 1:
                step.lower(*args).compile()  # cached for the call
                wait_for_all()
            compiled = True
            return step(*args)

    return call


def leave_if_not_alone(code: int) -> None:
    """End this process at once if it belongs to a job of several.

    An ordinary exit would wait minutes for the others, which wait for this one in a collective.
    When it is gone, they end too.
    """
    if jax.distributed.is_initialized():
        _flush()
        os._exit(code)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed one is None
        stream.flush()


def _exit_at_once(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Exit without JAX's barrier, which would wait for the lost peer."""
    traceback.print_exception(kind, error, trace)
    _flush()
    os._exit(PEER_LOST if _is_lost_peer(error) else 1)


def _is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is one of the runtime and not of this process.

    From its second call on, a compiled program raises a ValueError, recognized by its text.
    """
    if error is None:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError) or _LOST.search(str(error)):
        return True
    return _is_lost_peer(error.__cause__ or error.__context__)


def check_platform(wanted: str | None) -> str:
    """The platform in use; raises UserError if it is not ``wanted``, or without its processes.

    ``wanted`` is "cpu", "gpu" or "tpu", or None for any.
    """
    if wanted is not None and wanted not in ("cpu", "gpu", "tpu"):
        raise UserError(f"platform {wanted!r} is unknown; choose cpu, gpu or tpu")
    if wanted is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(wanted, wanted))
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter without a plugin for it
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0]
        raise UserError(_absent(wanted, reason or "JAX has no plugin for it")) from None
    if wanted not in (None, found):
        raise UserError(f"platform {wanted} cannot be set: JAX already runs on {found}")
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"the devices belong to {jax.process_count()} processes, but this one is not connected "
            "to the others; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in "
            "each of them (docs/multi_host.md)"
        )
    return found


def _absent(wanted: str | None, reason: str) -> str:
    if wanted is None:
        return (
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} is not available ({reason}); set it "
            "to an available platform, or unset it"
        )
    extra = {"gpu": "cuda"}.get(wanted, wanted)
    return (
        f"platform {wanted} is not available ({reason}); install flax-transformers[{extra}] on a "
        "machine with such a device, or omit --platform"
    )
