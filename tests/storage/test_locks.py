"""Leases on folders."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from flax_transformers.errors import WorkdirInUse
from flax_transformers.storage import locks


@pytest.fixture
def left(tmp_path):
    """A folder with the lease of a process that was killed."""
    folder = epath.Path(tmp_path)
    script = (
        "import os, sys; from etils import epath; from flax_transformers.storage import locks\n"
        "held = locks.lease(epath.Path(sys.argv[1])); held.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert (folder / ".lock").exists()
    return folder


def test_the_lease_of_a_process_of_this_machine_that_has_ended_is_taken_over_at_once(left, caplog):
    with locks.lease(left):
        assert json.loads((left / ".lock").read_text())["process"] == os.getpid()
    assert "waiting" not in caplog.text


@pytest.mark.parametrize("namespace", ["of another container", None])
def test_process_ids_of_other_containers_with_the_name_of_this_host_say_nothing(
    namespace, left, monkeypatch
):
    lock = left / ".lock"
    found = json.loads(lock.read_text()) | {"namespace": namespace}
    lock.write_text(json.dumps(found))
    renewed = json.dumps(found | {"renewals": 1})
    monkeypatch.setattr(locks.time, "sleep", lambda _: lock.write_text(renewed))
    with pytest.raises(WorkdirInUse, match="another process trains in"):
        locks.lease(left).__enter__()
