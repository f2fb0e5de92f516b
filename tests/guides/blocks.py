"""The code blocks of the guides, and how each is run in a folder of its own, in small sizes.

A block runs unless the line before it says why not: ``<!-- not run: needs a cluster -->``.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from flax_transformers.cli.config_file import load_config, recipes
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.problems import Problems

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = "flax-transformers"
LONGEST = 384
"""Tokens of a sequence; the stand-ins of published models take 512."""
WIDEST = 256
SMALL_MODEL = {
    "hidden-size": 64,
    "num-layers": 2,
    "num-heads": 4,
    "num-key-value-heads": 4,
    "intermediate-size": 128,
}
VOCABULARY = "400"
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``reason``: why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order. Output has no language, and is none."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("code")), found["language"], found["code"],
              found["reason"])
        for found in _BLOCK.finditer(text)
        if found["language"]
    ]  # fmt: skip


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, without variables set before it."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words[words[0].startswith("JAX_NUM_CPU_DEVICES=") :] for words in commands if words]


def in_small(arguments: list[str]) -> list[str]:
    """The arguments of a command with few steps, few examples, and data that are there."""
    command, *rest = arguments
    places = [n for n, word in enumerate(rest) if _is_config(word)]
    if command not in ("train", "prepare", "inspect", "plan", "sweep") or not places:
        return arguments
    if command == "sweep":
        return [command, *_few_runs(rest)]
    if {"--help", "--print-config"} & set(rest):
        return arguments
    config = load_config(rest[places[0]])
    options = _run_options(config) if command in ("train", "plan") else {}
    if "--profile" in rest:
        options["--phases.0.steps"] = "16"
    wide = command in ("train", "plan") and config.model.hidden_size > WIDEST
    if wide and "--init-from" not in rest:
        fields = {name.replace("-", "_") for name in SMALL_MODEL}
        known = {field.replace("_", "-") for field in fields & set(vars(config.model))}
        options |= {f"--model.{name}": str(SMALL_MODEL[name]) for name in known}
    options |= _data_options(config, rest, command == "train")
    return [command, *_without(rest, options), *(w for item in options.items() for w in item)]


def _is_config(word: str) -> bool:
    return word in recipes() or (word.endswith(".py") and Path(word).is_file())


def _run_options(config) -> dict[str, str]:
    options = {"--optimizer.schedule.warmup-steps": "0", "--evaluation.max-examples": "8"}
    if config.optimizer.schedule.kind == "wsd":
        options["--optimizer.schedule.decay-steps"] = "1"
    for number, phase in enumerate(config.phases):
        options[f"--phases.{number}.steps"] = "2"
        options[f"--phases.{number}.batch-size"] = "16"
        if "sequence_length" in vars(phase):
            length = min(phase.sequence_length, LONGEST)
            options[f"--phases.{number}.sequence-length"] = str(length)
    return options | {"--evaluation.batch-size": "16"}


def _data_options(config, given: list[str], whole: bool) -> dict[str, str]:
    data, options = config.data, {}
    if isinstance(data, Problems | ChatData | SignalData):  # they make their data
        return options
    if not isinstance(data, ImageData):
        options["--data.prepare-processes"] = "1"
        if whole:
            options["--data.shards"] = "1"
        path = data.source.path
        there = path.startswith("data/") or Path(path).is_file()
        if "--data.source.path" not in given and not there:
            options["--data.source.path"] = "my_text"
            if path == "tfds:glue/mnli":
                options["--data.source.path"] = "pairs.jsonl"
                options["--data.validation-source.path"] = "pairs.jsonl"
        if data.validation_source is None:
            options["--data.validation-fraction"] = "0.2"
        if "--data.tokenizer.path" not in given and data.tokenizer.kind != "bytes":
            options["--data.tokenizer.vocab-size"] = VOCABULARY
            options["--model.vocab-size"] = VOCABULARY
    return options


def _few_runs(rest: list[str]) -> list[str]:
    """The arguments of a sweep with one seed, one step and the smallest values of its grid."""
    grid = [word.split(",")[0] if "=" in word else word for word in rest]
    grid = [re.sub(r"^(phases\.0\.steps)=.*", r"\1=1,2", word) for word in grid]
    few = _without(grid, {"--seeds": ""})
    base = {"--phases.0.batch-size": "8", "--optimizer.schedule.warmup-steps": "0"}
    base |= {"--data.source.path": "my_text", "--data.tokenizer.vocab-size": VOCABULARY}
    base |= {"--model.vocab-size": VOCABULARY, "--data.validation-fraction": "0.2"}
    return [*few, "--seeds", "1", *(word for item in base.items() for word in item)]


def _without(words: list[str], options) -> list[str]:
    """The words without ``options`` and their values."""
    kept, leaving = [], False
    for word in words:
        if word.startswith("--"):
            leaving = word in options
        elif leaving and not word.endswith(".py"):
            continue
        if not leaving:
            kept.append(word)
    return kept
