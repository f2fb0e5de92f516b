"""Config files of the user's own: their classes, their neighbours, and what reads them later."""

from __future__ import annotations

import dataclasses
import enum
import importlib.machinery
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from flax_transformers import config_json
from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli import config_file
from flax_transformers.cli.config_file import load_config, missing_paths, type_in_current_folder
from flax_transformers.cli.main import main
from flax_transformers.config_json import (
    UnregisteredType,
    from_json,
    register,
    to_json,
    types_found_by,
)
from flax_transformers.errors import UserError
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.restore import saved_config
from flax_transformers.testing import tiny_bert, tiny_config, write_corpus
from flax_transformers.training.config import check_resumable

OWN = """
from dataclasses import dataclass
from flax_transformers.objectives.masked_lm import MaskedLM

@dataclass(frozen=True)
class Mine(MaskedLM):
    strength: float = 0.5
"""

CHECKED_ALONE = f"""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from collections.abc import Mapping
{OWN}
    names: 'Mapping[str, str] | None' = None
"""

CONFIG = """
import dataclasses
from flax_transformers import restore
from flax_transformers.testing import tiny_config
{imports}

def get_config():
    config = tiny_config({corpus!r}, {store!r}, steps=2, objective=Mine())
    return dataclasses.replace(
        config, checkpoints=dataclasses.replace(config.checkpoints, every_steps=2)
    )
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a config file leaves in this process is taken back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(config_json, "_registered", {})
    monkeypatch.setattr(config_file, "_folders", dict(config_file._folders))
    before = {name: module for name, module in sys.modules.items() if "." not in name}
    yield
    for name in [name for name in sys.modules if "." not in name]:
        if name not in before:
            del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def write(tmp_path):
    """Writes files of a user's folder, whose config trains on a corpus beside it."""
    write_corpus(tmp_path / "text.txt")
    places = {"corpus": str(tmp_path / "text.txt"), "store": str(tmp_path / "store")}

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    write.config = lambda imports: CONFIG.format(imports=imports, **places)
    return write


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_a_class_of_the_file_takes_options_of_the_command_line(write, future):
    path = write("mine_in_file.py", future + write.config(OWN))
    config = load_config(path, ["--objective.strength", "0.25", "--objective.mask-fraction", "0.3"])
    assert (config.objective.strength, config.objective.mask_fraction) == (0.25, 0.3)


def test_an_annotation_that_is_imported_for_type_checkers_alone_is_named(write, capsys):
    path = write("checked_alone.py", write.config(CHECKED_ALONE))
    assert load_config(path).objective.names is None
    for arguments in (["--seed", "3"], ["--objective", "None"], ["--help"]):
        assert main(["train", path, "--workdir", "unused", *arguments]) == 2
        error = capsys.readouterr().err
        assert "of Mine in module checked_alone cannot be evaluated (name 'Mapping' is" in error
        assert "import what they name outside of `if TYPE_CHECKING:`" in error


def test_types_of_a_config_file_read_back_from_json(write):
    write("neighbour_of_mine.py", OWN)
    for name, imports in (
        ("first_of_mine", OWN),
        ("second_of_mine", "from neighbour_of_mine import Mine"),
    ):
        config = load_config(write(f"{name}.py", write.config(imports)))
        saved = json.loads(json.dumps(to_json(config)))
        module = "neighbour_of_mine" if name.startswith("second") else name
        assert saved["objective"]["type"] == f"{module}:Mine"
        assert from_json(saved) == config


def test_another_process_imports_the_classes_of_a_config_file(write):
    write("neighbour_of_mine.py", OWN)
    sent = []
    for name, imports in (
        ("first_of_mine", OWN),
        ("second_of_mine", "from neighbour_of_mine import Mine"),
    ):
        sent.append(load_config(write(f"{name}.py", write.config(imports))).objective)
    program = (
        "import pickle, sys\n"
        "sys.path = pickle.load(sys.stdin.buffer)\n"
        "print(pickle.load(sys.stdin.buffer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(sys.path) + pickle.dumps([own.strength for own in sent] + sent),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("[0.5, 0.5, Mine(")


@pytest.mark.parametrize("name", ["json.py", "pytest.py", "a.b.py", "sys.py"])
def test_a_config_named_as_another_module_works_until_workers_would_import_from_it(write, name):
    plain = write.config("from flax_transformers.objectives.masked_lm import MaskedLM as Mine")
    assert load_config(write(name, plain)).objective.mask_fraction == 0.15
    assert json is sys.modules["json"]
    with pytest.raises(UserError, match="defines the class Mine.*rename the file"):
        load_config(write(name, write.config(OWN)))


def test_two_configs_of_one_name_are_told_apart(write):
    first = load_config(write("one/mine_twice.py", write.config(OWN)))
    second = load_config(write("two/mine_twice.py", write.config(OWN.replace("0.5", "0.75"))))
    assert (first.objective.strength, second.objective.strength) == (0.5, 0.75)
    assert pickle.loads(pickle.dumps(second.objective)) == second.objective


@pytest.mark.parametrize("neighbour", ["neighbour_twice.py", "neighbour_twice/__init__.py"])
def test_neighbours_of_one_name_are_told_apart(write, tmp_path, neighbour):
    for folder, strength in (("one", "0.5"), ("two", "0.75"), ("one", "0.5")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(f"{folder}/{neighbour}", OWN.replace("0.5", strength))
        config = write.config("from neighbour_twice import Mine")
        mine = load_config(write(f"{folder}/config_of_{folder}.py", config)).objective
        assert mine.strength == float(strength)
        assert pickle.loads(pickle.dumps(mine)) == mine
        worker_imports = importlib.machinery.PathFinder.find_spec("neighbour_twice")
        assert worker_imports.origin == str(tmp_path / folder / neighbour)


def test_a_config_whose_classes_have_the_name_of_a_neighbour_of_another_is_kept(write):
    first = load_config(write("one/base_twice.py", write.config(OWN))).objective
    write("two/base_twice.py", OWN)
    with pytest.raises(UserError, match=r"one/base_twice\.py defines the class Mine.*rename the"):
        load_config(write("two/tuned.py", write.config("from base_twice import Mine")))
    write("three/base_twice.py", OWN)  # not imported
    load_config(write("three/tuned_alone.py", write.config(OWN)))
    assert pickle.loads(pickle.dumps(first)) == first


DERIVED = """
from __future__ import annotations
from dataclasses import replace
import flax_transformers as ft
{first}
{imports}

def get_config():
    return replace(ft.recipe({recipe!r}), objective=Mine())
"""


@pytest.mark.parametrize(
    ("file", "first", "imports", "recipe"),
    [
        ("bert_tiny.py", "", OWN, "bert_tiny"),
        ("bert_tiny.py", "ft.recipe('bert_tiny')", OWN, "bert_tiny"),
        ("tuned.py", "", "from bert_tiny import Mine", "bert_large"),
    ],
    ids=["of_its_name", "while_it_is_imported", "with_such_a_neighbour"],
)
def test_a_config_derived_from_a_recipe_keeps_classes_in_a_file_of_a_recipe_s_name(
    write, file, first, imports, recipe
):
    write("own/bert_tiny.py", OWN)
    path = write(f"own/{file}", DERIVED.format(first=first, imports=imports, recipe=recipe))
    for _ in range(2):
        config = load_config(path, ["--seed", "3", "--objective.strength", "0.25"])
        assert (config.seed, config.objective.strength) == (3, 0.25)
        assert pickle.loads(pickle.dumps(config)) == config
        assert from_json(to_json(config)) == config
        worker_imports = importlib.machinery.PathFinder.find_spec("bert_tiny")
        assert worker_imports.origin == str(Path(path).parent / "bert_tiny.py")


def test_a_config_with_classes_whose_name_other_recipes_import_is_refused(write):
    derived = DERIVED.format(first="", imports=OWN, recipe="bert_large")
    with pytest.raises(UserError, match=r"own/bert_base\.py defines the class Mine.*rename the"):
        load_config(write("own/bert_base.py", derived))
    assert load_config("bert_large").model.num_layers == 24


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    value: int = 1


def test_a_registered_type_reads_back_and_one_that_is_not_is_named():
    saved = to_json(Elsewhere(3))
    with pytest.raises(UnregisteredType, match=f"uses Elsewhere of the module {__name__}"):
        from_json(saved)
    assert register(Elsewhere) is Elsewhere
    assert from_json(saved) == Elsewhere(3)
    with pytest.raises(UserError, match="cannot be registered; give a dataclass"):
        register(print)


@dataclasses.dataclass(frozen=True)
class Keeping:
    kept: object = None
    derived: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        object.__setattr__(self, "derived", 7)


@pytest.mark.parametrize(
    "kept", [{"a": 0.5, "type": (1, None)}, {"inner": {"own": Elsewhere(3)}}, {}, (True, "x")]
)
def test_values_of_a_user_s_dataclass_read_back(kept):
    config_json.register_types_of(Keeping(kept))
    saved = json.loads(json.dumps(to_json(Keeping(kept))))
    assert saved.keys() == {"type", "kept"}
    assert from_json(saved) == Keeping(kept)
    assert from_json(saved | {"derived": 0}) == Keeping(kept)  # as older versions saved it


@dataclasses.dataclass(frozen=True)
class WithDict(MaskedLM):
    weights: dict = dataclasses.field(default_factory=dict)


def test_runs_whose_dicts_were_saved_without_a_type_are_resumed():
    weights = {"format": 0.5, "inner": ({"x": None},)}
    config = tiny_config("text.txt", "store", objective=WithDict(weights=weights))
    config_json.register_types_of(config)
    saved = to_json(config)
    saved["objective"]["weights"] = json.loads(json.dumps(weights))
    assert from_json(saved) == config
    assert check_resumable(saved, config, "here") == []


@pytest.mark.parametrize(
    "value",
    [enum.Enum("Mode", "A").A, Path("x"), np.dtype("int8"), print, {1: 2}, {"x"}, Elsewhere],
)
def test_a_value_that_cannot_be_saved_is_refused_by_its_field(value):
    with pytest.raises(UserError, match=r"^objective\.kept\.inner\.1 is .*, which cannot be saved"):
        config_json.register_types_of(Keeping({"inner": (0, value)}), "objective")


PROGRAM = """
import dataclasses
from flax_transformers.config_json import from_json, register, to_json

@dataclasses.dataclass(frozen=True)
class Mine:
    value: int = 1

if __name__ == "__main__":
    register(Mine)
    print(to_json(Mine())["type"], from_json({"type": "train:Mine", "value": 2}))
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_class_of_a_program_of_a_package_is_named_as_others_import_it(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "pkg.train"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "pkg.train:Mine Mine(value=2)\n", done.stderr


def _namesake(module):
    """A dataclass ``Elsewhere`` of another module."""
    kind = dataclasses.make_dataclass("Elsewhere", ["value"])
    kind.__module__ = module  # Python 3.12 ignores __module__ in the namespace
    return kind


@pytest.mark.parametrize("module", ["__main__", __name__.rpartition(".")[2]])
def test_a_class_of_a_notebook_or_without_its_package_reads_back_if_one_is_registered(module):
    saved = {"type": f"{module}:Elsewhere", "value": 3}
    with pytest.raises(UnregisteredType):
        from_json(saved)
    register(Elsewhere)
    assert from_json(saved) == Elsewhere(3)
    register(_namesake(f"another.{module}"))
    with pytest.raises(UnregisteredType):
        from_json(saved)


def test_a_class_saved_with_a_package_reads_back_in_a_program_without_it():
    saved = {"type": f"pkg.{__name__}:Elsewhere", "value": 3}
    register(_namesake("other"))
    with pytest.raises(UnregisteredType):
        from_json(saved)
    register(Elsewhere)
    assert from_json(saved) == Elsewhere(3)


def test_a_type_that_format_1_named_with_a_dot_reads_back_when_it_is_registered():
    saved = {"type": f"{__name__}.Elsewhere", "value": 3}
    with pytest.raises(UserError, match="cannot read"):
        from_json(saved)
    register(Elsewhere)
    assert from_json(saved) == Elsewhere(3)


def test_a_saved_value_that_is_refused_now_is_named_by_its_field():
    saved = to_json(tiny_config("text.txt", "store"))
    saved["phases"][0]["steps"] = 0
    with pytest.raises(UserError, match="^phases.steps is 0; it must be at least 1$"):
        from_json(saved)


def test_an_installed_package_offers_its_types_as_entry_points(tmp_path, monkeypatch):
    (tmp_path / "offered_types.py").write_text(OWN)
    info = tmp_path / "offered-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[flax_transformers]\nmine = offered_types:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert from_json({"type": "offered_types:Mine", "strength": 2.0}).strength == 2.0
    with pytest.raises(UnregisteredType):
        from_json({"type": "offered_types:MaskedLM"})


def test_a_config_of_a_later_format_is_refused():
    saved = to_json(tiny_config("text.txt", "store")) | {"format": config_json.FORMAT + 1}
    with pytest.raises(UserError, match="has format 3, and this version .* formats up to 2"):
        from_json(saved)


def test_every_id_names_a_dataclass_that_has_this_id():
    for name in config_json._TYPES:
        assert config_json.type_id(config_json._type_of(name)) == name
    places = list(config_json._TYPES.values())
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("", False),
        ("# Mine\nMine = 1\n", False),
        ("class Other: pass\n", False),
        ("def f():\n    class Mine: pass\n", False),
        ("class Mine(\n", False),
        (OWN, True),
        ("class Mine: pass\n", True),
    ],
)
def test_a_file_of_this_folder_is_run_only_if_it_defines_the_class(
    text, runs, tmp_path, monkeypatch
):
    (tmp_path / "setup_of_mine.py").write_text(f"open('ran', 'w').close()\n{text}")
    monkeypatch.chdir(tmp_path)
    with types_found_by(type_in_current_folder):
        if text == OWN:
            assert from_json({"type": "setup_of_mine:Mine"}).strength == 0.5
        else:
            with pytest.raises(UnregisteredType, match="define the dataclass Mine in setup_of"):
                from_json({"type": "setup_of_mine:Mine"})
    assert (tmp_path / "ran").exists() == runs


def test_all_classes_of_a_file_of_this_folder_are_found_by_their_saved_ids(tmp_path, monkeypatch):
    (tmp_path / "two_of_mine.py").write_text(
        f"{OWN}\n@dataclass(frozen=True)\nclass Way:\n    steps: tuple = ()\n"
    )
    (tmp_path / "moved_mine.py").write_text("from two_of_mine import Mine\n")
    monkeypatch.chdir(tmp_path)
    way = {"type": "two_of_mine:Way", "steps": [{"type": "two_of_mine:Mine"}]}
    with pytest.raises(UnregisteredType):  # outside of a command
        from_json(way)
    with types_found_by(type_in_current_folder):
        found = from_json(way)
        moved = from_json({"type": "moved_mine:Mine"})
    assert [type(found).__name__, type(found.steps[0]).__name__] == ["Way", "Mine"]
    assert type(moved) is type(found.steps[0])


COMMANDS = """
evaluate RUN
train --workdir RUN
predict RUN --input stops_here.py
convert RUN hf
generate RUN --prompt a
fill-mask RUN --text a
chat RUN
"""


@pytest.mark.parametrize("command", COMMANDS.strip().split("\n"))
def test_every_command_looks_for_the_types_of_a_run_in_this_folder(
    command, tmp_path, monkeypatch, capsys
):
    """The file of the type stops each command where it is imported."""
    step = tmp_path / "run" / "checkpoints" / "1"
    for item in ("state", "meta"):
        (step / item).mkdir(parents=True)
    for name in ("_METADATA", "manifest.ocdbt"):
        (step / "state" / name).touch()
    config = to_json(tiny_config("text.txt", "store"))
    config["model"]["type"] = "stops_here:Mine"
    meta = {"config": config, "position": {"step": 1}}
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    (tmp_path / "stops_here.py").write_text("class Mine: pass\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("RUN", str(tmp_path / "run")).split()) == 2
    assert "stops_here.py, line 2, fails with ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.usefixtures("one_device")
def test_a_run_with_a_custom_objective_is_trained_resumed_and_used(
    write, tmp_path, monkeypatch, capsys
):
    write("neighbour_of_mine.py", OWN)
    path = write("mine_trained.py", write.config("from neighbour_of_mine import Mine"))
    workdir = str(tmp_path / "run")
    train = ["train", path, "--workdir", workdir]
    assert main(train) == 0
    assert main([*train, "--data.workers", "1", "--phases.0.steps", "3"]) == 0
    assert find_checkpoint(workdir).step == 3
    # The model alone is needed for these, so nothing of the user's is looked for.
    config_json._registered.clear()
    monkeypatch.chdir("/")
    assert main(["fill-mask", workdir, "--text", "the [MASK]", "--top", "1"]) == 0
    assert main(["convert", workdir, str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(["evaluate", workdir]) == 2
    assert (
        "neighbour_of_mine, which is not part of flax_transformers; run the command in the folder "
        "of neighbour_of_mine.py, or call flax_transformers.register" in capsys.readouterr().err
    )
    # The file that the user names, or one in the folder that the user works in, defines it.
    assert main(["evaluate", workdir, "--config", path]) == 0
    config_json._registered.clear()
    monkeypatch.chdir(tmp_path)
    with types_found_by(type_in_current_folder):
        config = saved_config(find_checkpoint(workdir))
    assert type(config.objective).__name__ == "Mine"
    assert config.model == tiny_bert()


def test_a_field_by_its_former_name_is_named_with_that_of_today(tmp_path):
    file = tmp_path / "former.py"
    file.write_text(
        "from flax_transformers.testing import tiny_bert\n"
        'def get_config():\n    return tiny_bert(norm_place="pre")\n'
    )
    with pytest.raises(UserError, match="norm_place is called norm_position now; correct the file"):
        load_config(str(file))


def test_a_file_without_the_function_is_told_which_one_to_define(tmp_path):
    (tmp_path / "other.py").write_text("config = 1\n")
    with pytest.raises(UserError, match=r"other.py has no function get_config\(\); define one"):
        load_config(str(tmp_path / "other.py"))


def test_a_config_file_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from flax_transformers.testing import tiny_config\n"
        "def get_config():\n    return tiny_config('~/text.txt', '~/store')\n"
    )
    (tmp_path / "text.txt").write_text("A text.\n")
    (tmp_path / "store").mkdir()
    assert list(missing_paths(load_config("~/mine.py"))) == []
