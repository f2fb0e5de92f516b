"""Stored log-probabilities of a reference model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig
from flax_transformers.post_training import reference


@pytest.mark.parametrize("length", [0, 100, -30])
def test_a_damaged_file_is_computed_again(length, monkeypatch, tmp_path, caplog):
    calls = []
    monkeypatch.setattr(
        reference._Pass, "_computed", lambda *_: calls.append(1) or np.ones(3, np.float32)
    )
    store = SimpleNamespace(directory=tmp_path, split="train", fingerprint="f", num_sentences=3)
    spec = SimpleNamespace(completions=2)
    model = SimpleNamespace(path="model", compute=ComputeConfig(dtype="float32"))
    work = reference._Pass(None, None, None, model, spec, 8)
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 1 and not caplog.text
    file = tmp_path / work.name(store)
    file.write_bytes(file.read_bytes()[:length])
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 2 and caplog.text.count("cannot be read") == 1


def test_log_probabilities_of_each_dtype_have_a_file():
    names = {
        reference._Pass(
            None, None, None, SimpleNamespace(path="model", compute=ComputeConfig(dtype=dtype)),
            SimpleNamespace(completions=2), 8,
        ).name(SimpleNamespace(fingerprint="f"))
        for dtype in ("float32", "bfloat16")
    }  # fmt: skip
    assert len(names) == 2


def test_a_note_of_another_reference_is_refused_and_a_damaged_one_replaced(
    monkeypatch, tmp_path, caplog
):
    workdir = epath.Path(tmp_path)
    reference._note(workdir, "model", "one")
    monkeypatch.setattr(reference, "has_checkpoint", lambda _: True)
    reference._note(workdir, "model", "one")
    with pytest.raises(UserError, match="the reference model model has other weights"):
        reference._note(workdir, "model", "two")
    for damage in (b"", b"\xff", b"[1]", b"{"):
        (tmp_path / reference.RECORD).write_bytes(damage)
        reference._note(workdir, "model", "two")
        assert json.loads((tmp_path / reference.RECORD).read_text())["weights"] == "two"
    assert "reference.json is damaged" in caplog.text
