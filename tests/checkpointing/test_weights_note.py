"""Notes of the models that a run depends on."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from etils import epath

from flax_transformers.checkpointing import weights_note
from flax_transformers.checkpointing.weights_note import note_weights
from flax_transformers.errors import UserError
from flax_transformers.parallel import distributed


@dataclass
class Of:
    """Weights by their hashes."""

    now: str | None
    earlier: str | None = None

    def fingerprint(self):
        return self.now

    def earlier_fingerprint(self):
        return self.earlier


def test_a_note_of_another_reference_is_refused_and_a_damaged_one_replaced(
    monkeypatch, tmp_path, caplog
):
    workdir, note = epath.Path(tmp_path), tmp_path / "reference.json"
    note_weights(workdir, "reference", "model", Of("one"))
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(workdir, "reference", "model", Of("one"))
    with pytest.raises(UserError, match="the reference model model has other weights"):
        note_weights(workdir, "reference", "model", Of("two"))
    for damage in (b"", b"\xff", b"[1]", b"{"):
        note.write_bytes(damage)
        note_weights(workdir, "reference", "model", Of("two"))
        assert json.loads(note.read_text())["weights"] == "two"
    assert "reference.json is damaged" in caplog.text


def test_a_run_without_a_note_gets_it_when_it_is_resumed(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(epath.Path(tmp_path), "teacher", "model", Of("one"))
    with pytest.raises(UserError, match="the teacher model model has other weights"):
        note_weights(epath.Path(tmp_path), "teacher", "model", Of("two"))


def test_the_note_of_an_earlier_version_is_accepted_and_renewed(monkeypatch, tmp_path):
    workdir, note = epath.Path(tmp_path), tmp_path / "reference.json"
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(workdir, "reference", "model", Of("all files"))
    note_weights(workdir, "reference", "model", Of(None))
    with pytest.raises(UserError, match="has other weights"):
        note_weights(workdir, "reference", "model", Of("weights", earlier="other files"))
    note_weights(workdir, "reference", "model", Of("weights", earlier="all files"))
    assert json.loads(note.read_text()) == {"path": "model", "weights": "weights"}


def test_weights_that_were_gone_when_the_run_began_are_noted_when_they_are_back(
    monkeypatch, tmp_path
):
    note_weights(epath.Path(tmp_path), "reference", "model", Of(None))
    monkeypatch.setattr(weights_note, "has_checkpoint", lambda _: True)
    note_weights(epath.Path(tmp_path), "reference", "model", Of("one", earlier="all files"))
    with pytest.raises(UserError, match="has other weights"):
        note_weights(epath.Path(tmp_path), "reference", "model", Of("two"))


def test_processes_refuse_together_what_one_of_them_refuses(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "of_all_processes", lambda fault: np.array([fault, True]))
    with pytest.raises(UserError, match="process 1 found other weights of the teacher model"):
        note_weights(epath.Path(tmp_path), "teacher", "model", Of("one"))
    assert not list(tmp_path.iterdir())
