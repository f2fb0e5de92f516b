"""Choices: by a classifier, and by the log-likelihoods of a language model."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.inputs import InputRow
from flax_transformers.data.sources.documents import Document
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.evaluation.prediction.heads import score_head
from flax_transformers.evaluation.scoring.continuations import accuracies, choice_lines, request_of
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.testing import tiny_architecture
from tests.huggingface.tensors import drawn_model

pytestmark = pytest.mark.usefixtures("one_device")

ROWS = [
    {"question": "One is", "choices": ["small", "a big number", "x"], "answer": n % 3}
    for n in range(4)
] + [{"question": "Two", "choices": ["yes", "no"], "answer": "A"}]


@pytest.fixture
def command(tmp_path):
    def write(architecture, *arguments):
        model, params = drawn_model(architecture, vocab_size=384)
        ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        return ["predict", str(tmp_path / "hf"), "--input", str(file), *arguments]

    return write


def lines(capsys, arguments):
    capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_spaces_between_context_and_continuation_belong_to_the_continuation():
    tokenizer = ByteTokenizer()
    text = lambda ids: bytes(i - 3 for i in ids).decode()  # noqa: E731
    found = request_of(tokenizer, "a b ", "c", before=[])
    assert (text(found.context), text(found.continuation)) == ("a b", " c")
    assert request_of(tokenizer, "a", " b", before=[2]).context == [2, ord("a") + 3]


def test_the_best_choice_is_by_the_sum_and_by_the_sum_per_character():
    rows = [InputRow(Document(("q", "ab", "abcdefgh")), (), "q", ["ab", "abcdefgh"], 1)]
    found = [{"log_likelihood": np.array([-4.0])}, {"log_likelihood": np.array([-8.0])}]
    (line,) = choice_lines(rows, found)
    assert (line["choice"], line["choice_normalised"]) == (0, 1)
    assert accuracies([line]) == {"accuracy": 0.0, "accuracy_normalised": 1.0}
    assert accuracies(choice_lines([rows[0]._replace(answer=None)], found)) == {}


def test_the_context_of_a_prefix_language_model_is_its_prefix():
    vocab, example = ByteTokenizer().vocabulary, {"tokens": np.arange(5, 11), "scored": 2}
    rng, settings = np.random.default_rng(0), GenerationSettings(bidirectional_prompt=True)
    config = tiny_architecture("GPT2LMHeadModel")
    for model, prefix in (
        (config, None),
        (dataclasses.replace(config, generation=settings), [1, 1, 1, 1, 0, 0, 0]),
    ):
        objective = score_head(model, ByteTokenizer(), "x", choices=True).objective
        row = objective.prepare(example, rng, vocab, 7)
        assert row["next_weights"].tolist() == [0, 0, 0, 1, 1, 0, 0]
        assert (row["prefix_mask"].tolist() if prefix else row.get("prefix_mask")) == prefix
    row = objective.prepare(example, rng, vocab, 3)  # of whose context the end is kept
    assert row["prefix_mask"].tolist() == [1, 1, 0]


@pytest.mark.slow
def test_a_language_model_scores_the_tokens_of_each_choice(command, capsys, tmp_path):
    arguments = command("GPT2LMHeadModel", "--score", "--choices-field", "choices")
    found = lines(capsys, [*arguments, "--label-field", "answer", "--batch-size", "4"])
    model, params = ft.load_pretrained(tmp_path / "hf")
    frame = ft.load_tokenizer(tmp_path / "hf").frame
    before = [] if frame is None else list(frame.before)
    texts = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    ids = np.zeros((len(texts), 32), np.int32)  # the model is causal: what follows changes nothing
    ends = []
    for number, (context, choice) in enumerate(texts):
        row = [*before, *(byte + 3 for byte in f"{context} {choice}".encode())]
        ids[number, : len(row)] = row
        ends.append((len(before) + len(context), len(row)))
    shares = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, ids).logits)
    chosen = np.take_along_axis(np.asarray(shares)[:, :-1], ids[:, 1:, None], axis=2)[:, :, 0]
    totals = [
        row[start - 1 : end - 1].sum() for row, (start, end) in zip(chosen, ends, strict=True)
    ]
    scores = [score for line in found for score in line["log_likelihoods"]]
    np.testing.assert_allclose(scores, totals, 1e-4)
    for row, line in zip(ROWS, found, strict=True):
        assert line["choice"] == int(np.argmax(line["log_likelihoods"]))
        right = 0 if row["answer"] == "A" else row["answer"]
        assert line["right"] == (line["choice"] == right)
    assert all("right" not in line for line in lines(capsys, arguments))


@pytest.mark.slow
def test_a_model_with_the_head_chooses_by_its_own_logits(command, capsys, tmp_path):
    found = lines(capsys, command("BertForMultipleChoice", "--batch-size", "4"))
    model, params = ft.load_pretrained(tmp_path / "hf")
    vocabulary = ft.load_tokenizer(tmp_path / "hf").vocabulary
    apply = jax.jit(model.apply)
    for row, line in zip(ROWS, found, strict=True):
        inputs = {
            name: np.zeros((1, len(row["choices"]), 32), np.int32)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        for number, choice in enumerate(row["choices"]):
            texts = [[byte + 3 for byte in text.encode()] for text in (row["question"], choice)]
            ids = [vocabulary.cls_id, *texts[0], vocabulary.sep_id, *texts[1], vocabulary.sep_id]
            inputs["input_ids"][0, number, : len(ids)] = ids
            inputs["attention_mask"][0, number, : len(ids)] = 1
            inputs["token_type_ids"][0, number, len(texts[0]) + 2 : len(ids)] = 1
        logits = apply({"params": params}, **inputs).logits[0]
        np.testing.assert_allclose(line["probabilities"], jax.nn.softmax(logits), 1e-3)
        assert line["choice"] == int(np.argmax(logits))
        assert line["text"] == row["choices"][line["choice"]]


def test_what_does_not_belong_together_is_refused(command, capsys):
    arguments = command("GPT2LMHeadModel", "--score", "--label-field", "answer")
    assert main(arguments) == 2
    assert "--label-field needs --choices-field" in capsys.readouterr().err
    assert main([one for one in arguments if one != "--score"]) == 2
    assert "--label-field is for --score" in capsys.readouterr().err
