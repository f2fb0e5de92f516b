"""Config files, and changes to them on the command line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import logging
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import tyro

import flax_transformers
from flax_transformers.checkpointing.step_directories import Found
from flax_transformers.config_json import (
    UnregisteredType,
    register,
    register_types_of,
)
from flax_transformers.errors import UserError
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.restore import saved_config

log = logging.getLogger(__name__)


def load_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """``get_config()`` of a Python file, with ``--section.field value`` overrides applied.

    ``path``: the file, or the name of a recipe such as "bert_tiny". Raises UserError for a missing
    file, a file without ``get_config``, an unknown field (with the
    nearest name) and a value that does not fit.
    """
    return override(_get_config(_config_path(path)), overrides)


def recipe(name: str) -> TrainConfig:
    """The config of one of this package's recipes, "bert_tiny", or of a config file.

    Raises UserError, with near names, for one that does not exist.
    """
    return load_config(name)


def recipes() -> dict[str, Path]:
    """The files of this package's recipes by name: in the wheel, or in the repository."""
    package = Path(flax_transformers.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return {file.stem: file for file in sorted(next(filter(Path.is_dir, folders)).glob("*.py"))}


def _config_path(name: str) -> Path:
    """The file that is meant by the path of one, or by the name of a recipe."""
    path = Path(name)
    if path.is_file() or path.suffix == ".py" or len(path.parts) != 1:
        return path
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
    raise UserError(f"there is no recipe {name}, and no config file of that name; {hint}")


def refuse(overrides: Sequence[str]) -> None:
    """For commands that take no config fields: raises UserError if there are any arguments left."""
    if overrides:
        raise UserError(f"unexpected argument {overrides[0]!r}; see --help")


def _get_config(path: Path) -> TrainConfig:
    if not path.is_file():
        others = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), others, 1, 0.3)
        hint = f"did you mean {near[0]}?" if near else "give the path of a config file"
        raise UserError(f"there is no config file {path}; {hint}")
    module = _import_file(path)
    try:
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _failing(path, error) from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() of {path} must return a TrainConfig, not {type(config)}")
    register_types_of(config)
    return config


_folders: dict[str, str] = {}
"""Folders that config files have put at the end of ``sys.path``, by the file's module."""


def _import_file(path: Path) -> ModuleType:
    """The module of a config file, under the file's name, so that data workers find its classes.

    Its folder comes first on ``sys.path`` while it is loaded, as for ``python FILE``, and stays at
    the end: a neighbour that the file imports must be found by the workers too. Raises UserError
    for a file that fails, and for one with classes of its own under the name of another module.
    """
    folder, name = str(path.parent.resolve()), path.stem
    if name in _folders:  # this file, or another of the same name
        sys.modules.pop(name, None)
        with contextlib.suppress(ValueError):
            sys.path.remove(_folders.pop(name))
    taken = "." in name or _is_another_module(name, path)
    name = f"config_{name}" if taken else name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _failing(path, error) from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
            _folders[name] = folder
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
    if taken and own:
        raise UserError(
            f"config file {path} defines the class {own[0].__name__}, which data workers import by "
            f"the file's name, and {path.stem!r} cannot be imported or is another module's name; "
            "rename the file"
        )
    return module


def _is_another_module(name: str, path: Path) -> bool:
    """Whether ``import name`` gives something else than this file."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # __main__ and the like
        return True
    if spec is None:
        return False
    return spec.origin is None or Path(spec.origin).resolve() != path.resolve()


def _failing(path: Path, error: BaseException) -> UserError:
    said = " ".join(str(error).split())
    return UserError(
        f"config file {path} fails with {type(error).__name__}: {said}; correct the file"
    )


def config_of_run(found: Found) -> TrainConfig | None:
    """The config of the run that saved a checkpoint; None for weights that were converted.

    A type of the user's own is looked for in the current folder, as by ``python -m``: a file there
    with the name of its module is the user's program, whatever the checkpoint says. Raises
    UnregisteredType where there is no such file.
    """
    looked_for: set[str] = set()
    while True:
        try:
            return saved_config(found)
        except UnregisteredType as missing:
            module = missing.type_id.partition(":")[0]
            file = Path(*module.split(".")).with_suffix(".py")
            name = missing.type_id.partition(":")[2]
            if module in looked_for or not file.is_file() or not _defines(file, name):
                raise
            looked_for.add(module)
            log.info("reading %s of this folder, which the run used", file)
            _register_from(file, missing.type_id)


def _defines(file: Path, name: str) -> bool:
    """Whether a file has a class or an import of that name at its top level; does not run it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Import | ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in node.names
        ):
            return True
    return False


def _register_from(file: Path, type_id: str) -> None:
    module, _, name = type_id.partition(":")
    if len(file.parts) == 1:
        kind = getattr(_import_file(file), name, None)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except Exception as error:
            raise _failing(file, error) from error
        finally:
            sys.path.remove(os.getcwd())
    if kind is not None:
        register(kind)


ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """``config``, a dataclass of dataclasses, with ``--section.field value`` pairs applied.

    Raises UserError as above.
    """
    if not overrides:
        return config
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            parsed: Any
            parsed, unknown = tyro.cli(
                _concrete_type(config),
                args=list(overrides),
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
            values = {f.name: getattr(parsed, f.name) for f in _fields(config)}
            changed = type(config)(**values)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            sys.stdout.write(printed.getvalue())
            raise
        raise UserError(_first_sentence(printed.getvalue())) from None
    except ValueError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(_unknown_field(unknown[0], config))
    return changed


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)


def _concrete_type(config: Any) -> type:
    """The config's type with every field typed as what ``config`` has there, and defaulting to it.

    Which model, objective and optimizer there is was chosen in the file; the command line then
    knows exactly their fields.
    """
    hints = typing.get_type_hints(type(config))
    fields = []
    for field in _fields(config):
        value = getattr(config, field.name)
        kind = type(value) if dataclasses.is_dataclass(value) else hints[field.name]
        fields.append((field.name, kind, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(type(config).__name__, fields, frozen=True)


def _first_sentence(panel: str) -> str:
    """What tyro's panel says: the lines between its title and the rule that follows."""
    lines = [line.strip(" │╭╮╰╯") for line in panel.splitlines()][1:]
    if lines and not lines[0].strip("-─"):
        del lines[0]
    rules = [i for i, line in enumerate(lines) if not line.strip("-─")]
    text = " ".join(lines[: rules[0]] if rules else lines)
    return text or "the command line does not fit the config; see --help"


def _unknown_field(argument: str, config: Any) -> str:
    name = argument.split("=")[0].lstrip("-")
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; a config field is set as --section.field value"
    known = _field_names(config)
    near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.4)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --print-config"
    return f"there is no config field --{name}; {hint}"


def _field_names(value: Any, path: str = "") -> list[str]:
    """Dotted names of all fields that are no dataclasses themselves."""
    items: list[tuple[str, Any]]
    if dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in _fields(value)]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return [path]
    return [n for key, item in items for n in _field_names(item, f"{path}.{key}" if path else key)]
