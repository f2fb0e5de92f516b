"""How the C library allocates memory for computations on the CPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_page_settings() -> dict[str, str]:
    """Environment variables that let a new process allocate large arrays in huge pages.

    At each call of a program, XLA's CPU backend allocates its temporaries, gigabytes for a training
    step, and the system clears them page by page: a sixth of the time of a step with pages of 4 KB
    (as of jaxlib 0.12). glibc asks for pages of 2 MB only if told so at its start. Empty where they
    are not offered or are used anyway, where JAX may use other devices, and if ``GLIBC_TUNABLES``
    is set already.
    """
    if _TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return {}
    try:
        offered = "[madvise]" in _ENABLED.read_text()
    except OSError:
        offered = False
    return {_TUNABLES: "glibc.malloc.hugetlb=1"} if offered else {}


def restart_with_huge_pages() -> None:
    """Replace this process by its own command with ``huge_page_settings``, if there are any."""
    settings = huge_page_settings()
    if settings:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | settings)


def _computes_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    # JAX uses other devices only by a plugin.
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
