"""``train``: with a config file, and without one to resume the run of a workdir."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.config_file import naming_options, recipe
from flax_transformers.cli.main import main
from flax_transformers.cli.parsing import override, show_help, split
from flax_transformers.cli.train import Train
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.monitoring.trackers import Csv, WeightsAndBiases
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training.config import Logging
from tests.cli.test_main import TINY, refused, small  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("line", "own", "overrides"),
    [
        ("a.py --workdir w", "a.py --workdir w", ""),
        ("--workdir w a.py --seed 3", "--workdir w a.py", "--seed 3"),
        ("--workdir w --seed 3", "--workdir w", "--seed 3"),
        ("--seed 3 --workdir w", "--workdir w", "--seed 3"),
        ("--workdir w --objective.mean 0.1 -0.2 --print_config", "--workdir w --print_config",
         "--objective.mean 0.1 -0.2"),
        ("--workdir=w --seed=3", "--workdir=w", "--seed=3"),
        ("no_config --workdir w", "no_config --workdir w", ""),
    ],
)  # fmt: skip
def test_options_of_the_command_are_told_from_fields_of_the_config(line, own, overrides):
    assert split(Train, line.split()) == (own.split(), overrides.split())


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_the_workdir_alone_resumes_its_run(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    workdir = str(tmp_path / "run")
    assert main(["train", TINY, "--workdir", workdir, *small]) == 0
    assert main(["train", "--workdir", workdir]) == 0  # nothing is left to do
    assert main(["train", "--workdir", workdir, "--phases.0.steps", "5"]) == 0
    assert find_checkpoint(workdir).step == 5
    assert main(["train", "--workdir", workdir, "--phases.0.steps", "4"]) == 0  # nor here
    steps = [row["step"] for row in read_metrics(workdir) if "train/loss" in row]
    assert steps == sorted(set(steps))


def test_a_workdir_that_cannot_be_resumed_is_refused(capsys, tmp_path):
    assert refused(capsys, "train").endswith(
        "CONFIG is missing; name a config file, or the --workdir of a run to resume"
    )
    write_corpus(tmp_path / "text.txt")
    assert str(tmp_path) in refused(capsys, "train", "--workdir", str(tmp_path))
    assert "there is no recipe no_config" in refused(
        capsys, "train", "no_config", "--workdir", str(tmp_path)
    )


def test_relative_paths_of_a_saved_config_are_named_where_they_do_not_exist(
    capsys, tmp_path, monkeypatch
):
    """A run that was started in another folder than the one it is resumed in."""
    config = tiny_config("corpus/text.txt", "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Train, "_config", lambda self, overrides: config)

    def fails(*args, **settings):
        raise UserError("there is no file corpus/text.txt")

    monkeypatch.setattr("flax_transformers.run.train", fails)
    (tmp_path / "store").mkdir()
    said = refused(capsys, "train", "--workdir", "run")
    assert said.endswith(
        "there is no file corpus/text.txt (the saved config has the relative path "
        f"'corpus/text.txt', which is not in {tmp_path}: start the command in the folder where the "
        "run was started, or set --data.source.path)"
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").touch()
    assert refused(capsys, "train", "--workdir", "run").endswith("no file corpus/text.txt")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("command", ["train", "prepare", "inspect"])
@pytest.mark.parametrize(
    ("recipe", "options", "name"),
    [
        ("vit_mnist", [], "data.source.path"),
        ("modernbert_small_upos", [], "data.source.path"),
        ("bert_tiny", ["--data.tokenizer.path", "absent"], "data.tokenizer.path"),
        ("videomae_digits", [], "data.sources.0.path"),
    ],
)
def test_a_missing_path_is_named_by_its_option(
    command, recipe, options, name, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    workdir = ["--workdir", "run"] if command == "train" else []
    said = refused(capsys, command, recipe, *workdir, *options)
    assert said.endswith(f"check the path (the option is --{name})")


@pytest.mark.usefixtures("one_device")
def test_a_missing_held_out_file_is_said_to_be_optional(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("A text.\n\nAnother.\n")
    own = ["gpt_tiny_shakespeare", "--workdir", "run", "--data.source.path", "own.txt"]
    said = refused(capsys, "train", *own)
    assert said.endswith("without it: --data.validation-source None)")


@pytest.mark.parametrize(
    "tokens", [["--data.validation-source", "None"], ["--data.validation_source=None"]]
)
def test_an_optional_section_is_removed_by_none(tokens):
    config = recipe("gpt_tiny_shakespeare")
    changed = override(config, ["--seed", "3", *tokens, "--data.validation-fraction", "0.2"])
    assert config.data.validation_source is not None and changed.data.validation_source is None
    assert (changed.seed, changed.data.validation_fraction) == (3, 0.2)
    with pytest.raises(UserError, match="there is no option --data.source"):
        override(config, ["--data.source", "None"])


def test_an_entry_of_several_sections_is_removed_by_none():
    config = recipe("bert_base")
    changed = override(config, ["--phases.1", "None", "--phases.0.steps", "7"])
    assert changed.phases == (replace(config.phases[0], steps=7),)
    with pytest.raises(UserError, match="there is no option --phases.2"):
        override(config, ["--phases.2", "None"])


@pytest.mark.parametrize(
    "tokens",
    [["--logging.ledger", "True"], ["--logging.ledger=True"], ["--logging.example_log", "True"]],
)
def test_an_option_of_a_former_name_sets_the_field_of_today(tokens):
    config = tiny_config("text.txt", "store")
    config = replace(config, logging=Logging())
    assert override(config, tokens).logging == Logging(example_log=True)


def test_an_option_of_no_field_is_named_as_it_was_given():
    config = tiny_config("text.txt", "store")
    for option in ("--ledger", "--objective.gates"):
        with pytest.raises(UserError, match=f"there is no option {option}"):
            override(config, [option, "3"])


def test_phases_in_a_list_take_options(capsys):
    config = tiny_config("text.txt", "store")
    listed = replace(config, phases=list(config.phases))
    changed = override(listed, ["--phases.0.steps", "7"])
    assert changed.phases == (replace(config.phases[0], steps=7),)
    show_help("train", Train, listed)
    assert "--phases.0.steps INT" in capsys.readouterr().out


def test_fields_of_sinks_are_options():
    config = tiny_config("text.txt", "store")
    sinks = (WeightsAndBiases(project="mine"), Csv())
    config = replace(config, logging=Logging(sinks=sinks))
    changed = override(config, ["--logging.sinks.0.mode", "offline"])
    assert changed.logging.sinks == (WeightsAndBiases(project="mine", mode="offline"), Csv())
    with pytest.raises(UserError, match="there is no option --logging.sinks"):
        override(config, ["--logging.sinks", "csv"])


def test_a_validation_source_that_is_none_begins_as_the_source():
    config = recipe("bert_tiny")
    assert config.data.validation_source is None
    tokens = ["--data.validation-source.path=b.txt", "--data.source.path", "a.txt"]
    tokens += ["--data.source.text-field", "body"]
    changed = override(config, tokens).data
    assert changed.source == replace(config.data.source, path="a.txt", text_field="body")
    assert changed.validation_source == replace(changed.source, path="b.txt")
    for given in ("--data.validation-source.pth", "--data.validation-source"):
        with pytest.raises(UserError, match=r"did you mean --data\.validation-source\.path\?"):
            override(config, [given, "b.txt"])
    with pytest.raises(UserError, match="there is no option --data.target-tokenizer; did you mean"):
        override(config, ["--data.target-tokenizer", "x"])
    with pytest.raises(UserError) as error:
        override(config, ["--data.target-tokenizer.path", "x"])
    assert str(error.value).endswith("did you mean --data.tokenizer.path?")


@pytest.mark.parametrize("path", ["", "x"])
def test_a_path_that_an_error_does_not_name_is_not_mentioned(path):
    config = tiny_config(path, "store")
    with pytest.raises(UserError) as raised, naming_options(config):
        raise UserError("data/x-ray.txt is damaged, as the next sentence explains")
    assert "option" not in str(raised.value)
