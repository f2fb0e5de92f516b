"""Commands, options and links in the documentation exist."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from flax_transformers.cli.config_file import load_config, recipes
from flax_transformers.cli.main import main
from flax_transformers.config_json import to_json

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "launch" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
RECIPES = sorted((ROOT / "configs").glob("*.py"))
WITH_FIELDS = {"train", "prepare", "inspect", "plan", "evaluate", "doctor"}
"""Commands that take fields of a config as options."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Relative paths are those of the repository, and ``sys.path`` is restored."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def name(page):
    return str(page.relative_to(ROOT))


def commands(page):
    """The arguments of every flax-transformers command in the page's shell code."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            program = next((w for w in words if w.endswith("flax-transformers")), None)
            if program is not None:
                found.append(words[words.index(program) + 1 :])
            elif "launch/local.py" in line:
                found.append(words[words.index("--") + 1 :])
    return found


COMMANDS = [(page, arguments) for page in PAGES for arguments in commands(page)]


@cache
def options_of(command):
    """The options of a command itself, from its --help."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert out.getvalue()
    return set(re.findall(r"--[a-z][a-z-]*", out.getvalue()))


def fields(value, path=""):
    """Every option that sets a field of a config, such as ``--model.hidden-size``."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        items = []
    found = {f"--{path}".replace("_", "-")} if path else set()
    for key, item in items:
        found |= fields(item, f"{path}.{key}" if path else str(key))
    return found


@cache
def all_fields():
    return set().union(*(fields(to_json(load_config(str(recipe)))) for recipe in RECIPES))


def test_the_pages_have_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{name(page)}-{' '.join(a)}" for page, a in COMMANDS]
)
def test_every_command_and_its_options_exist(page, arguments):
    command, *rest = arguments
    own = options_of(command)
    overrides, config = [], ROOT / "configs" / "bert_tiny.py"
    at = 0
    while at < len(rest):
        word, at = rest[at], at + 1
        if f"```python\n# {word}\n" in (ROOT / page).read_text():  # a file that the page shows
            continue
        if word.endswith(".py"):
            config = ROOT / word
            assert config.is_file(), word
        elif at == 1 and command in WITH_FIELDS - {"evaluate", "doctor"} and word.islower():
            assert word.startswith("--") or word in recipes(), word
            config = recipes().get(word, config)
        if not word.startswith("--") or word in own:
            continue
        overrides.append(word)
        while at < len(rest) and not rest[at].startswith("--"):
            overrides.append(rest[at])
            at += 1
    if command in WITH_FIELDS:
        load_config(str(config), overrides)  # an unknown field or a wrong value raises
    else:
        assert all(word in all_fields() for word in overrides if word.startswith("--"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_every_guide_is_in_the_navigation_of_the_site(page):
    assert re.search(rf": {page.name}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


@cache
def options_of_benchmarks():
    """Options that the scripts in benchmarks/ define."""
    scripts = (ROOT / "benchmarks").glob("*.py")
    return {
        option
        for script in scripts
        for option in re.findall(r"add_argument\(\s*\"(--[\w-]+)", script.read_text())
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_option_in_the_text_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    options = {
        word
        for code in re.findall(r"`(--[^`]*)`", text)
        for word in code.split()
        if word.startswith("--")
    }
    own = set().union(*(options_of(command) for command in sorted({a[0] for _, a in COMMANDS})))
    expected = own | all_fields() | options_of_benchmarks() | {"--env"}  # --env is xpk's
    assert {word for word in options if word not in expected and not word.endswith("*")} == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


def test_the_readme_of_a_package_has_no_link_to_another_file():
    """Its page, at a registry, has neither the pictures nor the files of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text()
    for rule in readme["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.findall(r"\]\((?!https?:|#)", text)
    assert "Quickstart (`docs/quickstart.md`)" in text
    assert "(`LICENSE`)" in text


def test_the_readme_has_the_number_of_goldens():
    from tests.families.test_goldens import CASES, GOLDENS

    counts = f"{len(CASES)} cases of {len(GOLDENS)} families"
    assert counts in (ROOT / "README.md").read_text()
