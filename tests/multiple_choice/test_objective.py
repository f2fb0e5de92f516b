"""Rows and scores of questions with choices."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.base import ModelFunctions, Vocabulary

VOCAB = Vocabulary(size=30, pad_id=0, cls_id=1, sep_id=2, special_ids=(0, 1, 2))


def example(lengths, label=1):
    ends = np.cumsum(lengths, dtype=np.int32)
    tokens = np.arange(3, 3 + ends[-1], dtype=np.int32)
    return {"tokens": tokens, "text_ends": ends, "labels": np.array([label], np.int32)}


def rows(objective, lengths, length=10):
    return objective.prepare(example(lengths), None, VOCAB, length)


def test_each_choice_is_a_sequence_after_the_shared_text():
    row = rows(MultipleChoice(choices=3), [2, 1, 3])
    assert row["input_ids"].tolist() == [
        [1, 3, 4, 2, 5, 2, 0, 0, 0, 0],
        [1, 3, 4, 2, 6, 7, 8, 2, 0, 0],
        [0] * 10,
    ]
    assert row["token_type_ids"][1].tolist() == [0] * 4 + [1] * 4 + [0] * 2
    assert row["attention_mask"].sum(axis=1).tolist() == [6, 8, 0]
    assert (row["labels"], row["weights"], row["truncated"]) == (1, 1, 0)
    assert "token_type_ids" not in rows(MultipleChoice(framing="roberta"), [2, 1, 3])


def test_a_long_choice_is_truncated_by_itself():
    row = rows(MultipleChoice(choices=2), [4, 1, 9])
    assert row["truncated"] == 1
    assert row["input_ids"].tolist() == [
        [1, 3, 4, 5, 6, 2, 7, 2, 0, 0],
        [1, 3, 4, 5, 2, 8, 9, 10, 11, 2],
    ]


def test_more_choices_than_set_and_too_short_sequences_are_refused():
    with pytest.raises(UserError, match="has 3 choices, but objective.choices is 2; set --obj"):
        rows(MultipleChoice(choices=2), [2, 1, 1, 1])
    with pytest.raises(UserError, match="sequences of 4 tokens are too short"):
        rows(MultipleChoice(), [2, 1, 1], length=4)


def first_token_model():
    """The score of a choice is the id of its first token; NaN where no token is attended to."""

    def hidden_states(params, batch, rngs):
        attended = batch["attention_mask"].any(axis=1)[:, None, None]
        ids = batch["input_ids"][:, :, None].astype(jnp.float32)
        return SimpleNamespace(last_hidden_state=jnp.where(attended, ids, jnp.nan))

    def head(name, params, rngs, hidden_NTD, *_):
        assert name == "choose"
        return hidden_NTD[:, 4, 0]

    return ModelFunctions(hidden_states, unembedding=None, head=head)


def test_the_loss_is_a_softmax_over_the_choices_that_exist():
    objective = MultipleChoice(choices=3)
    row = rows(objective, [2, 1, 3])
    batch = {name: np.stack([value, np.zeros_like(value)]) for name, value in row.items()}
    terms = objective.terms(first_token_model(), {}, batch, {})
    expected = np.log(np.exp(5.0) + np.exp(6.0)) - 6.0  # of ids 5 and 6; the second one is right
    assert float(terms.metrics["loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert [float(x) for x in terms.metrics["accuracy"]] == [1, 1]
    found = objective.predict(first_token_model(), {}, batch)
    assert found["predicted"].tolist() == [1, 0]
    assert found["logits"][0, 2] == np.finfo(np.float32).min
