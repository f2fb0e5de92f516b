"""Notes of the models that a run depends on."""

from __future__ import annotations

import json

import pytest
from etils import epath

from flax_transformers.checkpointing import weights_note
from flax_transformers.checkpointing.weights_note import note_weights
from flax_transformers.errors import UserError


def test_a_note_of_another_reference_is_refused_and_a_damaged_one_replaced(
    monkeypatch, tmp_path, caplog
):
    workdir, note = epath.Path(tmp_path), tmp_path / "reference.json"
    note_weights(workdir, "reference", "model", "one")
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(workdir, "reference", "model", "one")
    with pytest.raises(UserError, match="the reference model model has other weights"):
        note_weights(workdir, "reference", "model", "two")
    for damage in (b"", b"\xff", b"[1]", b"{"):
        note.write_bytes(damage)
        note_weights(workdir, "reference", "model", "two")
        assert json.loads(note.read_text())["weights"] == "two"
    assert "reference.json is damaged" in caplog.text


def test_a_run_without_a_note_gets_it_when_it_is_resumed(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(epath.Path(tmp_path), "teacher", "model", "one")
    with pytest.raises(UserError, match="the teacher model model has other weights"):
        note_weights(epath.Path(tmp_path), "teacher", "model", "two")
