"""The callbacks and sinks of a run, without a run."""

from __future__ import annotations

import pytest

from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.training.callbacks import Callback, Listeners


class Steps(MetricSink):
    """Keeps the steps of the rows that it gets, and how often it was closed."""

    def __init__(self):
        self.steps, self.closed = [], 0

    def write(self, step, metrics):
        self.steps.append(step)

    def close(self):
        self.closed += 1


def test_sinks_of_the_config_are_opened_anew_after_a_rollback_and_others_stay_open():
    lasting, opened = Steps(), {}
    listeners = Listeners([], [lasting], lambda step: [opened.setdefault(step, Steps())])
    with listeners.training(0, total_steps=9):
        with listeners.writing(0):
            listeners.metrics(1, {})
        assert (opened[0].closed, lasting.closed) == (1, 0)
        with listeners.writing(5):
            listeners.metrics(6, {})
    assert lasting.steps == [1, 6]
    assert {step: sink.steps for step, sink in opened.items()} == {0: [1], 5: [6]}
    assert [sink.closed for sink in (lasting, *opened.values())] == [1, 1, 1]


def test_every_callback_is_told_of_the_end_also_where_those_before_fail(caplog):
    class Failing(Callback):
        def on_train_end(self, step):
            ended.append(self)
            raise KeyError(len(ended))

    ended, callbacks = [], [Failing(), Failing(), Failing()]
    with pytest.raises(KeyError, match="1"), Listeners(callbacks).training(0, 1):
        pass
    assert ended == callbacks
    assert "failed too (KeyError(2))" in caplog.text and "(KeyError(3))" in caplog.text


def test_all_sinks_are_closed_after_an_exception():
    lasting, opened = Steps(), Steps()
    listeners = Listeners([], [lasting], lambda step: [opened])
    with pytest.raises(KeyError), listeners.training(0, 1), listeners.writing(0):
        raise KeyError
    assert lasting.closed == opened.closed == 1
