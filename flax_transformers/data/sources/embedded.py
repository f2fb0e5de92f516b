"""Text that is part of every CPython: help topics and docstrings of the standard library.

About 2 MB of technical English for a first run without a download. The source files are parsed, not
imported. The text, and so its fingerprint, differs between Python versions.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from flax_transformers.errors import UserError

MIN_CHARACTERS = 40  # minimum length of a docstring
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "__pycache__"),
    *("ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}


def documents() -> Iterator[str]:
    """Help topics by name, then docstrings by file and line; exact duplicates once.

    Raises UserError if Python has no sources of its standard library.
    """
    return iter(_documents(Path(os.__file__).parent))


@functools.lru_cache(
    maxsize=1
)  # parsing takes seconds, and is needed for the fingerprint and to read
def _documents(library: Path) -> tuple[str, ...]:
    found = dict.fromkeys(_topics(library / "pydoc_data" / "topics.py"))
    for path in _sources(library):
        found.update(dict.fromkeys(_docstrings(path)))
    if not found:
        raise UserError(
            f"This Python has no standard library sources in {library}, so there is no embedded "
            "text; give a path to your own text."
        )
    return tuple(found)


def _topics(path: Path) -> Iterator[str]:
    """The values of the one dictionary literal in pydoc_data/topics.py, by topic name."""
    tree = _parsed(path)
    literals = (node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    for literal in literals:
        if isinstance(literal, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(literal)
            yield from (inspect.cleandoc(text) for _, text in sorted(topics.items()))


def _sources(library: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(library):
        names[:] = sorted(name for name in names if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, nested ones included, in order."""
    pending: list[ast.AST] = [_parsed(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) >= MIN_CHARACTERS:
                yield text
        statements = (getattr(node, name, ()) for name in ("body", "handlers", "orelse"))
        children = [child for group in statements if isinstance(group, list) for child in group]
        pending.extend(reversed(children))


def _parsed(path: Path) -> ast.Module:
    """The file's syntax tree; empty if the file is missing or invalid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])
