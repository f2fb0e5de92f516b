"""Memory settings of programs that compute on the CPU."""

import os
import platform
import subprocess
import sys

import pytest

from flax_transformers.parallel import host_memory

KEPT = (
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=17179869184:"
    "glibc.malloc.trim_threshold=68719476736"
)


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """A system with glibc that offers huge pages on demand."""
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(host_memory, "_ENABLED", enabled)
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return enabled


def test_huge_pages_are_asked_for_where_the_system_offers_them(offered, monkeypatch):
    assert host_memory.memory_settings() == {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:{KEPT}"}
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert host_memory.memory_settings() == {}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_huge_pages_are_not_asked_for_where_that_changes_nothing(offered, text):
    offered.unlink() if text is None else offered.write_text(text)
    assert host_memory.memory_settings() == {"GLIBC_TUNABLES": KEPT}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_stays_with_the_process(offered):
    program = (
        "import resource, numpy as np\n"
        "for _ in range(2):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    np.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )

    def faults(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", program]
        return int(subprocess.check_output(command, env=os.environ | environment))

    assert faults(host_memory.memory_settings()) < 10 < faults({})


def test_settings_of_the_user_are_kept(offered, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert host_memory.memory_settings() == {}


def test_the_process_is_replaced_by_its_own_command_once(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        "import os, sys\n"
        "from flax_transformers.parallel import host_memory\n"
        "host_memory.memory_settings = lambda: {} if 'X' in os.environ else {'X': '1'}\n"
        "print(os.getpid(), 'X' in os.environ, sys.argv[1:], flush=True)\n"
        "host_memory.restart_with_memory_settings()\n"
    )
    command = [sys.executable, str(file), "--steps", "3 4"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (before, *_), (after, *_) = (line.split() for line in lines)
    assert before == after
    assert [line.partition(" ")[2] for line in lines] == [
        "False ['--steps', '3 4']",
        "True ['--steps', '3 4']",
    ]
