"""Next-token prediction over packed documents."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.mixtral import MixtralConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.testing import GivenLogits
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

VOCAB = Vocabulary(size=50, pad_id=0, bos_id=1, eos_id=2, sep_id=3, special_ids=(0, 1, 2, 3))
LENGTH = 12


def example(tokens, ends=()):
    return {"tokens": np.array(tokens, np.int32), "document_ends": np.array(ends, np.int32)}


def prepare(raw, vocab=VOCAB, length=LENGTH, **settings):
    return CausalLM(**settings).prepare(raw, np.random.default_rng(0), vocab, length)


def lists(row):
    return {name: values.tolist() for name, values in row.items()}


def test_each_document_ends_and_begins_anew():
    row = prepare(example([10, 11, 12, 20, 21, 30], [3, 5]))
    assert lists(row) == {
        "labels": [10, 11, 12, 2, 20, 21, 2, 30, 0, 0, 0, 0],
        "input_ids": [1, 10, 11, 12, 1, 20, 21, 1, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 3, 0, 0, 0, 0],
        "label_weights": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    }
    assert {name: values.dtype.name for name, values in row.items()} == {
        "labels": "int32",
        "input_ids": "int32",
        "segment_ids": "int32",
        "label_weights": "float32",
    }


def test_a_document_end_at_the_end_of_the_window_is_predicted_too():
    row = prepare(example(range(10, 21), [11]))
    assert row["labels"].tolist() == [*range(10, 21), 2]
    assert row["input_ids"].tolist() == [1, *range(10, 21)]
    assert row["segment_ids"].tolist() == [1] * 12


def test_with_attention_across_documents_a_sequence_is_one_segment():
    row = prepare(example([10, 11, 20], [2]), attend_across=True)
    assert row["segment_ids"].tolist() == [1, 1, 1, 1] + [0] * 8
    assert row["labels"].tolist()[:4] == [10, 11, 2, 20]


def test_without_a_bos_token_documents_begin_with_the_end_of_text():
    raw = example([10, 20], [1])
    row = prepare(raw, dataclasses.replace(VOCAB, bos_id=None))
    assert row["input_ids"].tolist()[:3] == [2, 10, 2]
    row = prepare(raw, dataclasses.replace(VOCAB, bos_id=None, eos_id=None))
    assert row["input_ids"].tolist()[:3] == [3, 10, 3]
    assert row["labels"].tolist()[:3] == [10, 3, 20]


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(UserError, match=r"neither an end-of-sequence token nor \[SEP\]"):
        prepare(example([10]), dataclasses.replace(VOCAB, eos_id=None, sep_id=None))


def test_an_empty_example_has_no_weight():
    row = prepare(example([]))
    assert not row["segment_ids"].any() and not row["label_weights"].any()


def test_every_token_and_every_document_end_is_predicted_once():
    rng, spec, longest = np.random.default_rng(1), CausalLM().window_spec(LENGTH), 0
    for _ in range(300):
        separators = int(rng.integers(0, 4))
        count = int(rng.integers(separators + 1, spec.length - separators + 1))
        tokens = rng.integers(4, 50, count)
        ends = np.sort(rng.choice(np.arange(1, count), min(separators, count - 1), replace=False))
        if rng.random() < 0.5:
            ends = np.append(ends, count)
        row = prepare(example(tokens, ends))
        predicted = row["labels"][row["label_weights"] > 0]
        assert predicted[predicted != 2].tolist() == tokens.tolist()
        assert (predicted == 2).sum() == len(ends)
        used = len(predicted)
        longest = max(longest, used)
        begins = np.diff(row["segment_ids"][:used], prepend=0) > 0
        before = np.append(1, row["labels"][: used - 1])
        assert (row["input_ids"][:used] == np.where(begins, 1, before)).all()
    assert longest == LENGTH


def test_windows_are_shorter_by_the_end_of_the_last_document():
    spec = CausalLM(cross_documents=False).window_spec(128)
    assert (spec.length, spec.cross_documents, spec.other) == (127, False, False)
    assert CausalLM().predictions(128) == 128


def test_the_example_view_has_the_first_input_and_the_labels_of_each_document():
    (shown,) = CausalLM().example_views(prepare(example([10, 11, 20], [2])))
    assert shown.ids.tolist() == [1, 10, 11, 2, 1, 20]
    assert shown.labels.tolist() == [-1, 10, 11, 2, -1, 20]
    assert shown.segments.tolist() == [1, 1, 1, 1, 2, 2]


def terms_of(objective, functions, params, batch):
    def terms(params, batch):
        found = objective.terms(functions, params, batch, {})
        return found.losses, found.metrics

    return jax.device_get(jax.jit(terms)(params, batch))


def batch_of(*rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def copying_model():
    """A model that expects what it was just given."""

    def hidden_states(params, batch, rngs):
        return HiddenStates(jax.nn.one_hot(batch["input_ids"], 50))

    return ModelFunctions(
        hidden_states, lambda params, hidden: GivenLogits(3.0 * hidden), head=None
    )


def test_terms_are_sums_over_all_tokens():
    batch = batch_of(prepare(example([10, 10, 11])), prepare(example([10, 10])))
    losses, metrics = terms_of(CausalLM(), copying_model(), {}, batch)
    log_z = np.log(np.exp(3.0) + 49)
    loss = pytest.approx(5 * log_z - 2 * 3.0, rel=1e-6)  # right at the second token of each
    assert losses == {"causal_lm": (loss, 5.0, 1.0)}
    assert metrics == {"loss": (loss, 5.0), "accuracy": (2.0, 5.0)}


def test_an_example_of_zeros_has_no_weight():
    row = prepare(example([10, 10, 11]))
    zeros = {name: np.zeros_like(values) for name, values in row.items()}
    functions = copying_model()
    alone = terms_of(CausalLM(z_loss=1e-4), functions, {}, batch_of(row))
    assert terms_of(CausalLM(z_loss=1e-4), functions, {}, batch_of(row, zeros)) == alone


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 16,
}


def built(config):
    model = build_model(config, ComputeConfig())
    return model_functions(model), drawn_parameters(model, parameter_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("attend_across", [False, True])
def test_documents_see_each_other_only_where_they_are_to(attend_across):
    functions, params = built(GPT2Config(**SMALL))
    hidden = jax.jit(lambda batch: functions.hidden_states(params, batch, {}).last_hidden_state)

    def second_document(first):
        row = prepare(example([*first, 20, 21], [2]), attend_across=attend_across)
        return np.asarray(hidden(batch_of(row)))[0, 3:6]

    same = (second_document([10, 11]) == second_document([12, 13])).all()
    assert same == (not attend_across)


@pytest.mark.slow
def test_experts_are_balanced_with_the_coefficient_of_mixtral():
    functions, params = built(MixtralConfig(num_key_value_heads=2, **SMALL))
    row = prepare(example([10, 11, 12, 20], [3]))
    zeros = {name: np.zeros_like(values) for name, values in row.items()}

    @jax.jit
    def terms(batch):
        found = CausalLM().terms(functions, params, batch, {})
        return found.losses, found.metrics

    losses, metrics = jax.device_get(terms(batch_of(row, zeros)))
    balance, tokens, coefficient = losses["balance"]
    assert tokens == 5.0 == losses["causal_lm"][1]
    assert coefficient == pytest.approx(0.02)
    assert 2.0 <= balance / tokens < 8.0  # two experts are chosen for each token
    assert metrics["balance"] == (balance, tokens)
    twice, _ = jax.device_get(terms(batch_of(row, row)))
    assert twice["balance"][:2] == (pytest.approx(2 * balance, rel=1e-6), 10.0)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="objective.balance_weight is -1"):
        CausalLM(balance_weight=-1)
    with pytest.raises(ValueError, match="objective.z_loss is -1"):
        CausalLM(z_loss=-1)
