"""The command line: help, and errors of one sentence with exit code 2."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.cli.config_file import load_config
from flax_transformers.cli.doctor import payload
from flax_transformers.cli.main import main
from flax_transformers.cli.parsing import _field_names
from flax_transformers.cli.train import Train
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.testing import write_corpus
from flax_transformers.version import __version__

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "bert_tiny.py")


def refused(capsys, *arguments):
    """Runs a command that must fail politely, and returns its one line."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("flax-transformers: ")
    return last


@pytest.fixture
def small(tmp_path):
    """Overrides for a run of a second on a small text file."""
    write_corpus(tmp_path / "text.txt")
    return [
        *("--data.source.path", str(tmp_path / "text.txt")),
        *("--data.store", str(tmp_path / "store")),
        *("--data.tokenizer.kind", "bytes", "--data.tokenizer.lowercase", "False"),
        *("--data.validation-fraction", "0.2"),
        *("--model.vocab-size", "262", "--model.hidden-size", "32"),
        *("--model.num-layers", "1", "--model.intermediate-size", "32"),
        *("--phases.0.steps", "3", "--phases.0.sequence-length", "32"),
        *("--phases.0.batch-size", "16", "--evaluation.batch-size", "16"),
        *("--optimizer.schedule.warmup-steps", "1"),
    ]


def test_an_unknown_option_names_the_nearest(capsys):
    said = refused(capsys, "train", TINY, "--optimizer.lerning-rate", "1")
    assert said.endswith("no option --optimizer.lerning-rate; "
                         "did you mean --optimizer.learning-rate?")  # fmt: skip


def test_a_value_of_the_wrong_kind_is_refused(capsys):
    assert "--optimizer.learning-rate is 'abc'; it must be a number" in refused(
        capsys, "train", TINY, "--optimizer.learning-rate", "abc"
    )


def test_a_value_out_of_range_is_refused(capsys):
    assert "num_heads 3" in refused(capsys, "train", TINY, "--model.num-heads", "3")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", TINY, "--workdir", ""), "--workdir is empty; give it a value, or leave it out"),
        (("train", TINY, "--workdir", "a\0b"), "--workdir is 'a\\x00b'; it must not contain a NUL"),
        (
            ("train", TINY, "--workdir", "a\udcff"),
            "--workdir is 'a\\udcff'; it must be valid UTF-8",
        ),
        (("train", TINY, "--data.source.path", "a\0b"), "it must not contain a NUL character"),
        (("train", TINY, "--workdir", "w", "--profile", "²:3"), "--profile ²:3 names no steps"),
        (
            ("train", TINY, "--workdir", "w", "--phases.0.steps", "1e20"),
            "it must be a whole number",
        ),
        (("train", TINY, "--model.gated", "maybe"), "--model.gated is 'maybe'; it must be one of"),
        (("train", TINY, "--evaluation.max-examples", "x"), "is 'x'; it must be {None}|INT"),
        (("train", TINY, "--model.dropout", "2"), ": model.dropout is 2.0; it must be in [0, 1)"),
        (("train", TINY, "--workdir"), "--workdir has no value; give it one"),
        (("generate",), "MODEL is missing; see flax-transformers generate --help"),
        (("convert", "a", "b", "--dtype", "int8"), "--dtype is 'int8'; it must be one of"),
        (("prepare", TINY, "--begin", "--verify"), "exclude each other; give one of them"),
        (
            ("train", TINY, "--workdir", "w", "--logging.hang-dump-s", "nan"),
            "logging.hang_dump_s is nan; it must be finite",
        ),
        (("evaluate", ""), "MODEL is empty; give it a value, or leave it out"),
        (
            ("fill-mask", "x", "--text", "y", "--top", "²"),
            "--top is '²'; it must be a whole number",
        ),
        (("generate", "x", "--prompt", "y", "--top-p", "nan"), "--top-p is nan; it must be finite"),
        (("generate", "x", "--prompt", "y", "--seed", "9" * 30), "it must be a whole number"),
        (("plan", TINY, "--topology", "cpu:1", "--phase", "1_0"), "--phase is '1_0'; it must be a"),
        (("no-such-command",), "there is no command 'no-such-command'; choose from train"),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(capsys, arguments, says):
    assert says in refused(capsys, *arguments)


def test_a_padding_id_that_is_a_token_of_the_model_is_refused(capsys, small, tmp_path):
    said = refused(
        capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small, "--model.pad-id", "5"
    )
    assert "pads with id 0, but model.pad_id is 5" in said


def test_a_missing_config_file_names_the_nearest(capsys):
    said = refused(capsys, "train", str(ROOT / "configs" / "bert_tny.py"))
    assert "did you mean" in said and "bert_tiny.py" in said


def test_a_config_file_that_fails_is_named_with_its_error(capsys, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    assert "fails with ZeroDivisionError" in refused(capsys, "train", str(broken))


def test_a_misspelt_field_of_a_config_file_is_named_with_its_line_and_the_nearest(capsys, tmp_path):
    file = tmp_path / "misspelt.py"
    file.write_text(
        "from flax_transformers.training.config import Phase\n\n\ndef get_config():\n"
        "    return Phase(sequence_length=8, steps=1, batch_sizes=2)\n"
    )
    said = refused(capsys, "train", str(file))
    assert "misspelt.py, line 5, fails with TypeError" in said
    assert re.search("[Dd]id you mean '?batch_size'?", said)


def test_print_config_shows_overrides_and_starts_nothing(capsys):
    assert main(["train", TINY, "--print-config", "--optimizer.learning-rate", "3e-4"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["optimizer"]["learning_rate"] == 3e-4


def test_train_needs_a_workdir(capsys):
    assert "--workdir is missing" in refused(capsys, "train", TINY)


def test_a_missing_corpus_is_named(capsys, small, tmp_path):
    missing = str(tmp_path / "nowhere.txt")
    small[1] = missing
    assert missing in refused(capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small)


def test_an_empty_corpus_is_refused(capsys, small, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n \n")
    assert "empty" in refused(capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small)


@pytest.mark.slow
def test_a_corpus_smaller_than_a_window_is_refused(capsys, small, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"a{i}" for i in range(9)))
    small[small.index("0.2")] = "0.3"
    assert "one training window needs 30" in refused(
        capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small
    )


def test_invalid_utf8_is_refused_with_its_position(capsys, small, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"Good text.\n\nBad \xff text.\n")
    said = refused(capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small)
    assert "text.txt" in said and "UTF-8" in said and "on_invalid" in said


def test_a_batch_that_the_mesh_does_not_divide_is_refused(capsys, small, tmp_path):
    small[small.index("--phases.0.batch-size") + 1] = "12"
    assert "such as 8 or 16" in refused(
        capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small
    )


def test_a_program_that_the_device_has_no_memory_for_is_explained(capsys, monkeypatch):
    def too_large(*_):
        return jax.jit(lambda: jnp.zeros((1 << 20, 1 << 20), np.float32))().block_until_ready()

    monkeypatch.setattr(Train, "run", too_large)
    message = refused(capsys, "train", TINY)
    assert "too little memory (RESOURCE_EXHAUSTED" in message
    assert "--phases.0.micro-batches" in message


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_output_on_a_full_disk_is_named(capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", FullDisk())
        assert main(["--version"]) == 2
    assert "the output of the command cannot be written (No space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ((Path, "is_file"), ("train", "shut/config.py", "--workdir", "w")),
        ((Path, "exists"), ("predict", "run", "--input", "shut/texts.txt")),
        ((Path, "is_file"), ("convert", "shut/run", "new")),
        ((os, "stat"), ("report", "shut/run")),
    ],
)
def test_a_folder_that_may_not_be_looked_into_is_named(capsys, monkeypatch, place, arguments):
    """As Python 3.11 says it."""
    ask = getattr(*place)

    def guarded(path, *others, **options):
        if "shut" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ask(path, *others, **options)

    monkeypatch.setattr(*place, guarded)
    said = refused(capsys, *arguments)
    assert "shut/" in said
    assert "cannot be used (Permission denied); get the permission for it and for the" in said


def test_a_mesh_that_does_not_fit_the_devices_is_refused(capsys, small, tmp_path):
    said = refused(
        capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small, "--mesh.fsdp", "3"
    )
    assert "does not fit 8 devices" in said


def test_an_absent_platform_is_refused(capsys, small, tmp_path, monkeypatch):
    """In a process that has not started its backend; here one has, so only the name is checked."""
    said = refused(
        capsys, "train", TINY, "--workdir", str(tmp_path / "w"), *small, "--platform", "tpuu"
    )
    assert "choose cpu, gpu or tpu" in said


def test_a_read_only_workdir_is_refused(capsys, small, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = refused(capsys, "train", TINY, "--workdir", str(tmp_path / "file" / "w"), *small)
    assert str(tmp_path / "file") in said


def test_a_missing_checkpoint_is_refused(capsys, tmp_path):
    assert "no checkpoint" in refused(capsys, "fill-mask", str(tmp_path), "--text", "A [MASK].")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_train_then_evaluate_then_fill_mask(capsys, small, tmp_path):
    workdir = str(tmp_path / "run")
    assert main(["train", TINY, "--workdir", workdir, *small]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "plots" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "run" / "samples" / "step_00000003.txt").exists()

    assert main(["evaluate", workdir]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["step"] == 3 and scores["eval/loss"] > 0
    assert main(["evaluate", workdir, "--mesh.fsdp", "2", "--mesh.data", "4"]) == 0
    divided = json.loads(capsys.readouterr().out)
    assert divided["eval/loss"] == pytest.approx(scores["eval/loss"], rel=1e-5)
    assert "tensor=3 does not fit" in refused(capsys, "evaluate", workdir, "--mesh.tensor", "3")

    assert main(["fill-mask", workdir, "--text", "a [MASK] of", "--top", "4"]) == 0
    candidates = capsys.readouterr().out.splitlines()
    assert len(candidates) == 4
    assert "no [MASK]" in refused(capsys, "fill-mask", workdir, "--text", "no gap")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_another_model_in_the_same_workdir_is_refused_before_data_are_prepared(
    capsys, small, tmp_path
):
    workdir = str(tmp_path / "run")
    assert main(["train", TINY, "--workdir", workdir, *small]) == 0
    capsys.readouterr()
    other = ("--model.intermediate-size", "64", "--data.store", str(tmp_path / "other"))
    said = refused(capsys, "train", TINY, "--workdir", workdir, *small, *other)
    assert "belongs to another run" in said
    assert not (tmp_path / "other").exists()


def test_inspect_shows_what_is_masked(capsys, small):
    assert main(["inspect", TINY, *small, "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("example ") == 2 and "→" in shown


def test_help_lists_every_field_of_the_config_with_its_docstring_and_default(capsys):
    assert main(["train", TINY, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = _field_names(load_config(TINY))
    assert len(names) > 130
    # Objects that are not set have no fields; options of a validation source make one.
    held_out = {name for name in names if name.startswith("data.validation-source.")}
    assert "data.validation-source.path" in held_out
    unset = {"logging.sinks", "evaluation.sets", *held_out}
    assert {name for name in names if f"--{name} " not in shown} == unset
    assert "--workdir DIR Folder or bucket for all files of the run." in shown
    assert re.search(r"--phases.0.batch-size INT .*? \(default: 32\)", shown)
    assert re.search(r"--max-consecutive-skips INT [^-]*\(default: 20\)", shown)


def test_the_doctor_of_one_process_looks_for_the_data(tmp_path, capsys):
    command = ["doctor", "--config", TINY, "--data.store", str(tmp_path / "store")]
    command += ["--data.source.path", str(tmp_path / "text.txt")]
    command += ["--data.tokenizer.vocab-size", "60"]
    assert main(command) == 2
    told = capsys.readouterr()
    assert "text.txt" in told.err and "the option is --data.source.path" in told.err
    assert "ready" not in told.out
    write_corpus(tmp_path / "text.txt")
    assert main(command) == 0
    assert "the data is found\nready to train" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    prepare(load_config(TINY, command[3:]).data)
    (tmp_path / "text.txt").unlink()
    assert main(command) == 0


def test_the_doctor_does_not_read_the_whole_source_for_the_name_of_its_store(
    tmp_path, capsys, monkeypatch
):
    def read(*args, **settings):
        raise AssertionError("the default store is named by the content of the source")

    monkeypatch.setattr("flax_transformers.data.config.text_directory", read)
    write_corpus(tmp_path / "text.txt")
    command = ["doctor", "--config", "bert_tiny"]
    assert main([*command, "--data.source.path", str(tmp_path / "text.txt")]) == 0
    assert "the data is found\nready to train" in capsys.readouterr().out


def test_the_sum_of_the_doctor_is_exact_in_any_order():
    own = payload(2048)
    total = np.zeros_like(own)
    for _ in range(1000):  # one device after another, as in a ring
        total += own
    np.testing.assert_array_equal(total, 1000 * own.astype(np.float64))
    assert own.max() * 16_384 < 2**24


@pytest.mark.parametrize(
    "command", [["plan", TINY], ["doctor", "--config", TINY], ["evaluate", "run", "--config", TINY]]
)
def test_help_of_other_commands_lists_the_fields_too(capsys, command):
    assert main([*command, "--help"]) == 0
    assert "--phases.0.steps" in capsys.readouterr().out


def test_help_of_a_command_and_of_the_program_exit_with_0(capsys):
    for command, expected in ((["--help"], "fill-mask"), (["fill-mask", "--help"], "--top INT")):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0 and expected in capsys.readouterr().out


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flax-transformers {__version__}\n"


ABORTS_AT_EXIT = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.on_exit(ctypes.cast(libc.abort, ctypes.c_void_p), None)
from flax_transformers.cli import main
main._commands = lambda: sys.exit("no commands") if sys.argv[2:] else {}
sys.exit(main.program(sys.argv[1:2]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["nothing"], 2), (["nothing", "fails"], 1)]
)
def test_a_library_that_aborts_at_exit_does_not_change_the_exit_code(arguments, code):
    command = [sys.executable, "-c", ABORTS_AT_EXIT, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, text=True)
    assert done.returncode == code
    assert done.stderr.count("no commands") == (code == 1)
    assert "Traceback" not in done.stderr


WRITES_TO_STDERR = """
import os, sys, time
from flax_transformers.cli import main
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.watchdog import TICK_SECONDS, watchdog

def run(_):
    with watchdog.running(Limits()), watchdog.phase("step"):
        os.write(2, b"as XLA does")
        time.sleep(3 * TICK_SECONDS)
        with open(sys.argv[1], "w") as file:
            file.write(str(watchdog._told))
    return 0

main.main = run
sys.exit(main.program([]))
"""


def test_with_closed_outputs_what_a_library_writes_is_no_signal(tmp_path):
    command = [sys.executable, "-c", WRITES_TO_STDERR, str(tmp_path / "told")]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "told").read_text() == "None"


def test_help_and_version_do_not_import_jax():
    program = (
        "import sys\n"
        "from flax_transformers.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'jax', 'numpy', 'flax'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.stdout.decode().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (["generate", "model", "--prompt", "a", "--limits.restore-s", "7"], 7.0),
        (["fill-mask", "model", "--text", "a", "--limits.restore-s", "7"], 7.0),
        (["convert", "model", "target"], Limits().restore_s),
    ],
)
def test_loading_a_model_is_a_phase_with_a_limit(capsys, tmp_path, monkeypatch, command, limit):
    """So that a job whose SIGTERM is only heard by JAX ends within limits.grace_s."""
    monkeypatch.chdir(tmp_path)
    phases = []

    def load(*args, **settings):
        phases.append((watchdog._current.name, watchdog.limits.restore_s, watchdog.is_running))
        raise UserError("stop here")

    monkeypatch.setattr("flax_transformers.pretrained.find_pretrained", load)
    assert refused(capsys, *command).endswith("stop here")
    assert phases == [("restore", limit, True)]


@pytest.mark.parametrize("steps", ["5", "7:5", "0:3", "a:b", ":4"])
def test_an_empty_range_of_profiled_steps_is_refused(capsys, tmp_path, steps):
    workdir = str(tmp_path / "run")
    said = refused(capsys, "train", TINY, "--workdir", workdir, "--profile", steps)
    assert said.endswith(f"--profile {steps} names no steps; give the first and the last, as in "
                         "10:15")  # fmt: skip
