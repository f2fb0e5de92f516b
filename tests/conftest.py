"""Every test runs on the CPU with eight virtual devices, in exact float32."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start would each compile for seconds what they import; images of containers
# often set this.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Threads for the collectives of eight devices, which otherwise can come to a standstill.
os.environ["NPROC"] = "64"
# Many tests compile the same small programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/compiled").absolute()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Programs, also those of commands in their own processes, are compiled in a third of the time with
# few optimisations, without the code generator that goes through MLIR, and as one module each.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Nor does a program carry the lines of Python that each operation comes from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
        # Newer versions abort at a flag that they do not know.
        *["--xla_cpu_use_fusion_emitters=false"]
        * importlib.metadata.version("jaxlib").startswith("0.10."),
    ]
)

import jax
import pytest

from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.training import setup

# Tracing makes many objects and little garbage; looking for it took a tenth of the time.
gc.set_threshold(100_000, 20)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Adding a [D] to a [B, D] without saying so hides shape mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Live comparisons run where the originals are installed (`make parity`), notebooks where their
# client is (`make notebooks`).
collect_ignore = [] if importlib.util.find_spec("torch") else ["parity"]
collect_ignore += [] if importlib.util.find_spec("nbclient") else ["notebooks"]
collect_ignore += [] if importlib.util.find_spec("lm_eval") else ["parity/test_harness.py"]


@pytest.fixture(autouse=True)
def no_watchdog_from_another_test() -> Iterator[None]:
    """Stop the watchdog that a command started, and restore handlers: a test that sends a signal to
    its own process would end it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    watchdog.stop()
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Meshes are of one device, for which runs take two thirds of the time, and the ends of runs
    draw no plots, which takes half a second each."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *platform: first)
        patch.setattr("flax_transformers.monitoring.plots.plot_metrics", lambda *_: [])
        yield


_TRAINERS: list = []
"""What `compiled_once` has made, for all modules of a process."""


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Runs of the same model, objective and optimizer on the same mesh share the trainer, whose
    steps each of them would otherwise trace and load again. For modules that change no code that is
    traced."""
    make = setup.Trainer

    def shared(**arguments):
        # All that the trainer is made of, apart from a limit that the loop reads from the config,
        # and from the end of a schedule that has none.
        compared = {k: v for k, v in arguments.items() if k != "max_consecutive_skips"}
        schedule = getattr(arguments["optimizer"], "schedule", None)
        if getattr(schedule, "kind", None) == "constant":
            del compared["total_steps"]
        for known, trainer in _TRAINERS:
            if known == compared:
                return trainer
        trainer = make(**arguments)
        trainer.train_step = functools.cache(trainer.train_step)
        trainer.evaluation_step = functools.cache(trainer.evaluation_step)
        drawn = functools.cache(trainer.init)

        def init(seed):
            """A copy, as a step donates its state."""
            where = jax.tree.map(lambda leaf: leaf.sharding, drawn(seed))
            return jax.device_put(drawn(seed), where, may_alias=False)

        trainer.init = init
        _TRAINERS.append((compared, trainer))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Trainer", shared)
        yield


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody calls it
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests of several processes wait now and then."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """What was imported stays: it is not searched for garbage again and again."""
    gc.freeze()


_LONG = {"multi_device", "multi_process", "training"}


def pytest_collection_modifyitems(items: list) -> None:
    """Folders whose tests take long come first: no process is left alone with them at the end."""
    items.sort(key=lambda item: _LONG.isdisjoint(item.path.parts))
