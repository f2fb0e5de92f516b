"""Config files: loading them, and reading the config of a run."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flax_transformers import config_json
from flax_transformers.cli.parsing import override, without_section
from flax_transformers.errors import UserError

if TYPE_CHECKING:  # slow to import, and not needed to refuse a file that does not exist
    from flax_transformers.sweeps.study import Study
    from flax_transformers.training.config import TrainConfig

log = logging.getLogger(__name__)


def load_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """``get_config()`` of a Python file, with ``--section.field value`` overrides applied.

    ``path``: the file, or the name of a recipe such as "bert_tiny". Raises UserError for a missing
    file, a file without ``get_config``, an unknown field (with the nearest name), and a value that
    does not fit.
    """
    file = _config_path(path)
    config = _result(file, _imported(file), "get_config")
    return override(_checked(config, file), overrides)


def load_study(path: str, overrides: Sequence[str] = ()) -> Study:
    """``get_study()`` of a Python file, with ``overrides`` applied to its base config.

    A config file, or the name of a recipe, is a study of one variant. Raises UserError as
    `load_config` does.
    """
    from flax_transformers.sweeps.study import Study

    file = _config_path(path)
    module = _imported(file)
    if not hasattr(module, "get_study"):
        config = _checked(_result(file, module, "get_config"), file)
        return Study(base=override(config, overrides))
    study = _result(file, module, "get_study")
    if not isinstance(study, Study):
        raise UserError(f"get_study() of {file} must return a Study, not {type(study)}")
    config_json.register_types_of(study.base)
    return replace(study, base=override(study.base, overrides))


@contextlib.contextmanager
def naming_options(config: TrainConfig) -> Iterator[None]:
    """Errors about a path of ``config`` that does not exist say which option sets it."""
    try:
        yield
    except UserError as error:
        said = str(error)
        for name, path in missing_paths(config):
            named = re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w/-])", said)
            if named and f"--{name}" not in said:
                options = f"the option is --{name}"
                section = name.rpartition(".")[0]
                # An entry of a list may be one that the config needs.
                is_entry = section.rpartition(".")[2].isdecimal()
                if not is_entry and without_section(config, section.replace("-", "_").split(".")):
                    options += f"; without it: --{section} None"
                error.args = (f"{said.removesuffix('.')} ({options})",)
                break
        raise


def missing_paths(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Option and value of each local path in a config that does not exist from here."""
    if isinstance(value, str):
        is_local = value and "://" not in value and not value.startswith("tfds:")
        if (
            name.endswith(("path", "store"))
            and is_local
            and not os.path.exists(os.path.expanduser(value))
        ):
            yield name.replace("_", "-"), value
        return
    items: list[tuple[str, Any]] = []
    if isinstance(value, tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    for key, item in items:
        yield from missing_paths(item, f"{name}.{key}" if name else key)


def recipe(name: str) -> TrainConfig:
    """The config of one of this package's recipes, "bert_tiny", or of a config file.

    Raises UserError, with near names, for one that does not exist.
    """
    return load_config(name)


def recipes() -> dict[str, Path]:
    """The files of this package's recipes by name: in the wheel, or in the repository."""
    return {file.stem: file for file in sorted(_recipe_folder().glob("*.py"))}


def _recipe_folder() -> Path:
    package = Path(__file__).parents[1]
    return next(filter(Path.is_dir, (package / "configs", package.parent / "configs")))


def _config_path(name: str) -> Path:
    """The file that is meant by the path of one, or by the name of a recipe."""
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".py" or len(path.parts) != 1:
        return path
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
    raise UserError(f"there is no recipe {name}, and no config file of that name; {hint}")


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is no regular file; give the path of a config file")
        others = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), others, 1, 0.3)
        if path.stem in recipes():  # the guides name files of a clone of the repository
            hint = f"for the recipe of the package give its name, {path.stem}"
        elif (path / "config.json").is_file():
            hint = f"to resume the run in this folder give --workdir {path} alone"
        else:
            hint = f"did you mean {near[0]}?" if near else "give the path of a config file"
        raise UserError(f"there is no config file {path}; {hint}")
    return _import_file(path)


def _result(path: Path, module: ModuleType, function: str) -> Any:
    """What the file's ``get_config`` or ``get_study`` returns."""
    if not hasattr(module, function):
        kind = "TrainConfig" if function == "get_config" else "Study"
        raise UserError(f"{path} has no function {function}(); define one that returns a {kind}")
    try:
        with _running(path):
            return getattr(module, function)()
    except UserError:
        sys.modules.pop(module.__name__, None)  # other configs need not heed its classes
        raise


def _checked(config: Any, path: Path) -> TrainConfig:
    """A config that a file returned; its types are registered."""
    from flax_transformers.training.config import TrainConfig

    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() of {path} must return a TrainConfig, not {type(config)}")
    config_json.register_types_of(config)
    return config


_folders: dict[str, str] = {}
"""The folders of config files that are at the end of ``sys.path``, by module name."""


def _import_file(path: Path) -> ModuleType:
    """Import a config file under its own name, so that data workers can import its classes.

    Its folder is first on ``sys.path`` during the import, as for ``python FILE``, and stays at the
    end, so that workers can also import neighbouring modules. A recipe of this package leaves its
    name to a config file that has it too and is derived from it. Raises UserError for a file that
    fails, and for one that defines classes but has the name of another module, be it a neighbour of
    a config file that is imported later.
    """
    folder, name = str(path.parent.resolve()), path.stem
    is_recipe = _is_recipe_folder(folder)
    if name in _folders and not (is_recipe and _folders[name] != folder):
        # This file, or another of the same name.
        sys.modules.pop(name, None)
        with contextlib.suppress(ValueError):
            sys.path.remove(_folders.pop(name))
    _drop_namesakes(folder)
    if is_added := folder not in sys.path or folder in _folders.values():
        # Before those of earlier files, whose modules may have the same names; recipes come last.
        added = [p for p in sys.path if p != folder and p in _folders.values()]
        added.insert(len(added) if is_recipe else 0, folder)
        sys.path[:] = [p for p in sys.path if p not in added] + added
    taken = "." in name or _is_another_module(name, path)
    name = f"config_{name}" if taken else name
    if is_added:
        _folders[name] = folder
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    sys.path.insert(0, folder)
    try:
        with _running(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    own = _own_classes(module)
    if taken and own:
        raise UserError(
            f"config file {path} defines the class {own[0].__name__}, which data workers import by "
            f"the file's name, and {path.stem!r} cannot be imported or is another module's name; "
            "rename the file"
        )
    _register_types_in(module)
    return module


def _own_classes(module: ModuleType) -> list[type]:
    """The classes that a module defines."""
    values = vars(module).values()
    return [v for v in values if isinstance(v, type) and v.__module__ == module.__name__]


def _drop_namesakes(folder: str) -> None:
    """Forgets modules from the folders of other config files that are in this folder too.

    For the folder of the recipes: only those that recipes import from there. A config file among
    them that defines classes is kept, because its classes are looked up there; raises UserError if
    this folder imports its own module of that name.
    """
    others = set(_folders.values()) - {folder}
    known = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    namesakes = []
    for name in known:
        top = name.partition(".")[0]
        file = Path(known.get(top) or "")
        within = file.parents[1] if file.name == "__init__.py" else file.parent
        here = (Path(folder, f"{top}.py"), Path(folder, top, "__init__.py"))
        if str(within) not in others or not any(map(Path.is_file, here)):
            continue
        if not _is_recipe_folder(folder) or _is_imported_in(folder, top):
            namesakes.append(name)
    classes = {name: _own_classes(sys.modules[name]) for name in namesakes if name in _folders}
    kept = {name for name, own in classes.items() if own}
    for name in kept:
        if _is_imported_in(folder, name):
            raise UserError(
                f"config file {known[name]} defines the class {classes[name][0].__name__}, which "
                f"data workers import by the file's name, and {folder} has a module {name!r} too; "
                "rename the file"
            )
    for name in set(namesakes) - kept:
        del sys.modules[name]


def _is_recipe_folder(folder: str) -> bool:
    return folder == str(_recipe_folder().resolve())


def _is_imported_in(folder: str, name: str) -> bool:
    line = re.compile(rf"^\s*(?:from|import)\s+{re.escape(name)}\b", re.MULTILINE)
    files = Path(folder).glob("*.py")
    return any(line.search(file.read_text(errors="replace")) for file in files)


def _is_another_module(name: str, path: Path) -> bool:
    """Whether ``import name`` would import something other than this file."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # __main__ and the like
        return True
    if spec is None:
        return False
    return spec.origin is None or Path(spec.origin).resolve() != path.resolve()


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """Turns errors of a config file into a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _failing(path, error) from error


def _failing(path: Path, error: BaseException) -> UserError:
    said = " ".join(str(error).split())
    names = (str(path), str(path.resolve()))
    frames = traceback.walk_tb(error.__traceback__)
    lines = [at for frame, at in frames if frame.f_code.co_filename in names]
    where = f", line {lines[-1]}," if lines else ""
    renamed = [
        f"{former} is called {current} now; "
        for former, current in config_json.FORMER_FIELDS.items()
        if isinstance(error, TypeError) and f"'{former}'" in said
    ]
    hint = "".join(renamed) or _nearest_field(said)
    return UserError(
        f"config file {path}{where} fails with {type(error).__name__}: {said}; {hint}"
        "correct the file"
    )


def _nearest_field(said: str) -> str:
    """For a misspelt field of a dataclass, by Python's message: the field with the nearest name."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", said)
    if found is None or "Did you mean" in said:
        return ""
    kinds = (getattr(module, "__dict__", {}).get(found[1]) for module in [*sys.modules.values()])
    known = {
        field.name
        for kind in kinds
        if isinstance(kind, type) and kind.__name__ == found[1] and is_dataclass(kind)
        for field in fields(kind)
    }
    near = difflib.get_close_matches(found[2], known, 1, 0.5)
    return f"did you mean {near[0]}? " if near else ""


def type_in_current_folder(type_id: str) -> type | None:
    """A user's own dataclass, by its id in saved configs, for `config_json.types_found_by`.

    It is imported from a file of the current folder that has the name of its module and defines it,
    as by ``python -m``, with all other dataclasses of that file. None if there is no such file.
    Raises UnregisteredType for a file that does not define it, and UserError for one that fails.
    """
    module, _, name = type_id.partition(":")
    file = Path(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return None
    kind = None
    if _defines(file, name):
        log.info("importing %s, which defines %s", file, name)
        kind = getattr(_imported_from_folder(file, module), name, None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise config_json.UnregisteredType(
            type_id, f"define the dataclass {name} in {file}, where it is not"
        )
    return kind


def _defines(file: Path, name: str) -> bool:
    """Whether a file has a top-level class or import of that name. Does not run the file."""
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


def _imported_from_folder(file: Path, name: str) -> ModuleType:
    module = sys.modules.get(name)
    if module is None or Path(module.__file__ or "").resolve() != file.resolve():
        if len(file.parts) == 1:
            return _import_file(file)
        sys.path.insert(0, os.getcwd())
        try:
            with _running(file):
                module = importlib.import_module(name)
        finally:
            sys.path.remove(os.getcwd())
    _register_types_in(module)
    return module


def _register_types_in(module: ModuleType) -> None:
    """Registers the dataclasses that a module defines, so that no second import makes others."""
    for kind in filter(is_dataclass, _own_classes(module)):
        config_json.register(kind)
