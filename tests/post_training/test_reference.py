"""Stored log-probabilities of a reference model."""

from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.post_training import reference


@pytest.mark.parametrize("length", [0, 100, -30])
def test_a_damaged_file_is_computed_again(length, monkeypatch, tmp_path, caplog):
    calls = []
    monkeypatch.setattr(
        reference._Pass, "_computed", lambda *_: calls.append(1) or np.ones(3, np.float32)
    )
    store = SimpleNamespace(directory=tmp_path, split="train", fingerprint="f", num_sentences=3)
    model, spec = SimpleNamespace(path="model"), SimpleNamespace(completions=2)
    work = reference._Pass(None, None, None, model, spec, 8)
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 1 and not caplog.text
    file = tmp_path / work.name(store)
    file.write_bytes(file.read_bytes()[:length])
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 2 and caplog.text.count("cannot be read") == 1
