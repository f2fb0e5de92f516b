"""Every notebook runs from its first cell to its last, without a network (`make notebooks`)."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import flax_transformers as ft
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.testing import tiny_model

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.multi_process]
ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODELS = {"load_and_embed": "BertModel", "attention": "BertForMaskedLM"}
"""What stands for the published model of a notebook."""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("STEPS", "10")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, model, tmp_path):
    if notebook.stem in MODELS:
        pooled = {"pooling": "mean", "normalize_embeddings": True}
        more = pooled if notebook.stem == "load_and_embed" else {}
        made = tiny_model(MODELS[notebook.stem], vocab_size=262, **more)
        ft.save_pretrained(os.environ["MODEL"], *made, tokenizer=ByteTokenizer())
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    ran = nbclient.NotebookClient(
        content, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in printed  # of commands that a cell starts


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_the_package_first_and_holds_no_outputs(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and "pip install" in code[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
