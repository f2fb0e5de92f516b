"""How the C library allocates memory for computations on the CPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


_KEPT = {"arena_max": 1, "mmap_threshold": 2**34, "trim_threshold": 2**36}
"""Freed memory stays with the process, up to 64 GiB, for the next step. glibc does that only in its
main arena, and for allocations below the threshold, bytes each."""


def memory_settings() -> dict[str, str]:
    """Environment variables that let a new process allocate large arrays fast on the CPU.

    At each call of a program, XLA's CPU backend allocates its temporaries, gigabytes for a training
    step, and frees them; the system takes them back and clears them again page by page (as of
    jaxlib 0.12). With these settings the process keeps them, in pages of 2 MB where Linux offers
    those only on demand. glibc reads them at its start. Empty where JAX may use other devices, and
    if ``GLIBC_TUNABLES`` is set already.
    """
    if _TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return {}
    try:
        offered = "[madvise]" in _ENABLED.read_text()
    except OSError:
        offered = False
    tunables = ({"hugetlb": 1} if offered else {}) | _KEPT
    return {_TUNABLES: ":".join(f"glibc.malloc.{key}={value}" for key, value in tunables.items())}


def restart_with_memory_settings() -> None:
    """Replace this process by its own command with ``memory_settings``, if there are any."""
    settings = memory_settings()
    if settings:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | settings)


def _computes_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    # JAX uses other devices only by a plugin.
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
