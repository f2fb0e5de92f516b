"""``flax-transformers doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from flax_transformers.cli.parsing import option, refuse_arguments
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog

if TYPE_CHECKING:
    import numpy as np

    from flax_transformers.data.base import DataConfig, Tokenizers
    from flax_transformers.training.config import TrainConfig

PAYLOAD_BYTES = 4 * 2**20
"""Bytes of each device in the all-reduce, as many as in a typical bucket of gradients."""
TIMES = 5
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
OPTIONAL = {
    "tensorflow": ("preparing large TFDS corpora", "prepare"),
    "torch": ("comparing converted weights", "convert"),
    "transformers": ("comparing converted weights", "convert"),
}


@dataclass(frozen=True)
class Doctor:
    """Check that this machine, or every machine of a job, is ready to train."""

    platform: Annotated[str | None, option("PLATFORM")] = None
    """"cpu", "gpu" or "tpu": fail if it is not present."""
    workdir: Annotated[str | None, option("DIR")] = None
    """Also check that every process can write to this folder."""
    config: Annotated[str | None, option("CONFIG")] = None
    """Also check that this config fits the devices, that all processes have the same, and that all
    find its data. Its fields can be set as for train. Data of a hub is downloaded."""

    def run(self, overrides: Sequence[str]) -> int:
        from flax_transformers import runtime
        from flax_transformers.cli.config_file import load_config
        from flax_transformers.parallel.limits import Limits

        config = None
        if self.config is None:
            refuse_arguments(overrides)
        else:
            config = load_config(self.config, overrides)
        limits = Limits() if config is None else config.limits
        runtime.start(self.platform or (None if config is None else config.platform), limits)
        watchdog.start(limits)
        _check_packages()
        with watchdog.phase("step"):
            _check_collective()
        if config is not None:
            with watchdog.phase("prepare"):
                _check_config(config, overrides, self.workdir)
        if self.workdir:
            with watchdog.phase("save"):
                _check_storage(self.workdir)
        _say("ready to train")
        return 0


def _check_packages() -> None:
    """Prints versions and devices. Raises UserError if versions differ between processes."""
    import jax

    from flax_transformers.parallel.distributed import check_equal

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    _say(f"python {platform.python_version()} on {platform.platform()}")
    _say("  ".join(f"{name} {version}" for name, version in versions.items()))
    for package, (purpose, extra) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            _say(f"not installed: {package}, for {purpose} (extra: {extra})")
    kinds = sorted({device.device_kind for device in jax.devices()})
    _say(
        f"{jax.device_count()} device(s) of kind {', '.join(kinds)} in {jax.process_count()} "
        f"process(es), {jax.local_device_count()} in this one"
    )
    check_equal(
        "package versions",
        "  ".join((platform.python_version(), *versions.values())),
        "install the same Python and the same constraints.txt on every machine",
    )


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def payload(width: int) -> np.ndarray:
    """What each device adds, float32 [width]: integers so small that sums over 16,384 devices are
    exact in any order."""
    import numpy as np

    return (np.arange(width) % 1024).astype(np.float32)


def _check_collective() -> None:
    """Sums ``PAYLOAD_BYTES`` of each device over all devices of all processes; prints the time."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count, width = jax.device_count(), PAYLOAD_BYTES // 4
    mesh = jax.make_mesh((count,), ("all",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    own = payload(width)[None]
    rows = jax.make_array_from_callback((count, width), sharding, lambda index: own)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = np.asarray(total(rows))  # the first call compiles
    if not np.array_equal(found, count * own[0]):
        raise UserError(
            f"an all-reduce over {count} devices is wrong on process {jax.process_index()}; check "
            "the interconnect and the machine of that process"
        )
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        total(rows).block_until_ready()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    _say(
        f"an all-reduce of {PAYLOAD_BYTES / 2**20:.0f} MiB over {count} device(s) is right and "
        f"took {1000 * best:.1f} ms, {PAYLOAD_BYTES / best / 1e9:.2f} GB/s"
    )


def _check_config(config: TrainConfig, overrides: Sequence[str], workdir: str | None) -> None:
    """Raises UserError unless the config is the same in all processes, fits the devices, and its
    data is prepared, or in a job of one process found. A run in ``workdir`` is judged as `train`
    resumes it."""
    import json

    import jax

    from flax_transformers.checkpointing.step_directories import has_checkpoint
    from flax_transformers.cli.config_file import naming_options
    from flax_transformers.config_json import to_json
    from flax_transformers.parallel.distributed import check_equal
    from flax_transformers.runtime import (
        check_known_tokenizers,
        fitted_data,
        prepared_data,
        store_of_run,
        with_initial_model,
    )
    from flax_transformers.storage.workdir import open_workdir
    from flax_transformers.training.check_run import check_config, check_run
    from flax_transformers.training.run_state import tokenizers_of_run
    from flax_transformers.training.setup import checked_mesh

    check_equal(
        "the config",
        json.dumps(to_json(config), sort_keys=True),
        "give every machine the same file and the same fields",
    )
    folder = None if workdir is None else open_workdir(workdir)
    config = with_initial_model(config, overrides, folder)
    mesh = checked_mesh(config)
    check_config(config)
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    _say(f"the config is the same in all processes and fits the devices ({sizes or 'one device'})")
    of_run = {} if folder is None else tokenizers_of_run(folder)
    new = folder is None or not has_checkpoint(folder)
    if jax.process_count() == 1:  # it prepares the data itself
        with naming_options(config):
            _find(config.data, of_run)
        _say("the data is found")
        if new:
            check_known_tokenizers(config)
    else:
        trained_on = None if folder is None else store_of_run(folder)
        prepared = prepared_data(config.data, of_run, trained_on)
        check_equal(
            "the prepared data",
            prepared.fingerprint,
            "prepare them once, into a --data.store that all machines share",
        )
        check_run(config, fitted_data(config, prepared), new=new)
        _say(f"every process finds the data in {prepared.directory}")


def _find(data: DataConfig, of_run: Tokenizers) -> None:
    """Raises UserError unless the source of the data is found, or its store is finished."""
    with tempfile.TemporaryDirectory() as elsewhere:
        try:  # a store with a name: the default one is named by the content of the whole source
            data.preparation(elsewhere, of_run).check()
        except UserError:
            data.preparation(None, of_run).check()


def _check_storage(workdir: str) -> None:
    """Raises UserError unless every process can write a file and read those of the others."""
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
    # Only these names: files may be left from a check that did not end.
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
        folder.rmtree(missing_ok=True)  # an empty folder of a bucket does not exist
    _say(f"{workdir} can be written by every process")
