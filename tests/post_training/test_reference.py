"""Stored log-probabilities of a reference model."""

from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel import distributed
from flax_transformers.post_training import reference


@pytest.fixture
def calls(monkeypatch):
    """One element for each time that log-probabilities are computed."""
    calls = []
    monkeypatch.setattr(
        reference._Pass, "_computed", lambda *_: calls.append(1) or np.ones(3, np.float32)
    )
    return calls


def work_on(folder):
    """A computation, and the store that it is of."""
    store = SimpleNamespace(directory=folder, split="train", fingerprint="f", num_sentences=3)
    spec = SimpleNamespace(completions=2)
    model = SimpleNamespace(
        path="model", compute=ComputeConfig(dtype="float32"), earlier_fingerprint=lambda: "all"
    )
    return reference._Pass(None, None, None, model, spec, 8), store


@pytest.mark.parametrize("length", [0, 100, -30])
def test_a_damaged_file_is_computed_again(length, calls, tmp_path, caplog):
    work, store = work_on(tmp_path)
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 1 and not caplog.text
    file = tmp_path / work.name(store)
    file.write_bytes(file.read_bytes()[:length])
    for _ in range(2):
        assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 2 and caplog.text.count("cannot be read") == 1


def test_processes_compute_together_what_one_of_them_lacks(calls, monkeypatch, tmp_path):
    work, store = work_on(tmp_path)
    work.of_store(store, "abc")
    own = []
    monkeypatch.setattr(
        reference, "of_all_processes", lambda value: own.append(value) or np.array([value, False])
    )
    assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert own == [True] and len(calls) == 2


def test_log_probabilities_by_the_hash_of_an_earlier_version_are_used(calls, tmp_path):
    work, store = work_on(tmp_path)
    for fingerprint in ("all", "abc"):
        assert work.of_store(store, fingerprint).tolist() == [1, 1, 1]
    assert len(calls) == 1


def test_processes_stop_together_where_one_of_them_lacks_the_reference(
    calls, monkeypatch, tmp_path
):
    work, store = work_on(tmp_path)
    monkeypatch.setattr(distributed, "of_all_processes", lambda fault: np.array([fault, True]))
    with pytest.raises(UserError, match="process 1 has no reference model model"):
        work.of_store(store, "abc")
    assert not calls


def test_each_process_with_a_copy_of_the_store_writes_its_file(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(reference.jax, "process_index", lambda: 1)
    monkeypatch.setattr(reference, "wait_for_all", lambda: None)
    work, store = work_on(tmp_path)
    for _ in range(2):
        work.of_store(store, "abc")
    assert len(calls) == 1 and (tmp_path / work.name(store)).is_file()


def test_log_probabilities_that_cannot_be_written_are_used_with_a_warning(calls, tmp_path, caplog):
    (tmp_path / "reference").write_text("in the way of the folder")
    work, store = work_on(tmp_path)
    assert work.of_store(store, "abc").tolist() == [1, 1, 1]
    assert len(calls) == 1 and "cannot be kept" in caplog.text


def test_log_probabilities_of_each_dtype_have_a_file():
    names = {
        reference._Pass(
            None, None, None, SimpleNamespace(path="model", compute=ComputeConfig(dtype=dtype)),
            SimpleNamespace(completions=2), 8,
        ).name(SimpleNamespace(fingerprint="f"))
        for dtype in ("float32", "bfloat16")
    }  # fmt: skip
    assert len(names) == 2
