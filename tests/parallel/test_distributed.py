"""Starting with others, starting alone, and platforms that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import jax
import jax._src.distributed as jax_distributed
import jax.numpy as jnp
import pytest

from flax_transformers.errors import UserError
from flax_transformers.parallel import distributed
from flax_transformers.parallel.distributed import check_platform, start_processes
from flax_transformers.parallel.watchdog import Watchdog

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = (
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


@pytest.fixture
def start(monkeypatch):
    """Starts under an environment; returns what JAX was told, or None if nothing was started."""
    for name in (*NAMES, *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back at the end
    watchdog = Watchdog()
    monkeypatch.setattr(distributed, "watchdog", watchdog)
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: told.append((args, kw)))

    def started(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        start_processes()
        return told[0][0] if told else None

    yield started
    watchdog.stop()


def test_a_single_process_is_not_connected(start):
    hook = sys.excepthook
    assert start() is None
    assert sys.excepthook is hook


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        # The shell of sbatch or salloc, without srun.
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "²"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"JAX_NUM_PROCESSES": ""},
    ],
)
def test_a_launcher_of_one_process_starts_nothing(start, environment):
    assert start(**environment) is None


def test_three_variables_name_a_process_of_a_job(start):
    told = start(JAX_COORDINATOR_ADDRESS="10.0.0.1:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="2")
    assert told == ("10.0.0.1:1234", 4, 2)
    assert sys.excepthook.__name__ == "_exit_at_once"


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1234"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_HOSTNAMES": "a"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a"},
        {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"},
    ],
)
def test_jax_finds_the_job_of_a_launcher_it_knows(start, environment):
    assert start(**environment) == (None, None, None)


EIGHT_TASKS = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "3"}
ONE_TASK = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
ALL_SEEN = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
RANKS = {
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "5",
}
OPEN_MPI_4 = RANKS | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1234"}
OPEN_MPI_5 = RANKS | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}


def test_open_mpi_5_numbers_the_processes_for_a_given_address(start):
    assert start(**OPEN_MPI_5) == ("10.0.0.1:1234", 16, 5)


def test_open_mpi_5_does_not_give_the_address(start):
    with pytest.raises(UserError, match="mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT$"):
        start(**RANKS)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (EIGHT_TASKS | ALL_SEEN, "3"),
        (EIGHT_TASKS, "3"),
        (ONE_TASK | ALL_SEEN, "all"),
        (ONE_TASK, "all"),
        (ONE_TASK | ALL_SEEN | {"JAX_LOCAL_DEVICE_IDS": "4,5"}, "4,5"),
        (EIGHT_TASKS | ALL_SEEN | {"CUDA_VISIBLE_DEVICES": "0"}, "all"),
        (EIGHT_TASKS | ALL_SEEN | {"CUDA_VISIBLE_DEVICES": "0,1"}, "all"),
        (ONE_TASK | ALL_SEEN | OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "5"),
        (ONE_TASK | ALL_SEEN | OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
        (ONE_TASK | ALL_SEEN | OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "5"),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
        (OPEN_MPI_5 | {"JAX_LOCAL_DEVICE_IDS": "4,5"}, "4,5"),
    ],
)
def test_a_task_uses_all_gpus_that_are_its_own(monkeypatch, start, environment, devices):
    """As JAX itself reads the arguments, which connects to nobody here."""
    connected, told = SimpleNamespace(connect=lambda: None), []
    runtime = jax_distributed._jax
    monkeypatch.setattr(runtime, "get_distributed_runtime_client", lambda *_, **__: connected)
    monkeypatch.setattr(jax_distributed.State, "initialize_preemption_sync_manager", lambda _: None)
    monkeypatch.setattr(jax_distributed.config, "update", lambda *setting: told.append(setting))
    monkeypatch.setattr(jax.distributed, "initialize", jax_distributed.State().initialize)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "16"}
    start(**job, SLURM_PROCID="1", **environment)
    assert dict(told).get("jax_cuda_visible_devices", "all") == devices


@pytest.fixture
def tpu_vm(monkeypatch):
    """Makes this machine a TPU VM; returns the attributes of its metadata server, to be filled."""
    attributes: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            known = found is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_PROCESS_BOUNDS"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "tpu,cpu")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield attributes
        server.shutdown()
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    "attributes",
    [
        {"worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2"},
        {"worker-network-endpoints": "host-0,host-1"},
        {
            "worker-network-endpoints": "host-0",
            "tpu-env": "TYPE: 'V5'\nMEGASCALE_COORDINATOR_ADDRESS: 'host-0'\n",
        },
    ],
)
def test_the_hosts_of_a_slice_of_tpu_vms_are_connected(start, tpu_vm, attributes):
    tpu_vm.update(attributes)
    assert start() == (None, None, None)


def test_a_single_tpu_vm_is_not_connected(start, tpu_vm):
    tpu_vm.update({"worker-network-endpoints": "a:b:10.0.0.1", "tpu-env": "TYPE: 'V5'\n"})
    assert start() is None


def test_a_tpu_machine_without_attributes_is_not_connected(start, tpu_vm):
    assert start() is None


@pytest.mark.parametrize("name", ["TPU_SKIP_MDS_QUERY", "TPU_PROCESS_BOUNDS"])
def test_no_metadata_is_read_where_libtpu_reads_none(start, tpu_vm, name):
    tpu_vm["worker-network-endpoints"] = "host-0,host-1"
    assert start(**{name: "1"}) is None


def test_one_host_of_a_slice_can_run_on_its_cpu_alone(start, tpu_vm):
    tpu_vm["worker-network-endpoints"] = "host-0,host-1"
    start_processes(platform="cpu")
    jax.config.update("jax_platforms", "cpu")
    assert start() is None


def test_a_process_without_its_peers_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes, but this one is not connected.*; set JAX_CO"):
        check_platform(None)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (NAMES[:1], "JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (NAMES[1:2], "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (NAMES[1:], "JAX_COORDINATOR_ADDRESS"),
        (NAMES[:2], "JAX_PROCESS_ID"),
        (NAMES[::2], "JAX_NUM_PROCESSES"),
    ],
)
def test_some_variables_without_the_others_are_refused(start, given, missing):
    said = f"^{', '.join(given)} set but not {missing}; set all three or none$"
    with pytest.raises(UserError, match=said):
        start(**dict.fromkeys(given, "1"))


@pytest.mark.parametrize(
    ("count", "index"), [("two", "0"), ("2", "2"), ("2", "-1"), ("²", "0"), ("1" * 30, "0")]
)
def test_a_process_that_is_none_of_the_job_is_refused(start, count, index):
    with pytest.raises(UserError, match=f"JAX_PROCESS_ID {index} of JAX_NUM_PROCESSES {count}"):
        start(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES=count, JAX_PROCESS_ID=index)


def test_the_platform_in_use_is_returned():
    assert check_platform(None) == "cpu"
    assert check_platform("cpu") == "cpu"


def test_an_unknown_platform_is_refused():
    with pytest.raises(UserError, match="platform 'cuda' is unknown; choose cpu, gpu or tpu"):
        check_platform("cuda")


def test_another_platform_than_the_one_already_in_use_is_refused():
    before = jax.config.jax_platforms
    jax.devices()
    try:
        with pytest.raises(UserError, match="tpu cannot be set: JAX already runs on cpu"):
            check_platform("tpu")
    finally:
        jax.config.update("jax_platforms", before)


def refused(arguments, platforms):
    """What a command on a machine without accelerators says; it has to end with code 2."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TPU_SKIP_MDS_QUERY": "1"}
    environment.pop("JAX_PLATFORMS")
    if platforms is not None:
        environment["JAX_PLATFORMS"] = platforms
    ended = subprocess.run(
        [sys.executable, "-m", "flax_transformers", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    ours = [line for line in ended.stderr.splitlines() if line.startswith("flax-transformers:")]
    (line,) = ours  # libtpu, where it is installed, has lines of its own
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "extra", "platforms"),
    [
        ("tpu", "tpu", None),
        pytest.param("gpu", "cuda", "cpu", marks=pytest.mark.full),
        pytest.param("tpu", "tpu", "cpu", marks=pytest.mark.full),
        pytest.param("gpu", "cuda", None, marks=pytest.mark.full),
    ],
)
def test_an_absent_platform_is_refused_and_the_cpu_not_used_instead(platform, extra, platforms):
    line = refused(["doctor", "--platform", platform], platforms)
    assert line.startswith(f"flax-transformers: platform {platform} is not available (")
    assert f"install flax-transformers[{extra}] on a machine with such a device" in line
    assert "JAX_PLATFORMS" not in line


@pytest.mark.slow
def test_an_absent_platform_in_the_environment_is_named():
    line = refused(["doctor"], "tpu")
    assert line.startswith("flax-transformers: JAX_PLATFORMS=tpu is not available (")
    assert line.endswith("; set it to an available platform, or unset it")


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:port"])
def test_a_coordinator_without_a_port_is_refused_with_an_example(start, address):
    with pytest.raises(UserError, match=f"{address}.*such as 10.0.0.1:1234"):
        start(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")


def test_all_processes_compile_a_step_before_any_runs_it(monkeypatch):
    events = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "wait_for_all", lambda: events.append("all are here"))

    def double(x):
        events.append("traced")  # so that the call is seen to find what was compiled
        jax.debug.callback(lambda: events.append("runs"))
        return 2 * x

    step = distributed.compiled_together(jax.jit(double))
    for _ in range(2):
        assert step(jnp.float32(3)) == 6
        jax.effects_barrier()
    assert events == ["traced", "all are here", "runs", "runs"]


def test_a_single_process_does_not_wait(monkeypatch):
    monkeypatch.setattr(distributed, "wait_for_all", None)
    assert distributed.compiled_together(jax.jit(lambda x: 2 * x))(jnp.float32(3)) == 6
