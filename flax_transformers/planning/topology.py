"""Ahead-of-time topologies: devices to compile for, from a name such as v5e:4x4."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from flax_transformers.errors import UserError

EXAMPLES = "v4:4x4x4, v5e:4x4, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, 2xv5e:16x16, h100:8, cpu:8"
# Dimensions of the torus. Without the setting below, JAX counts a v4 chip as two devices.
_TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_TPU7X_COMPILER = (0, 0, 50)
"""The oldest libtpu known to compile for tpu7x: 0.0.42 overflows its stack."""
_TPU_SETTINGS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
# ``GpuTargetConfigProto`` of the SXM5 model, from its published limits.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98 device_memory_size: 84942979072
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_NAME = re.compile(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)")
# A slice as Google Cloud names it, by its number of cores (v4, v5p) or of chips.
_SLICE_NAME = re.compile(r"(?:(\d+)x)?(v\w+)-(\d+)")
_CORES_OF_CHIP = {"v4": 2, "v5p": 2}


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, which need not be present.

    ``topology`` is a device kind and its grid, ``v5e:4x4``, or several such slices, ``2xv5e:4x4``,
    multiplied by ``slices``; also the name of a TPU slice in Google Cloud, ``v5p-16``. ``cpu:8``
    are virtual devices of this process.

    Raises UserError for an unknown name, and if the compiler for it is not installed.
    """
    match = _NAME.fullmatch(with_grid(topology))
    if match is None:
        raise UserError(f"there is no topology {topology!r}; name one such as {EXAMPLES}")
    count = int(match[1] or 1) * slices
    kind, grid = match[2], tuple(int(size) for size in match[3].split("x"))
    if not count * math.prod(grid):
        raise UserError(f"topology {topology!r} has no device; name one such as {EXAMPLES}")
    if kind == "cpu":
        return _virtual_devices(math.prod(grid) * count)
    if kind in _TPUS:
        return _tpu_devices(topology, kind, grid, count)
    if kind == "h100":
        return _gpu_devices(topology, math.prod(grid), count)
    raise UserError(f"there is no device kind {kind!r}; name a topology such as {EXAMPLES}")


def with_grid(topology: str) -> str:
    """``v5p-16``, a slice of 16 cores, as ``v5p:2x2x2``; other names as they are.

    The sides of the grid are as equal as powers of two allow, as in the tables of Google Cloud.
    """
    match = _SLICE_NAME.fullmatch(topology)
    if match is None:
        return topology
    slices, kind, number = f"{match[1]}x" if match[1] else "", match[2], int(match[3])
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    chips = number // _CORES_OF_CHIP.get(kind, 1)
    if kind not in _TPUS or chips < 1 or chips & (chips - 1):
        return topology
    doublings, sides = chips.bit_length() - 1, _TPUS[kind]
    grid = sorted(2 ** ((doublings + side) // sides) for side in range(sides))
    if chips == 4 and sides == 3:
        grid = [2, 2, 1]
    return f"{slices}{kind}:{'x'.join(map(str, grid))}"


def _virtual_devices(count: int) -> list[jax.Device]:
    if len(jax.devices("cpu")) < count:
        raise UserError(
            f"this process has {len(jax.devices('cpu'))} CPU devices, not {count}; start it with "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.devices("cpu")[:count]


def _tpu_devices(topology: str, kind: str, grid: tuple[int, ...], slices: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the compiler for TPUs, which runs on any Linux machine, is not installed; install it "
            "with: pip install 'flax-transformers[plan]'"
        )
    if len(grid) != _TPUS[kind]:
        sides = "x".join("4" * _TPUS[kind])
        raise UserError(f"{kind} is a torus of {_TPUS[kind]} dimensions; name it as {kind}:{sides}")
    version = importlib.metadata.version("libtpu")
    if kind == "tpu7x" and tuple(map(int, version.split(".")[:3])) < _TPU7X_COMPILER:
        raise UserError(
            f"libtpu {version}, the compiler for TPUs that is installed here, crashes on tpu7x; "
            "use one from 0.0.50 on, such as that of the newest JAX, on Python 3.12"
        )
    # libtpu must not query this machine, and several processes may load it.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    name, settings = f"{kind}:{'x'.join(map(str, grid))}", _TPU_SETTINGS.get(kind, {})
    if math.prod(grid) == 1:  # otherwise a host has 2x2 chips
        settings = settings | {"chips_per_host_bounds": (1, 1, 1)}
    return _described(topology, "tpu", topology_name=name, num_slices=slices, **settings)


def _gpu_devices(topology: str, gpus: int, hosts: int) -> list[jax.Device]:
    """H100s, ``gpus`` on each of ``hosts`` hosts."""
    plugins = (importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not any(plugins):
        raise UserError(
            "the compiler for NVIDIA GPUs, which needs no GPU, is not installed; install it with: "
            "pip install jax-cuda12-plugin jax-cuda12-pjrt, of the version of jax"
        )
    grid = f"1x{hosts}x{gpus}"
    return _described(topology, "cuda", topology_name="h100", topology=grid, target_config=_H100)


def _described(named: str, platform: str, **settings: Any) -> list[jax.Device]:
    """The devices of a topology, by the compiler of the platform; ``named``: by the user."""
    try:
        with silenced():
            found = topologies.get_topology_desc(platform=platform, **settings)
    except Exception as error:  # libtpu and the plugin of CUDA raise several types
        said = str(error).partition("\n")[0]
        raise UserError(
            f"topology {named} is not possible ({said}); name one such as {EXAMPLES}"
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress messages of C++ libraries on stderr, such as that libtpu finds no TPU."""
    kept = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(devnull)
