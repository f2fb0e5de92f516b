"""Model cards say how the weights beside them were trained and scored."""

from __future__ import annotations

import pytest

from flax_transformers.model_card import model_card
from flax_transformers.testing import tiny_bert


def meta(evaluated, step=20):
    return {
        "config": {"seed": 0},
        "position": {"step": step},
        "evaluations": [{"step": one} for one in evaluated],
        "metrics": {"eval/loss": 1.25, "train/loss": 2.0},
    }


@pytest.mark.parametrize(
    ("evaluated", "averaged", "scored"),
    [([10, 20], (), True), ([10], (), False), ([], (), False), ([10, 20], (10, 20), False)],
)
def test_a_card_has_the_scores_of_its_own_weights_alone(evaluated, averaged, scored):
    card = model_card(tiny_bert(), meta(evaluated), averaged)
    assert ("| `eval/loss` | 1.25 |" in card) == ("## Held-out scores" in card) == scored
    assert ("| step | 20 |" in card) == (not averaged)
    assert ("| average of the steps | 10, 20 |" in card) == bool(averaged)


def test_a_card_has_the_scores_of_a_checkpoint_of_an_earlier_version():
    earlier = {name: value for name, value in meta([]).items() if name != "evaluations"}
    assert "| `eval/loss` | 1.25 |" in model_card(tiny_bert(), earlier)
