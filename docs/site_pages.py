"""Pages of the documentation site that are made from the repository; a hook of mkdocs.

Recipes, examples, studies and other linked files are shown with their code, each family has a page
with its sizes, and the API reference lists the public names. Links of the guides to such files lead
to these pages.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import flax_transformers
from flax_transformers.huggingface.family import Family, all_families, build_model

ROOT = Path(__file__).parents[1]
PAGES = {  # files of the repository, and the pages that show them
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/README.md": "launch/index.md",
    "examples": "examples/index.md",
    "configs": "recipes/index.md",
    "studies": "studies/index.md",
}
CODE = {"configs": "recipes", "examples": "examples", "studies": "studies"}
REFERENCE = {  # title: names of modules, whose public names are documented
    "Configs": (
        "training.config", "models.config", "data.config", "data.mixture", "data.images.dataset",
        "data.sources.text", "data.sources.pairs", "data.sources.labelled",
        "data.tokenizers.load", "checkpointing.config", "parallel.mesh", "parallel.limits",
        "adapters.lora", "optim.ema",
    ),
    "Optimizers and schedules": ("optim.optimizers", "optim.schedules"),
    "Objectives": tuple(
        f"objectives.{name}"
        for name in (
            "base", "masked_lm", "next_sentence", "replaced_tokens", "causal_lm", "prefix_lm",
            "span_corruption", "mixture_of_denoisers", "denoising", "sequence_to_sequence",
            "sequence_classification", "token_classification", "question_answering",
            "image_classification", "masked_image", "contrastive", "videos", "modalities",
        )
    ),
}  # fmt: skip
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)

_origins: dict[str, str] = {}
"""The file of the repository that each page is made from, by page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the generated sections to the navigation."""
    assert config.nav is not None
    models = ["models/index.md", *({name: f"models/{name}.md"} for name in _families())]
    sections: list[Any] = [{"Models": models}]
    for folder, title in (("configs", "Recipes"), ("examples", "Examples"), ("studies", "Studies")):
        place = CODE[folder]
        pages = [{file.stem: f"{place}/{file.stem}.md"} for file in _code(folder)]
        sections.append({title: [f"{place}/index.md", *pages]})
    reference = [{title: f"reference/{_slug(title)}.md"} for title in REFERENCE]
    sections.append({"API reference": ["reference/index.md", *reference]})
    config.nav[-1:] = [*sections, {"Changes": "changelog.md"}, config.nav[-1]]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and one for every other file that a page links to."""
    _origins.clear()
    _origins.update({file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()})

    def add(uri: str, text: str, origin: str = "") -> None:
        _origins[uri] = origin or f"docs/{uri}"
        files.append(File.generated(config, uri, content=text))

    for origin, uri in PAGES.items():
        if origin.endswith(".md"):
            add(uri, (ROOT / origin).read_text(), origin)
    for folder, place in CODE.items():
        for file in _code(folder):
            add(f"{place}/{file.stem}.md", _source_page(file), f"{folder}/{file.name}")
        add(f"{place}/index.md", _index(folder))
    for name, family in _families().items():
        add(f"models/{name}.md", _family_page(name, family))
    add("models/index.md", _models_index())
    add("reference/index.md", _public_reference())
    for title, modules in REFERENCE.items():
        add(f"reference/{_slug(title)}.md", _module_reference(title, modules))
    new = {file.src_uri: file.content_string for file in files.documentation_pages()}
    while new:  # a page that is added may link to further files
        linked = sorted({origin for uri, text in new.items() for origin in _linked(uri, text)})
        new = {}
        for origin in linked:
            uri, path = _page_of(origin), ROOT / origin
            if origin.startswith("docs/") or not path.is_file() or uri in _origins:
                continue
            if path.suffix == ".png":
                _origins[uri] = origin
                files.append(File.generated(config, uri, abs_src_path=os.fspath(path)))
            else:
                new[uri] = _source_page(path)
                add(uri, new[uri], origin)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turns links to files of the repository into links to their pages."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        uri = _page_of(_resolve(here, target))
        relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{match[1]}{relative}{'#' + anchor if anchor else ''}{match[3]}"

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(turned, part) for i, part in enumerate(parts))


def _resolve(page: str, target: str) -> str:
    """The file of the repository that a link of a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origins[page]), target))


def _page_of(origin: str) -> str:
    """The page that shows a file of the repository."""
    folder, name = posixpath.split(origin)
    if origin in PAGES:
        return PAGES[origin]
    if folder in CODE:
        return f"{CODE[folder]}/{name.removesuffix('.py')}.md"
    if origin.startswith("docs/"):
        return origin.removeprefix("docs/")
    return f"files/{origin if origin.endswith('.png') else origin.removesuffix('.md') + '.md'}"


def _linked(page: str, text: str) -> Iterable[str]:
    for match in _LINK.finditer("".join(_FENCE.split(text)[::2])):
        target = match[2].partition("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            yield _resolve(page, target)


def _code(folder: str) -> list[Path]:
    return sorted(file for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py")


def _families() -> dict[str, Family]:
    return {family.config.__module__.rpartition(".")[2]: family for family in all_families()}


def _slug(title: str) -> str:
    return title.lower().replace(" ", "_")


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def _source_page(file: Path) -> str:
    """A page with the docstring and the code of a file; Markdown is shown as it is."""
    name, text = os.fspath(file.relative_to(ROOT)), file.read_text()
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return _notebook_page(json.loads(text))
    if file.suffix != ".py":
        return f"# {name}\n\n```{file.suffix.removeprefix('.') or 'text'}\n{text}\n```\n"
    body = ast.parse(text).body
    start = body[0].end_lineno if ast.get_docstring(ast.parse(text)) else 0
    code = "\n".join(text.splitlines()[start:]).strip("\n")
    about = ast.get_docstring(ast.parse(text)) or ""
    return f"# {file.stem}\n\n`{name}`\n\n```text\n{about}\n```\n\n```python\n{code}\n```\n"


def _notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook: Markdown as it is, and code."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _index(folder: str) -> str:
    titles = {
        "configs": ("Recipes", "One run per file. `flax-transformers train NAME` runs each."),
        "examples": ("Examples", "Complete programs; each runs on a CPU and from any folder."),
        "studies": ("Studies", "Published experiments in small: `flax-transformers sweep FILE`."),
    }
    title, about = titles[folder]
    rows = [f"| [{file.stem}]({file.name}) | {_first_line(file)} |" for file in _code(folder)]
    table = "\n".join(["| file | what it shows |", "|---|---|", *rows])
    return f"# {title}\n\n{about}\n\n{table.replace('](', f'](../../{folder}/')}\n"


def _parameters(config: Any) -> int:
    """Number of parameters, without the rows that pad the vocabulary to a multiple of 128."""
    model = build_model(config)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), **model.example_inputs())["params"]
    )
    padding = getattr(config, "padded_vocab_size", 0) - getattr(config, "vocab_size", 0)
    leaves = (getattr(leaf, "value", leaf) for leaf in jax.tree.leaves(shapes))
    rows = getattr(config, "padded_vocab_size", -1)
    return sum(
        leaf.size - (leaf.size // rows * padding if rows in leaf.shape else 0) for leaf in leaves
    )


def _family_page(name: str, family: Family) -> str:
    module = inspect.getmodule(family.config)
    about = (inspect.getdoc(module) or "").partition("\n")[0]
    sizes = [
        f"| `{size}` | {config.num_layers} | {config.hidden_size} | {config.num_heads} "
        f"| {_parameters(config) / 1e6:,.1f} M |"
        for size, config in family.sizes.items()
    ]
    heads = "\n".join(
        f"- `{each}`{' (only in this package)' if each in family.only_here else ''}"
        for each in family.architectures
    )
    table = ""
    if sizes:
        head = ["| size | layers | width | heads | parameters |", "|---|---:|---:|---:|---:|"]
        table = "\n".join([*head, *sizes])
        table = (
            f"## Published sizes\n\n{table}\n\n`ft.published_sizes()` gives their configs. The "
            "parameters are those of the architecture that the config names.\n\n"
        )
    types = ", ".join(f"`{kind}`" for kind in family.model_types) or "none"
    return (
        f"# {name}\n\n{about}\n\nValues of `model_type` in Hugging Face config.json files that it "
        f"reads and writes: {types}.\n\n{table}"
        f"## Architectures\n\n{heads}\n\n"
        f"## Config\n\n::: {family.config.__module__}.{family.config.__name__}\n"
    )


def _models_index() -> str:
    rows = []
    for name, family in _families().items():
        about = (inspect.getdoc(inspect.getmodule(family.config)) or "").partition(":")[0]
        rows.append(f"| [{name}]({name}.md) | {about} | {len(family.sizes)} |")
    table = "\n".join(["| family | source | published sizes |", "|---|---|---:|", *rows])
    return f"# Models\n\n{table}\n"


def _public_reference() -> str:
    """The names of ``flax_transformers`` itself."""
    parts = [
        f"::: flax_transformers.{module}.{name}"
        for name, module in flax_transformers._MODULES.items()
    ]
    return "# Public names\n\n`import flax_transformers as ft`\n\n" + "\n\n".join(parts) + "\n"


def _module_reference(title: str, modules: Iterable[str]) -> str:
    options = "\n    options:\n      show_root_toc_entry: true\n      filters: ['!^_', '!^RANGES$']"
    parts = [f"::: flax_transformers.{module}{options}" for module in modules]
    return f"# {title}\n\n" + "\n\n".join(parts) + "\n"
