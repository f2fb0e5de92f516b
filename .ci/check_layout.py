"""Checks of `make lint` that the other linters do not make: cycles, sizes, equal names, and retired
terms.

Run from the root of the repository. Prints the figures, and each violation with its place; exits 1
if there is one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "flax_transformers"

CORE = {  # folders whose code a reader of one training step meets, without some of their subfolders
    "models": ("kernels",),
    "objectives": (),
    "optim": (),
    "training": (),
    "data/pipeline": (),
    "data/store": (),
    "parallel": (),
}
CORE_LINES = 10_000  # of code: without blank lines, comments and docstrings
CORE_TEXT_LINES = 12_500  # with comments and docstrings
FILE_LINES = 700
FUNCTION_LINES = 70
CLASS_DEPTH = 3  # below object, nn.Module, or the dataclass that a hierarchy of configs begins with
FOLDER_FILES = 15
LARGE_FOLDERS = ("families", "objectives")
PROTOCOLS = {  # names that mean the same in each of their modules
    *("from_huggingface", "to_huggingface", "weights", "settle"),  # of a family
    *("layer_weights", "positions", "stack"),  # of several families
    "load_tokenizer",  # the public one frames and pads, too
}

TEXT = {".py", ".md", ".toml", ".sh", ".yml", ".yaml", ""}
# What was renamed, and metaphors: see CHANGELOG.md, which names them, as do the tables of former
# names, and results that were measured before.
RETIRED_EXEMPT = (
    "CHANGELOG.md",
    "benchmarks/results/",
    f"{PACKAGE}/config_json.py",
    ".ci/check_layout.py",
)
RETIRED_TERMS = (
    r"mend(s|ed|ing)?",
    r"\w*to[ _-]beat",
    r"rooms?",
    r"house(s|d)?",
    r"guests?",
    r"strangers?",
    r"doors?",
    r"(?<!np\.)(?<!jnp\.)(?<!math\.)(?<!lax\.)floors?",
    r"wires?",
    r"(go|goes|going) on from",
    r"worked off",
    r"who may look",
)
RETIRED_NAMES = (
    r"WordModel|WritesWords|WithEncoder|WordLoss|word_loss|make_side",
    r"Terms|Shown|Execution|NormPlace|Account|Passage|Finger|Gates|Chip|chip_of|Probes|Ledger",
    r"WeightAverage|PartsTaken|DistanceBias|distance_bias|only_one|one_of_several",
    r"logits_held|norm_place|max_skipped_in_a_row|(max_)?rewinds|SinkCallback",
)
RETIRED_FILES = ("execution", "ledger", "rewinds", "streaks")  # words in names of files


@cache
def tracked(*patterns: str) -> tuple[Path, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(path for path in map(Path, listed.stdout.splitlines()) if path.is_file())


def python_files(folder: str = "") -> list[Path]:
    return [path for path in tracked(f"{folder}*.py") if path.suffix == ".py"]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules() -> dict[str, Path]:
    found = {}
    for path in python_files(f"{PACKAGE}/"):
        parts = path.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports: at the top, in functions, and for types only."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys() or {node.module}
    return found & known.keys()


def cycles() -> Iterator[str]:
    """One cycle of imports between modules, if there is any."""
    known = modules()
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "cycle of imports: " + " <- ".join(error.args[1])


def counted_lines(path: Path) -> tuple[int, int]:
    """Lines of code, and lines that are not blank."""
    docstrings: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = list(enumerate(map(str.strip, path.read_text().split("\n")), 1))
    text = [number for number, line in lines if line]
    code = [
        number
        for number, line in lines
        if line and not line.startswith("#") and number not in docstrings
    ]
    return len(code), len(text)


def core_size() -> Iterator[str]:
    total, total_text = 0, 0
    for folder, without in CORE.items():
        at = Path(PACKAGE, folder)
        files = [
            path
            for path in python_files(f"{at}/")
            if not (set(path.relative_to(at).parts) & set(without))
        ]
        counts = [counted_lines(path) for path in files]
        code, text = (sum(column) for column in zip(*counts, strict=True))
        total, total_text = total + code, total_text + text
        print(f"  {folder:<15}{code:>7,} lines of code, {text:>7,} with docstrings and comments")
    print(f"  {'core':<15}{total:>7,} lines of code, {total_text:>7,} with docstrings and comments")
    if total > CORE_LINES:
        yield f"the core has {total:,} lines of code; at most {CORE_LINES:,}"
    if total_text > CORE_TEXT_LINES:
        yield (
            f"the core has {total_text:,} lines with docstrings and comments; at most "
            f"{CORE_TEXT_LINES:,}"
        )


def sizes() -> Iterator[str]:
    folders: dict[Path, int] = defaultdict(int)
    for path in python_files():
        folders[path.parent] += path.stat().st_size > 0  # not an empty __init__.py
        lines = path.read_text().count("\n")
        if lines > FILE_LINES:
            yield f"{path} has {lines} lines; at most {FILE_LINES}"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield (
                        f"{path}:{node.lineno} {node.name} has {length} lines; at most "
                        f"{FUNCTION_LINES}"
                    )
    for folder, count in folders.items():
        large = folder.parts[0] != PACKAGE or folder.name in LARGE_FOLDERS
        if count > FOLDER_FILES and not large:
            yield f"{folder} has {count} Python files; at most {FOLDER_FILES}"


def class_depths() -> Iterator[str]:
    bases: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    dataclasses: set[str] = set()
    for path in python_files(f"{PACKAGE}/"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                name = node.name if node.name not in bases else f"{node.name} in {path}"
                bases[name] = [
                    ast.unparse(base).split("[")[0].split(".")[-1]
                    for base in node.bases
                    if ast.unparse(base) != "nn.Module"  # there is a Module of ours as well
                ]
                places[name] = f"{path}:{node.lineno}"
                if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                    dataclasses.add(name)

    def depth(name: str) -> int:
        own = [depth(base) for base in bases[name] if base in bases]
        return 1 + max(own) if own else int(name not in dataclasses)

    deepest = 0
    for name, place in places.items():
        found = depth(name)
        deepest = max(deepest, found)
        if found > CLASS_DEPTH:
            yield f"{place} {name} is {found} classes deep; at most {CLASS_DEPTH}"
    print(f"  {len(places)} classes, at most {deepest} deep")


def equal_names() -> Iterator[str]:
    """Public classes and functions of one name in several modules, where a reader cannot tell which
    is meant."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in python_files(f"{PACKAGE}/"):
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(f"{path}:{node.lineno}")
    for name, places in found.items():
        if len(places) > 1 and name not in PROTOCOLS:
            yield f"{name} is defined in {' and '.join(places)}; give them names that differ"


def retired_terms() -> Iterator[str]:
    terms = re.compile(rf"\b({'|'.join(RETIRED_TERMS)})\b", re.IGNORECASE)
    # A name in quotes or before ="..." is one of a table of former names.
    names = re.compile(rf"(?<![\w\"-])({'|'.join(RETIRED_NAMES)})(?![\w-]|=\")")
    files = re.compile(rf"\b({'|'.join(RETIRED_FILES)})\b")
    for path in tracked():
        words = path.stem.replace("_", " ")
        if found := terms.search(words) or names.search(words) or files.search(words):
            yield f"{path} retired term {found.group()!r} in the name of the file"
        if path.suffix not in TEXT or str(path).startswith(RETIRED_EXEMPT):
            continue
        for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
            found = terms.search(line) or names.search(line)
            if found:
                yield f"{path}:{number} retired term {found.group()!r}: {line.strip()[:80]}"


def main() -> int:
    failed = False
    for check in (cycles, core_size, sizes, class_depths, equal_names, retired_terms):
        violations = list(check())
        failed |= bool(violations)
        for violation in violations:
            print(f"  {violation}")
        print(f"{check.__name__.replace('_', ' ')}: {len(violations) or 'no'} violations")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
