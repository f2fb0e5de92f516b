"""Config files, and changes to them on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from flax_transformers.errors import UserError
from flax_transformers.training.config import TrainConfig, to_json


def load_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """``get_config()`` of a Python file, with ``--section.field value`` overrides applied.

    Raises UserError for a missing file, a file without ``get_config``, an unknown field (with the
    nearest name) and a value that does not fit.
    """
    return override(_get_config(Path(path)), overrides)


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
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # a recipe may import its neighbours
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"config file {path} fails with {type(error).__name__}: {said}; mend the file"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() of {path} must return a TrainConfig, not {type(config)}")
    return config


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
    known = _field_names(to_json(config))
    near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.4)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --print-config"
    return f"there is no config field --{name}; {hint}"


def _field_names(value: Any, path: str = "") -> list[str]:
    """Dotted names of all leaves of a JSON config."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key != "type"]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return [path]
    return [n for key, item in items for n in _field_names(item, f"{path}.{key}" if path else key)]
