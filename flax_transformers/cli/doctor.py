"""Say whether this machine, or every machine of the job, is ready to train, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Sequence

from flax_transformers.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
OPTIONAL = {
    "tensorflow": ("preparing large TFDS corpora", "prepare"),
    "torch": ("comparing converted weights", "convert"),
    "transformers": ("comparing converted weights", "convert"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", help='"cpu", "gpu" or "tpu": fail if it is not there')
    parser.add_argument("--workdir", help="also check that every process can write there")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from flax_transformers.cli import runtime
    from flax_transformers.cli.config_file import refuse
    from flax_transformers.parallel.distributed import check_equal

    refuse(overrides)
    runtime.start(arguments.platform)
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
        "  ".join(versions.values()),
        "install the same constraints.txt on every machine",
    )
    _check_collective()
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
    """Sums one number per device over all devices of all processes, and times it."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    ones = jax.make_array_from_callback((count,), sharding, lambda index: np.ones(1, np.float32))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    total(ones).block_until_ready()  # compiles
    start = time.perf_counter()
    found = float(total(ones))
    elapsed = 1000 * (time.perf_counter() - start)
    if found != count:
        raise UserError(f"a sum over {count} devices gave {found}; check the interconnect")
    _say(f"a sum over all {count} device(s) is right and took {elapsed:.1f} ms")


def _check_storage(workdir: str) -> None:
    """Every process writes a file, and sees those of all the others."""
    import jax
    from jax.experimental import multihost_utils

    from flax_transformers.training.workdir import open_workdir

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
