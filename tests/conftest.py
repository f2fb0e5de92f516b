"""Every test runs on the CPU with eight virtual devices, in exact float32."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Threads for the collectives of eight devices, which otherwise can come to a standstill.
os.environ["NPROC"] = "64"
# Many tests compile the same small programs, commands in processes of their own too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/compiled").absolute()))

import jax
import pytest

from flax_transformers.parallel.watchdog import watchdog

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Adding a [D] to a [B, D] without saying so hides shape mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Live comparisons run where the originals are installed (`make parity`), with programs as they are
# in use; elsewhere they are compiled in half the time, with few optimisations.
live = importlib.util.find_spec("torch") is not None
collect_ignore = [] if live else ["parity"]
jax.config.update("jax_disable_most_optimizations", not live)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests of several processes wait now and then."""
    return (os.cpu_count() or 1) + 1


_LONG = {"multi_device", "multi_process", "training"}


def pytest_collection_modifyitems(items: list) -> None:
    """Folders whose tests take long come first: no process is left alone with them at the end."""
    items.sort(key=lambda item: _LONG.isdisjoint(item.path.parts))
