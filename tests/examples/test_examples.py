"""Every file in ``examples/`` runs, from a folder that is not the repository."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.full] * (path.stem != "sentence_embeddings")
        )
        for path in EXAMPLES
    ],
)
def test_an_example_runs(example, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    ended = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout


@pytest.mark.slow
def test_sentences_are_cut_at_the_length_of_their_encoder(tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "sentence_embeddings.py"))
    example["write_random_encoder"](str(tmp_path / "encoder"))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "encoder" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "encoder" / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    first, second = example["embed"](str(tmp_path / "encoder"), ["abc and more", "abc or less"])
    assert np.array_equal(first, second)


def test_there_is_an_example_for_each_extension():
    assert {path.stem for path in EXAMPLES} >= {
        "own_loop",
        "replaced_token_detection",
        "data_from_python",
        "own_family",
        "own_optimizer",
        "own_metric_sink",
        "sentence_embeddings",
        "nnx_bridge",
    }
