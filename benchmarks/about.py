"""What a table of measurements says about itself: when, where, and of which code.

Scripts of this folder import it by ``from about import about``.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
PACKAGES = ("jax", "flax")


def about() -> dict[str, str]:
    """Date, processor, versions and commit."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {_cpu()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "commit": commit or "unknown",
    }


def _cpu() -> str:
    """Name of the processor, and which of the instructions for matrix products it has."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    flags = [flag for flag in CPU_FLAGS if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({' '.join(flags)})"
