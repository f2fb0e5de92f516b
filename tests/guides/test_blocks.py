"""Every code block of the README and the guides runs, in small sizes, or says why it cannot."""

from __future__ import annotations

import io
import sys
import tomllib
import traceback
import types
from pathlib import Path

import jax
import pytest

from flax_transformers.cli.main import main
from tests.guides import stand_ins
from tests.guides.blocks import PAGES, PROGRAM, ROOT, blocks, command_lines, in_small

BEFORE = {
    "README": ["train modernbert_tiny --workdir runs/demo"],
    "generation": [
        "train llama_small_books --workdir runs/llama --data.source.path texts.jsonl",
        "train transformer_tatoeba --workdir runs/tatoeba --data.source.path pairs.tsv",
    ],
}
"""Commands of other pages whose runs a page uses, by its name."""
OF_600_STEPS = """
--phases.0.steps 600 --phases.0.batch-size 8 --phases.0.sequence-length 16 --model.num-layers 1
--model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16 --model.vocab-size 400
--data.tokenizer.vocab-size 400 --data.source.path my_text --data.validation-fraction 0.2
--checkpoints.every-steps 200 --evaluation.every-steps 0 --evaluation.max-examples 8
""".split()
GIVEN = {
    "extending": """
from dataclasses import replace
import flax_transformers as ft
from flax_transformers.testing import tiny_config

evaluation = ft.recipe("bert_tiny").evaluation
config = replace(tiny_config("text.txt", "store", steps=4), evaluation=evaluation)
"""
}
"""What the names of a page stand for that it explains in words."""
PARTS = [page for page in PAGES if any(block.reason is None for block in blocks(page))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guides")
    stand_ins.write_all(folder)
    return folder


@pytest.fixture
def scratch(files, tmp_path, monkeypatch):
    """A folder like a clone of the repository, with the files that the guides speak of."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("configs", "examples", "studies", "launch", "benchmarks", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a question\n\n"))
    return tmp_path


def run(arguments):
    """Runs a command with the precision that users have, not that of the tests."""
    try:
        with jax.default_matmul_precision("default"):
            code = main(arguments)
    except SystemExit as end:  # --help
        code = end.code or 0
    assert code == 0, f"{PROGRAM} {' '.join(arguments)} ended with {code}"


def run_block(block, names):
    if block.language == "sh":
        for program, *arguments in command_lines(block):
            assert program == PROGRAM, f"{block}: {program} is not run by this test"
            run(in_small(arguments))
    elif block.language == "toml":
        tomllib.loads(block.code)
    else:
        assert block.language == "python"
        file, end, _ = block.code.removeprefix("# ").partition(".py\n")
        if end and file.isidentifier():  # commands after it name the file
            Path(f"{file}.py").write_text(block.code)
        exec(compile(block.code, str(block), "exec"), names)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, scratch, monkeypatch):
    for command in BEFORE.get(page.stem, []):
        run(in_small(command.split()))
    if page.stem == "conversion":  # whose steps are named in the page
        run(["train", "bert_tiny", "--workdir", "runs/mine", *OF_600_STEPS])
    module = types.ModuleType(f"guide_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    names = vars(module)
    exec(GIVEN.get(page.stem, ""), names)
    failures = []
    for block in blocks(page):
        if block.reason is None:
            print(f"-- {block}", file=sys.stderr)
            try:
                run_block(block, names)
            except Exception as error:  # of any kind; the other blocks are run nevertheless
                traceback.print_exc()
                failures.append(f"{block}: {type(error).__name__}: {error}")
    assert failures == []


def test_a_block_that_is_not_run_says_why():
    left_out = [block for page in PAGES for block in blocks(page) if block.reason is not None]
    assert left_out
    assert all(len(block.reason) > 10 for block in left_out)
    assert len(left_out) < sum(len(blocks(page)) for page in PAGES) / 3


def test_commands_name_recipes_as_an_installed_package_has_them():
    files = [
        (str(block), word)
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for program, *words in command_lines(block)
        if program == PROGRAM
        for word in words
        if word.startswith("configs/")
    ]
    assert files == []
