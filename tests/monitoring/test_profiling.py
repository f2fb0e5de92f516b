"""Traces and programs, on request."""

from __future__ import annotations

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from flax_transformers.monitoring.profiling import Profiling, Watch

STEP = jax.jit(lambda state, batch: state * batch)
STATE, BATCH = jnp.ones(3), jnp.arange(3.0)


@pytest.fixture
def traced(monkeypatch):
    """What the profiler is told, instead of a trace."""
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", told.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


@contextmanager
def watching(folder, **probes):
    with Watch(Profiling(**probes), epath.Path(folder), 2) as watch:
        yield lambda step: watch.before(step, STEP, STATE, BATCH)


def test_the_profiler_sees_the_steps_asked_for(traced, tmp_path):
    with watching(tmp_path, profile=(3, 4)) as before:
        seen = []
        for step in range(1, 7):
            before(step)
            seen.append(len(traced))
        assert seen == [0, 0, 1, 1, 2, 2]
    assert traced == [str(tmp_path / "profile"), "stop"]


def test_a_trace_ends_with_the_phase_at_the_latest(traced, tmp_path):
    with watching(tmp_path, profile=(2, 9)) as before:
        before(1)
        before(2)
    assert traced[1:] == ["stop"]


def test_the_program_of_a_phase_is_written_once_before_and_after_compiling(tmp_path):
    with watching(tmp_path, hlo=tmp_path / "hlo") as before:
        before(1)
        texts = {file.name: file.read_text() for file in (tmp_path / "hlo").iterdir()}
        assert sorted(texts) == [f"train_step_phase2_{k}.txt" for k in ("compiled", "lowered")]
        assert "stablehlo.multiply" in texts["train_step_phase2_lowered.txt"]
        assert "HloModule" in texts["train_step_phase2_compiled.txt"]
        (tmp_path / "hlo" / "train_step_phase2_compiled.txt").unlink()
        before(2)
        assert len(list((tmp_path / "hlo").iterdir())) == 1
