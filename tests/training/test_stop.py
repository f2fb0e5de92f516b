"""Requests to stop, in this process alone."""

from __future__ import annotations

import signal

import pytest

from flax_transformers.parallel.watchdog import Watchdog
from flax_transformers.training import stop as module
from flax_transformers.training.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_with_other_processes_an_interrupt_becomes_what_the_preemption_service_hears(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_request_ends_with_the_loop_that_it_was_for(monkeypatch):
    told = Watchdog()
    monkeypatch.setattr(module, "watchdog", told)
    with StopRequest():
        told._told = ("SIGTERM", 0.0)
    assert told._told is None
