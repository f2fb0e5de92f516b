"""The names of metrics tell whether lower or higher is better."""

from __future__ import annotations

import pytest

from flax_transformers.checkpointing.metric_mode import mode_of


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("eval/loss", "min"),
        ("eval/next_sentence_loss", "min"),
        ("eval/loss_recall", "min"),  # of a component called "recall"
        ("eval/f1_dev/loss", "min"),  # of an evaluation set called "f1_dev"
        ("eval/entity_f1", "max"),
        ("eval/loss_dev/accuracy", "max"),
        ("eval/image_to_text_recall_at_1", "max"),
        ("eval/matthews", "max"),
        ("eval/reward", "max"),
        ("eval/reward_chosen", "max"),
        ("eval/reward_rejected", None),
        ("rollout/reward_std", None),
        ("eval/accuracy_gloss", "max"),  # of a component called "gloss"
        ("eval/mine_gloss", None),
        ("eval/mine", None),
    ],
)
def test_the_last_part_of_a_metric_s_name_tells_its_mode(metric, mode):
    assert mode_of(metric) == mode
