"""Test more than 150 damaged Hugging Face folders: each is read correctly or refused.

    python -m benchmarks.hostile_folders [--only WORD] [--jobs 2] [--output FILE.md]

Small folders of eight families are written, and each is changed in one way (config.json,
safetensors, tokenizer files, the file system). ``load_pretrained``, ``load_tokenizer`` and
``convert`` are run on it in separate processes, with 10 seconds and 2 GB each. The outcomes are

    read      the parameters are those of the folder before the change
    refused   UserError of one line (``convert``: exit code 2, and nothing written)
    wrong     read, with other parameters or with numbers that are not finite
    error     any other exception, or a message of several lines
    hang      not done after 10 seconds
    memory    more than 2 GB

The exit code is 0 if all outcomes are "read" or "refused". Needs no accelerator.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.hostile_folder_cases import Case, all_cases

SECONDS = 10
BYTES = 2 * 10**9
GOOD = ("read", "refused")
ACTIONS = ("load_pretrained", "load_tokenizer", "convert")
FAMILIES = {
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "mixtral": "MixtralForCausalLM",
    "modernbert": "ModernBertForMaskedLM",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one action on one case."""

    result: str
    said: str
    seconds: float
    bytes: int


def make_bases(root: Path) -> None:
    """Writes an intact folder of each family in a separate process: jax must not be started in this
    process, from which others are forked."""
    child = os.fork()
    if child == 0:
        try:
            _write_bases(root)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit("the good folders could not be written")


def _write_bases(root: Path) -> None:
    from flax.traverse_util import flatten_dict
    from tokenizers import Tokenizer, models, pre_tokenizers

    import flax_transformers as ft
    from flax_transformers.testing import tiny_model

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(91))]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:5])
    side = root / "tokenizer"
    side.mkdir()
    tokenizer.save(str(side / "tokenizer.json"))
    roles = {f"{word.strip('[]').lower()}_token": word for word in words[:5]}
    (side / "tokenizer_config.json").write_text(json.dumps(roles))
    for family, architecture in FAMILIES.items():
        model, params = tiny_model(architecture)
        ft.save_pretrained(root / family, model, params, tokenizer_from=side)
        params = ft.load_pretrained(root / family)[1]
        np.savez(root / f"{family}.npz", **flatten_dict(params, sep="/"))


def try_case(case: Case, action: str, root: Path, scratch: Path) -> Outcome:
    """Runs one action on a changed copy of an intact folder, in a forked process with limits."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    folder = scratch / "folder"
    shutil.copytree(root / case.family, folder)
    case.change(folder)
    receiver, sender = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _in_child(case, action, root, folder, sender)
    os.close(sender)
    ready = select.select([receiver], [], [], SECONDS)[0]
    said = b""
    if ready:
        while part := os.read(receiver, 65536):
            said += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(receiver)
    _, status, usage = os.wait4(child, 0)
    seconds, used = time.monotonic() - begun, usage.ru_maxrss * 1024
    if not ready:
        return Outcome("hang", "", seconds, used)
    result, _, text = said.decode("utf-8", "replace").partition("\n")
    if not result or used > BYTES:
        result, text = ("memory", text) if used > BYTES else ("error", f"ended with {status}")
    return Outcome(result, text, seconds, used)


def _in_child(case: Case, action: str, root: Path, folder: Path, sender: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _drop_capabilities()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        result, text = _judged(case, action, root, folder)
    except MemoryError:
        result, text = "memory", traceback.format_exc(limit=-3)
    except BaseException:
        result, text = "error", traceback.format_exc(limit=-4)
    os.write(sender, f"{result}\n{text[:60_000]}".encode())
    os._exit(0)


def _drop_capabilities() -> None:
    """Drops the capability of root to read every file, so that file permissions apply."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the structures, this process
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective set
        libc.capset(header, sets)


def _judged(case: Case, action: str, root: Path, folder: Path) -> tuple[str, str]:
    from flax_transformers.errors import UserError

    target = folder.parent / "converted"
    try:
        if action == "load_tokenizer":
            _use_tokenizer(folder)
            return "read", ""
        if action == "convert":
            said = _convert(folder, target)
            if said is not None:
                raise UserError(said)
            folder = target
        fault = _fault(case, root, folder)
    except UserError as error:
        if target.exists() and any(target.iterdir()):
            return "error", f"refused, but something was written: {error}"
        lines = str(error).strip().splitlines()
        return ("refused" if len(lines) == 1 and len(lines[0]) < 4000 else "error"), str(error)
    return ("wrong" if fault else "read"), fault


def _use_tokenizer(folder: Path) -> None:
    from flax_transformers.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.encode_batch(["w1 w2 and more"])


def _convert(folder: Path, target: Path) -> str | None:
    """None if it was converted, otherwise the message of the command."""
    from flax_transformers.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["convert", str(folder), str(target)])
    if code == 0:
        return None
    if code != 2:
        raise RuntimeError(f"exit code {code}: {said.getvalue()}")
    lines = [line for line in said.getvalue().splitlines() if line.startswith("flax-transformers:")]
    return lines[-1] if lines else said.getvalue()


def _fault(case: Case, root: Path, folder: Path) -> str:
    """The fault of the model that was read; empty if it is correct."""
    from flax.traverse_util import flatten_dict

    import flax_transformers as ft

    model, params = ft.load_pretrained(folder)
    if not case.readable:
        return "it should have been refused"
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field.name} is {value}"
    expected, found = np.load(root / f"{case.family}.npz"), flatten_dict(params, sep="/")
    if set(expected) != set(found):
        return f"other parameters: {sorted(set(expected) ^ set(found))[:3]}"
    for name, value in found.items():
        if not np.array_equal(expected[name], value):
            return f"{name} differs"
    return ""


def table(results: list[tuple[Case, str, Outcome]]) -> str:
    """Outcomes by kind of change, as a table in Markdown."""
    names = ("read", "refused", "wrong", "error", "hang", "memory")
    rows = [f"| change | folders | {' | '.join(names)} | slowest, s | most memory, MB |"]
    rows.append("|---" * (len(names) + 4) + "|")
    kinds = list(dict.fromkeys(case.kind for case, _, _ in results))
    for kind in [*kinds, "all"]:
        chosen = [each for each in results if kind in (each[0].kind, "all")]
        counts = Counter(outcome.result for _, _, outcome in chosen)
        folders = len({(case.kind, case.name, case.family) for case, _, _ in chosen})
        slowest = max(outcome.seconds for _, _, outcome in chosen)
        most = max(outcome.bytes for _, _, outcome in chosen) // 10**6
        cells = " | ".join(str(counts[name]) for name in names)
        rows.append(f"| {kind} | {folders} | {cells} | {slowest:.1f} | {most} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="only cases whose kind, name or family contains this word"
    )
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=ACTIONS)
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel cases")
    parser.add_argument("--output", help="write the table and every message to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flax_transformers.huggingface.family import all_families

    all_families()
    cases = [c for c in all_cases() if arguments.only in f"{c.kind} {c.name} {c.family}"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        make_bases(root)
        results = _run_all(cases, arguments.actions, root, arguments.jobs)
    bad = [each for each in results if each[2].result not in GOOD]
    print(text := table(results))
    if arguments.output:
        lines = [
            f"{outcome.result:8} {action:16} {case.family:10} {case.kind}: {case.name}: "
            f"{outcome.said[:600]}"
            for case, action, outcome in results
        ]
        Path(arguments.output).write_text(text + "\n\n```\n" + "\n".join(lines) + "\n```\n")
    return 1 if bad else 0


def _run_all(
    cases: list[Case], actions: list[str], root: Path, jobs: int
) -> list[tuple[Case, str, Outcome]]:
    """Runs every action on every case. Several jobs are forked processes with a share of the cases
    each, because threads and forks cannot be combined."""
    if jobs == 1:
        results = []
        for case in cases:
            for action in actions:
                outcome = try_case(case, action, root, root / f"scratch{os.getpid()}")
                results.append((case, action, outcome))
                if outcome.result not in GOOD:
                    print(
                        f"{outcome.result}: {case.kind}: {case.name} ({case.family}), {action}: "
                        f"{outcome.said}",
                        flush=True,
                    )
        return results
    readers = []
    for share in range(jobs):
        receiver, sender = os.pipe()
        if os.fork() == 0:
            os.close(receiver)
            done = _run_all(cases[share::jobs], actions, root, 1)
            with os.fdopen(sender, "w") as pipe:
                json.dump([[o.result, o.said, o.seconds, o.bytes] for _, _, o in done], pipe)
                pipe.flush()
            os._exit(0)
        os.close(sender)
        readers.append(os.fdopen(receiver))
    results: dict[tuple[int, str], tuple[Case, str, Outcome]] = {}
    for share, reader in enumerate(readers):
        outcomes = iter(json.load(reader))
        for number in range(share, len(cases), jobs):
            for action in actions:
                results[number, action] = (cases[number], action, Outcome(*next(outcomes)))
    return [results[number, action] for number in range(len(cases)) for action in actions]


if __name__ == "__main__":
    sys.exit(main())
