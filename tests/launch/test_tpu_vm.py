"""launch/tpu_vm.sh with a fake gcloud, whose TPU VM is a local folder."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_vm.sh"

GCLOUD = """#!/bin/bash
case "$*" in
*describe*) echo "${STATE:-ACTIVE}" ;;
*scp*) cp -- "$5" "$VM/${6#*:}" ;;
*ssh*) cd "$VM"; HOME=$VM bash -c "${8#--command=}" ;;
esac
"""

UV = """#!/bin/bash
case "$1" in
venv) mkdir -p .venv/bin; cp "$TRAINER" .venv/bin/flax-transformers ;;
esac
"""

TRAINER = """#!/bin/bash
printf '%s\\n' "$@" >> "$HOME/arguments"
ls >> "$HOME/files"
exit "$(cat "$HOME/code" 2>/dev/null || echo 0)"
"""


NOTHING = "#!/bin/bash\n"


@pytest.fixture
def launch(tmp_path):
    """Runs the script in a folder of the given name; returns the process and the VM's folder."""
    tools, vm, temporary = tmp_path / "tools", tmp_path / "vm", tmp_path / "tmp"
    for folder in (tools, vm, temporary):
        folder.mkdir()
    # The VM is this machine, where no process may be killed.
    nothing = {"pkill": NOTHING, "sleep": NOTHING}
    for name, text in ({"gcloud": GCLOUD, "uv": UV, "trainer": TRAINER} | nothing).items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)

    def run(folder: str, *arguments: str, **environment: str):
        code = tmp_path / folder
        code.mkdir()
        (code / "own.py").write_text("")
        done = subprocess.run(
            ["bash", SCRIPT, "bert", "zone", "v5litepod-16", *arguments],
            cwd=code,
            env=os.environ
            | {"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
            | {"VM": str(vm), "TRAINER": str(tools / "trainer")}
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert list(temporary.iterdir()) == []
        return done, vm

    return run


@pytest.mark.parametrize("folder", ["plain", "it's mine", 'two "words"', "$HOME;touch x"])
def test_the_folder_can_have_any_name(launch, folder):
    done, vm = launch(folder, "train", "own.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert (vm / "files").read_text().split() == ["own.py"]


@pytest.mark.parametrize("argument", ["it's", 'a "b"', "$HOME", "two  spaces", "a;b|c"])
def test_arguments_arrive_unchanged(launch, argument):
    done, vm = launch("plain", "train", "own.py", "--workdir", argument)
    assert done.returncode == 0
    assert (vm / "arguments").read_text() == f"train\nown.py\n--workdir\n{argument}\n"


def test_a_user_error_is_not_retried(launch):
    _, vm = launch("plain", "doctor")
    (vm / "code").write_text("2")
    (vm / "arguments").unlink()
    done, _ = launch("other", "doctor")
    assert (done.returncode, (vm / "arguments").read_text()) == (2, "doctor\n")


def test_preemptions_do_not_use_up_the_restarts_of_failures(launch, tmp_path):
    codes = tmp_path / "codes"
    codes.write_text("42\n75\n42\n75\n")
    trainer = '#!/bin/bash\ncode=$(head -n 1 "$CODES"); sed -i 1d "$CODES"; exit "${code:-0}"\n'
    (tmp_path / "tools" / "trainer").write_text(trainer)
    done, _ = launch("plain", "train", "own.py", MAX_RESTARTS="1", CODES=str(codes))
    assert (done.returncode, codes.read_text()) == (75, "")
    assert done.stdout.count("restart after a preemption") == 2
    assert "exit code 75; gave up after 1 restart(s); run this again to resume" in done.stderr


def test_a_file_of_another_user_in_the_temporary_folder_is_not_written(launch, tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    predictable = Path("/tmp/bert.tar.gz")
    if not predictable.exists():
        predictable.symlink_to(other)
    try:
        launch("plain", "train", "own.py")
        assert other.read_text() == "kept"
    finally:
        if predictable.is_symlink() and predictable.resolve() == other.resolve():
            predictable.unlink()


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "NONE"])
def test_a_slice_that_never_becomes_active_ends_the_script(launch, state):
    done, _ = launch("plain", "train", "own.py", STATE=state, POLL_SECONDS="0")
    assert done.returncode == 1
    assert f"bert is {state}; see: gcloud compute tpus queued-resources" in done.stderr
