"""Say whether this machine, or every machine of the job, is ready to train, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flax_transformers.errors import UserError

if TYPE_CHECKING:
    from flax_transformers.training.config import TrainConfig

PAYLOAD_BYTES = 4 * 2**20
"""Of each device: what a bucket of gradients comes to."""
TIMES = 5
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
OPTIONAL = {
    "tensorflow": ("preparing large TFDS corpora", "prepare"),
    "torch": ("comparing converted weights", "convert"),
    "transformers": ("comparing converted weights", "convert"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", help='"cpu", "gpu" or "tpu": fail if it is not there')
    parser.add_argument("--workdir", help="also check that every process can write there")
    parser.add_argument(
        "--config",
        help="also check that this config fits the devices, that all processes have the same, and "
        "that all find its data; fields can be set as for train",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from flax_transformers import runtime
    from flax_transformers.cli.config_file import load_config, refuse
    from flax_transformers.parallel.distributed import check_equal

    config = None
    if arguments.config is None:
        refuse(overrides)
    else:
        config = load_config(arguments.config, overrides)
    runtime.start(arguments.platform or (None if config is None else config.platform))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    _say(f"python {platform.python_version()} on {platform.platform()}")
    _say("  ".join(f"{name} {version}" for name, version in versions.items()))
    _say_missing()
    kinds = sorted({device.device_kind for device in jax.devices()})
    _say(
        f"{jax.device_count()} device(s) of kind {', '.join(kinds)} in {jax.process_count()} "
        f"process(es), {jax.local_device_count()} here"
    )
    check_equal(
        "package versions",
        "  ".join((platform.python_version(), *versions.values())),
        "install the same Python and the same constraints.txt on every machine",
    )
    _check_collective()
    if config is not None:
        _check_config(config, overrides)
    if arguments.workdir:
        _check_storage(arguments.workdir)
    _say("ready to train")
    return 0


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def _say_missing() -> None:
    for package, (purpose, extra) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            _say(f"not installed: {package}, for {purpose} (extra: {extra})")


def _check_collective() -> None:
    """Sums ``PAYLOAD_BYTES`` of each device over all devices of all processes, and times it."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count, width = jax.device_count(), PAYLOAD_BYTES // 4
    mesh = jax.make_mesh((count,), ("all",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    own = np.arange(width, dtype=np.float32)[None]
    rows = jax.make_array_from_callback((count, width), sharding, lambda index: own)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = np.asarray(total(rows))  # compiles
    if not np.array_equal(found, count * own[0]):
        raise UserError(
            f"a sum over {count} devices is wrong on process {jax.process_index()}; check the "
            "interconnect, and the machine of that process"
        )
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        total(rows).block_until_ready()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    _say(
        f"a sum of {PAYLOAD_BYTES / 2**20:.0f} MiB over all {count} device(s) is right and took "
        f"{1000 * best:.1f} ms, {PAYLOAD_BYTES / best / 1e9:.2f} GB/s"
    )


def _check_config(config: TrainConfig, overrides: Sequence[str]) -> None:
    """The config is everywhere the same, fits the devices, and its data are there."""
    import json

    import jax

    from flax_transformers.config_json import to_json
    from flax_transformers.data.dataset import open_dataset
    from flax_transformers.parallel.distributed import check_equal
    from flax_transformers.runtime import fitted_data, with_initial_model
    from flax_transformers.training.check_run import check_config, check_run
    from flax_transformers.training.loop import checked_mesh

    check_equal(
        "the config",
        json.dumps(to_json(config), sort_keys=True),
        "give every machine the same file and the same fields",
    )
    config = with_initial_model(config, overrides)
    mesh = checked_mesh(config)
    check_config(config)
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    _say(f"the config is the same everywhere and fits the devices ({sizes or 'one device'})")
    if jax.process_count() > 1:  # one process alone prepares what is not there
        prepared = open_dataset(config.data)
        check_equal(
            "the prepared data",
            prepared.fingerprint,
            "prepare it once, into a --data.store that all machines share",
        )
        check_run(config, fitted_data(config, prepared))
        _say(f"every process finds the data in {prepared.directory}")


def _check_storage(workdir: str) -> None:
    """Every process writes a file, and sees those of all the others."""
    import jax
    from jax.experimental import multihost_utils

    from flax_transformers.storage.workdir import open_workdir

    folder = open_workdir(workdir) / ".doctor"
    own = folder / f"{jax.process_index()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text("here")
    except OSError as error:
        raise UserError(
            f"process {jax.process_index()} cannot write to {workdir} ({error.strerror or error}); "
            "choose a workdir that every machine can write to"
        ) from error
    multihost_utils.sync_global_devices("doctor wrote")
    # By name: files may be left from a check that did not end.
    seen = sum((folder / str(index)).exists() for index in range(jax.process_count()))
    multihost_utils.sync_global_devices("doctor looked")
    own.unlink()
    if seen != jax.process_count():
        raise UserError(
            f"{workdir} is not shared: process {jax.process_index()} sees the files of {seen} of "
            f"{jax.process_count()} processes; use a network file system or a bucket"
        )
    multihost_utils.sync_global_devices("doctor is done")
    if jax.process_index() == 0:
        folder.rmtree(missing_ok=True)  # an emptied folder of a bucket is gone by itself
    _say(f"{workdir} can be written by every process")
