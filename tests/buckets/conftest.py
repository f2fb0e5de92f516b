"""Emulators of gs:// and s3:// on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# Both come with the extra "bucket-tests", whose environment `make test-buckets` makes.
installed = all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator", "moto")))
collect_ignore_glob = [] if installed else ["test_*.py"]

_HOST = "127.0.0.1"
_SERVERS = {
    "gs": [str(Path(__file__).parent / "gcs_emulator.py")],
    "s3": ["-m", "moto.server", "--host", _HOST, "--port"],
}


@pytest.fixture(scope="session")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both emulators, and the environment in which this process and its children find them."""
    logs = tmp_path_factory.mktemp("emulators")
    patch = pytest.MonkeyPatch()
    with ExitStack() as stack:
        urls = {scheme: stack.enter_context(_server(scheme, logs)) for scheme in _SERVERS}
        for name, value in _environment(urls).items():
            patch.setenv(name, value)
        make = urllib.request.Request(f"{urls['s3']}/bucket", method="PUT")
        urllib.request.urlopen(make, timeout=60).close()
        yield
    patch.undo()


def _environment(urls: dict[str, str]) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": urls["gs"],  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": urls["gs"],
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks what the emulator cannot answer
        "GCE_METADATA_ROOT": f"{_HOST}:1",  # nobody asks a cloud who we are
        "AWS_ENDPOINT_URL": urls["s3"],
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nobody",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def _server(scheme: str, logs: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    url = f"http://{_HOST}:{port}"
    with open(logs / scheme, "w") as log:
        process = subprocess.Popen(
            [sys.executable, *_SERVERS[scheme], str(port)], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_it_answers(url, process, logs / scheme)
        yield url
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer: {log.read_text()}")


@pytest.fixture(params=["gs", "s3"])
def bucket(emulators: None, request: pytest.FixtureRequest) -> str:
    """A folder of a bucket that nobody has used yet, in each cloud."""
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def environment(emulators: None) -> dict[str, str]:
    """For processes of their own: they see one CPU device."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
