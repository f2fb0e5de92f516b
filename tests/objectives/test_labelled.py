"""Rows of labelled texts: framing, cutting, and what holds of every objective that learns them."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.pipeline.loader import TrainStream, ordered_batches
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import ChoiceSource, LabelledSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.labelled import framed, longest_first
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.training.step import check_fits, model_functions
from tests.huggingface.tensors import drawn_model

VOCAB = Vocabulary(size=60, pad_id=0, cls_id=1, sep_id=2, bos_id=1, eos_id=2, special_ids=(0, 1, 2))
A, B = np.array([10, 11, 12]), np.array([20, 21])


@pytest.mark.parametrize(
    ("framing", "one", "two"),
    [
        ("bert", [1, 10, 11, 12, 2], [1, 10, 11, 12, 2, 20, 21, 2]),
        ("roberta", [1, 10, 11, 12, 2], [1, 10, 11, 12, 2, 2, 20, 21, 2]),
        ("t5", [10, 11, 12, 2], [10, 11, 12, 2, 20, 21, 2]),
        ("llama", [1, 10, 11, 12], [1, 10, 11, 12, 1, 20, 21]),
        ("gpt2", [10, 11, 12], [10, 11, 12, 20, 21]),
    ],
)
def test_texts_are_framed_as_hugging_face_frames_them(framing, one, two):
    ids, _, starts = framed([A], framing, VOCAB)
    assert (ids.tolist(), ids[starts[0]]) == (one, 10)
    ids, types, starts = framed([A, B], framing, VOCAB)
    assert (ids.tolist(), ids[starts[1]]) == (two, 20)
    second = starts[1] - {"roberta": 1, "llama": 1}.get(framing, 0)
    assert types.tolist() == [0] * second + [1] * (len(two) - second)


@pytest.mark.parametrize("total", range(1, 14))
def test_of_two_texts_the_longer_is_cut_token_by_token(total):
    for lengths in itertools.product(range(1, 8), repeat=2):
        kept = list(lengths)
        while sum(kept) > max(total, 2):
            kept[int(np.argmax(kept))] -= 1
        found = longest_first(lengths, max(total, 2))
        assert sum(found) == sum(kept) and sorted(found) == sorted(kept)
        assert all(new <= old for new, old in zip(found, lengths, strict=True))


def row_of(lengths, length, **settings):
    ends = np.cumsum(lengths, dtype=np.int32)
    raw = {"tokens": np.arange(3, 3 + ends[-1], dtype=np.int32), "text_ends": ends}
    raw["labels"] = np.array([1], np.int32)
    return SequenceClassification(**settings).prepare(raw, None, VOCAB, length)


def test_truncated_examples_are_counted():
    assert row_of([3, 4], 10)["truncated"] == 0
    row = row_of([3, 4], 9)
    assert row["truncated"] == 1
    assert row["input_ids"].tolist() == [1, 3, 4, 5, 2, 6, 7, 8, 2]
    assert row["token_type_ids"].tolist() == [0] * 5 + [1] * 4
    assert "token_type_ids" not in row_of([3], 9, framing="roberta")
    with pytest.raises(UserError, match="sequences of 4 tokens are too short for a text"):
        row_of([3, 4], 4)


OBJECTIVES = {
    "classes": SequenceClassification(),
    "numbers": SequenceClassification(loss="mse"),
    "tags": TokenClassification(),
    "answers": QuestionAnswering(doc_stride=8, max_question_length=12),
    "choices": MultipleChoice(choices=3),
}
LENGTH = 40


def source_of(kind, folder, count=24):
    texts = [f"text number {n} has {'many ' * (n % 3)}words" for n in range(count)]
    path = folder / f"{kind}.json"
    if kind in ("classes", "numbers"):
        rows = [{"text": text, "label": n % 3} for n, text in enumerate(texts)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return LabelledSource(str(path), label="class" if kind == "classes" else "number")
    if kind == "choices":
        rows = [
            {"question": text, "choices": ["one", "two", "three"][: 2 + n % 2], "answer": n % 2}
            for n, text in enumerate(texts)
        ]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return ChoiceSource(str(path))
    if kind == "tags":
        path = folder / "a.conllu"
        path.write_text(
            "\n".join(
                "".join(f"1\t{w}\t_\tT{len(w) % 4}\n" for w in text.split()) for text in texts
            )
        )
        return TaggedSource(str(path))
    qas = [
        {"id": n, "question": "which?", "answers": [{"text": str(n), "answer_start": 12}]}
        for n in range(count)
    ]
    data = [
        {"title": str(n), "paragraphs": [{"context": text, "qas": [qa]}]}
        for n, (text, qa) in enumerate(zip(texts, qas, strict=True))
    ]
    path.write_text(json.dumps({"data": data}))
    return QuestionSource(str(path))


@pytest.fixture(params=OBJECTIVES)
def kind(request):
    return request.param


@pytest.fixture
def prepared(kind, tmp_path):
    data = TextData(
        source=source_of(kind, tmp_path),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.4,
        shards=2,
    )
    return prepare(data, tmp_path / "store")


def test_hosts_together_make_one_stream_that_goes_on_where_it_stopped(kind, prepared):
    objective = OBJECTIVES[kind]
    examples = prepared.examples("train", objective.window_spec(LENGTH))

    def batches(rows, position=0, count=4):
        stream = TrainStream(
            examples, objective, prepared.vocabulary, sequence_length=LENGTH, batch_size=8,
            seed=3, rows=rows, position=position,
        )  # fmt: skip
        with stream:
            return [next(stream) for _ in range(count)]

    whole = batches(None)
    for hosts in (2, 4):
        parts = [batches(rows) for rows in np.split(np.arange(8), hosts)]
        for number, batch in enumerate(whole):
            for name, values in batch.items():
                joined = np.concatenate([part[number][name] for part in parts])
                np.testing.assert_array_equal(values, joined)
    for name, values in batches(None, position=16, count=1)[0].items():
        np.testing.assert_array_equal(values, whole[2][name])


def made_up_model(outputs):
    """Logits that depend on a place's own token and on no weights."""

    def head(name, params, rngs, hidden_BTD, *_):
        logits = jnp.sin(hidden_BTD * jnp.arange(1.0, outputs + 1)[None, None])
        if name == "choose":
            return logits.sum(axis=(1, 2))
        return logits.sum(axis=1) if name == "classify" else logits

    def hidden_states(params, batch, rngs):
        return HiddenStates(batch["input_ids"][..., None].astype(jnp.float32))

    return ModelFunctions(hidden_states, unembedding=None, head=head)


def test_halves_of_a_batch_add_up_to_the_whole_and_empty_examples_have_no_weight(kind, prepared):
    objective = OBJECTIVES[kind]
    outputs = {"classes": 3, "numbers": 1, "tags": 4, "answers": 2, "choices": 1}
    functions = made_up_model(outputs[kind])
    examples = prepared.examples("validation", objective.window_spec(LENGTH))
    size = len(examples) + 3 + len(examples) % 2
    size += size % 2
    (batch,) = ordered_batches(
        examples, objective, prepared.vocabulary, sequence_length=LENGTH, batch_size=size, seed=0
    )

    @jax.jit
    def sums(batch):
        terms = objective.terms(functions, {}, batch, {})
        losses = {name: (total, weight) for name, (total, weight, _) in terms.losses.items()}
        return {**terms.metrics, **losses}

    real = {name: values[: len(examples)] for name, values in batch.items()}
    halves = [{name: v[half::2] for name, v in batch.items()} for half in range(2)]
    whole, alone, parts = sums(batch), sums(real), [sums(half) for half in halves]
    for name, (total, count) in whole.items():
        np.testing.assert_allclose(alone[name], (total, count), rtol=1e-5)
        added = np.sum([np.array(part[name]) for part in parts], axis=0)
        np.testing.assert_allclose(added, (total, count), rtol=1e-5)
    assert whole["loss"][1] == real["weights"].sum() > 0


@pytest.mark.slow
def test_the_loss_of_answers_is_of_their_first_and_last_tokens():
    logits = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
    batch = {
        "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 6]),  # the last is padding
        "start": np.array([2, 0, 0]),
        "end": np.array([4, 0, 0]),
        "weights": np.array([1, 1, 0], np.float32),
        "truncated": np.array([0, 1, 0], np.float32),
    }
    functions = ModelFunctions(
        lambda *_: HiddenStates(None), unembedding=None, head=lambda *_: jnp.asarray(logits)
    )
    terms = QuestionAnswering().terms(functions, {}, batch, {})
    rows = [logits[0].astype(np.float64), logits[1, :4].astype(np.float64)]
    nll = [np.log(np.exp(row).sum(axis=0)) - row[place, [0, 1]]
           for row, place in zip(rows, ([2, 4], [0, 0]), strict=True)]  # fmt: skip
    best = np.array([row.argmax(axis=0) for row in rows])
    total, weight, coefficient = terms.losses["answer"]
    assert float(total) == pytest.approx(np.mean(nll, axis=1).sum(), rel=1e-6)
    assert (float(weight), coefficient) == (2.0, 1.0)
    assert [float(terms.metrics[name][0]) for name in ("start_accuracy", "end_accuracy")] == [
        (best[:, 0] == [2, 0]).sum(), (best[:, 1] == [4, 0]).sum(),
    ]  # fmt: skip
    assert terms.metrics["truncated"] == (1.0, 2.0)


def test_a_store_with_other_labels_is_refused(kind, prepared):
    for other, objective in OBJECTIVES.items():
        if other != kind:
            with pytest.raises(UserError, match="have other labels than the objective needs"):
                prepared.examples("train", objective.window_spec(LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("ModernBertForTokenClassification", TokenClassification()),
        pytest.param(
            "GPT2ForSequenceClassification",
            SequenceClassification(framing="gpt2"),
            marks=pytest.mark.full,
        ),
        pytest.param(
            "BartForSequenceClassification",
            SequenceClassification(framing="roberta"),
            marks=pytest.mark.full,
        ),
        pytest.param(
            "T5ForTokenClassification", TokenClassification(framing="t5"), marks=pytest.mark.full
        ),
    ],
)
def test_every_kind_of_model_learns_labels(architecture, objective):
    model, params = drawn_model(architecture)
    check_fits(objective, model)
    raw = {"tokens": A.astype(np.int32), "text_ends": np.array([3]), "labels": np.array([1])}
    if isinstance(objective, TokenClassification):
        raw |= {"text_ends": np.array([1, 3]), "labels": np.array([1, 0])}
    row = objective.prepare(raw, None, VOCAB, 20)
    batch = {name: values[None] for name, values in row.items()}
    functions = model_functions(model)
    losses = jax.jit(lambda batch: objective.terms(functions, params, batch, {}).losses)(batch)
    total, weight, _ = next(iter(losses.values()))
    assert (
        np.isfinite(total) and total > 0 and weight == (2 if "tag" in objective.needs.heads else 1)
    )
