"""The fixture ``compiled_once`` shares trainers that are made of the same, and no others."""

from __future__ import annotations

import pytest

import flax_transformers as ft
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.testing import tiny_bert
from flax_transformers.training import setup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]


def made(schedule="constant", **arguments):
    return setup.Trainer(
        model=tiny_bert(),
        objective=MaskedLM(),
        optimizer=AdamW(schedule=Schedule(schedule)),
        mesh=ft.make_mesh(),
        **{"total_steps": 10} | arguments,
    )


def test_equal_arguments_share_a_trainer():
    assert made() is made() is made(total_steps=20) is made(max_consecutive_skips=3)


@pytest.mark.parametrize(
    "other", [{"micro_batches": 2}, {"module_norms": True}, {"skip_spikes_above": 2.0}]
)
def test_any_other_argument_has_a_trainer_of_its_own(other):
    assert made(**other) is not made()


def test_the_end_of_a_schedule_counts():
    assert made("cosine") is not made("cosine", total_steps=20)
