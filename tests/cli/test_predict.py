"""``predict`` for every head, on checkpoints of models that were not trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.cli.main import main
from flax_transformers.cli.predict import _lengths
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer
from flax_transformers.evaluation.translation import decode_target, pairs_of, translate
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.reinforcement.model_reward import ModelReward
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.runtime import stored_model, with_label_names
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config
from flax_transformers.training.run_state import RunPosition, checkpoint_meta, tokenizer_files
from tests.huggingface.tensors import drawn_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def parameters(model, texts=None):
    """Random ones with a head of large weights; its labels depend on the ``texts``."""
    init = jax.jit(lambda: model.init(jax.random.key(1), **model.example_inputs())["params"])
    params = nn.meta.unbox(init())
    head = params["classification_head"]
    head["kernel"] = head["kernel"] * 100.0
    if texts is not None:
        inputs = ByteTokenizer()(texts, max_length=48)
        logits = jax.jit(lambda: model.apply({"params": params}, **inputs).logits)()
        head["bias"] = -logits.mean(0)
    return params


def saved_run(folder, source, architecture, objective, texts=None, **changes):
    """A run of step 0 whose held-out data are its training data."""
    data = TextData(
        source=source,
        validation_source=source,
        tokenizer=TokenizerConfig("bytes"),
        store=str(folder / "store"),
        shards=1,
        prepare_processes=1,
    )
    config = tiny_config(
        "", "", sequence_length=48, model=tiny_bert(architecture=architecture, **changes),
        objective=objective, data=data,
    )  # fmt: skip
    prepared = prepare(data)
    config = with_label_names(config, prepared)
    params = parameters(build_model(config.model, ComputeConfig()), texts)
    return save_step(folder, config, prepared, params)


def save_step(folder, config, prepared, params):
    """The workdir of a run with a checkpoint of step 0."""
    meta = checkpoint_meta(
        config, prepared, RunPosition(), {}, {}, consecutive_skips=0, diverging_steps=0
    )
    checkpoints = Checkpoints(folder / "run" / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, meta, tokenizer_files(config, prepared))
    checkpoints.close()
    return str(folder / "run")


def predict(capsys, *arguments):
    assert main(["predict", *map(str, arguments)]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def evaluate(capsys, run, *options):
    assert main(["evaluate", run, *options]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def text_rows(count=20):
    words = np.random.default_rng(0).integers(0, 10**6, (count, 6))
    return [
        {"said": " ".join(map(str, row[: 1 + n % 6])), "kind": "abc"[n % 3]}
        for n, row in enumerate(words)
    ]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    rows = text_rows()
    file = write_rows(folder / "rows.jsonl", rows)
    source = LabelledSource(str(file), text_field="said", label_field="kind")
    architecture = "BertForSequenceClassification"
    texts = [row["said"] for row in rows]
    run = saved_run(folder, source, architecture, SequenceClassification(), texts, num_labels=3)
    return run, file, rows


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["label"] == theirs["label"]
        a, b = (list(line["probabilities"].values()) for line in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_labels_are_those_of_evaluation_and_independent_of_the_batch_size(
    classifier, tmp_path, capsys
):
    run, file, rows = classifier
    found = predict(capsys, run, "--input", file)
    assert list(found[0]) == ["label", "probability", "probabilities"]
    assert list(found[0]["probabilities"]) == ["a", "b", "c"]
    assert len({line["label"] for line in found}) > 1
    for line in found:
        assert line["probability"] == max(line["probabilities"].values())
        assert sum(line["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    right = [line["label"] == row["kind"] for line, row in zip(found, rows, strict=True)]
    scores = evaluate(capsys, run)
    assert scores["eval/accuracy"] == pytest.approx(np.mean(right))
    assert {"eval/macro_f1", "eval/matthews"} <= set(scores)
    report = Path(run) / "evaluation" / "step_00000000.classes.txt"
    assert f"accuracy {np.mean(right):.4f}, Matthews" in report.read_text()
    assert (report.parent / "step_00000000.confusion.png").exists()

    some = write_rows(tmp_path / "some.jsonl", [{"said": row["said"]} for row in rows[4:7]])
    out = tmp_path / "out.jsonl"
    assert predict(capsys, run, "--step", "0", "--input", some, "--output", out) == []
    assert_same([json.loads(line) for line in out.read_text().splitlines()], found[4:7])
    (tmp_path / "rows.txt").write_text("".join(f"{row['said']}\n" for row in rows))
    again = predict(capsys, run, "--input", tmp_path / "rows.txt", "--batch-size", 3)
    assert_same(again, found)


def test_a_classifier_that_reads_padding_gets_that_of_training(tmp_path, capsys):
    rows = text_rows()
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = LabelledSource(str(file), text_field="said", label_field="kind")
    data = TextData(
        source=source, validation_source=source, tokenizer=TokenizerConfig("bytes"),
        store=str(tmp_path / "store"), shards=1, prepare_processes=1,
    )  # fmt: skip
    model, params = drawn_model(
        "SiglipTextForSequenceClassification", vocab_size=262, max_positions=48, num_labels=3,
        pad_id=0,
    )  # fmt: skip
    config = tiny_config(
        "", "", sequence_length=48, model=model.config, data=data,
        objective=SequenceClassification(framing=model.config.framing),
    )  # fmt: skip
    prepared = prepare(data)
    run = save_step(tmp_path, with_label_names(config, prepared), prepared, params)
    found = predict(capsys, run, "--input", file)
    inputs = load_tokenizer(Path(run) / "checkpoints" / "0" / "tokenizer")(
        [row["said"] for row in rows], max_length=48, pad_to=48
    )
    logits = jax.jit(model.apply)({"params": params}, **inputs).logits
    for line, expected in zip(found, jax.nn.softmax(logits).tolist(), strict=True):
        np.testing.assert_allclose(list(line["probabilities"].values()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("abd", "the data has the class 'd', which the model does not know; its classes are a, b"),
        ("abcd", "the data has the class 'd', which the model does not know"),
        ("ab", "the data has no class 'c', which the model knows; give --data.source.label-names"),
        ("ac", "the data has the class 'c' where the model has 'b'; give --data.source.label"),
    ],
)
def test_other_data_must_have_the_classes_of_the_model(
    kinds, message, classifier, tmp_path, capsys
):
    rows = [{"said": f"text {n}", "kind": kinds[n % len(kinds)]} for n in range(40)]
    file = write_rows(tmp_path / "other.jsonl", rows)
    options = ["--data.source.path", str(file), "--data.validation-source.path", str(file)]
    options += ["--data.store", str(tmp_path / "store")]
    assert main(["evaluate", classifier[0], *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.jsonl",
            '{"said": "x"}\n{"text": "y"}\n',
            (),
            "'text'; name the fields of the texts with --text-field",
        ),
        ("a.jsonl", '{"said": "x"}\n{"said": " "}\n', (), "a.jsonl:2 has no text; fix it, or"),
        ("a.jsonl", '{"said": "x"}\n{"said"\n', (), "a.jsonl:2 is not valid JSON"),
        ("a.txt", "x\n\ny\n", (), "a.txt:2 has no text"),
        ("a.txt", "", (), "a.txt holds no rows"),
        ("a.xml", "<a/>", (), "a.xml is of no kind that is read"),
        ("a.txt", "x\n", ("--second-field", "b"), "and the model reads 2; give a .jsonl file"),
        ("a.txt", "x\n", ("--step", "last"), "--step is 'last'; give the number of a step, or"),
        ("a.txt", "x\n", ("--step", "best"), "has the metric 'eval/loss' of an evaluation"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_before_weights_are_read(
    name, content, options, message, classifier, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("flax_transformers.runtime.restored_model", None)
    (tmp_path / name).write_text(content)
    assert main(["predict", classifier[0], "--input", str(tmp_path / name), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_pair_of_texts_gets_the_number_of_evaluation(tmp_path, capsys):
    rows = [{"a": f"text {n}", "b": "x" * (1 + n % 7), "score": n / 9} for n in range(12)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = LabelledSource(str(file), "train", "error", "a", "b", "score", "number")
    objective = SequenceClassification(loss="mse")
    architecture = "BertForSequenceClassification"
    run = saved_run(tmp_path, source, architecture, objective, num_labels=1)
    found = predict(capsys, run, "--input", file)
    errors = [(line["value"] - row["score"]) ** 2 for line, row in zip(found, rows, strict=True)]
    scores = evaluate(capsys, run)
    assert scores["eval/loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert {"eval/pearson", "eval/spearman"} <= set(scores)


def test_every_word_gets_a_tag_with_its_place_in_the_text(tmp_path, capsys):
    words = [[f"w{n}{i}" for i in range(1 + 3 * n % 25)] for n in range(12)]
    tags = [["ABC"[len(word) * i % 3] for i, word in enumerate(row)] for row in words]
    blocks = (zip(*both, strict=True) for both in zip(words, tags, strict=True))
    text = "\n".join("".join(f"1\t{w}\t{t}\n" for w, t in block) for block in blocks)
    (tmp_path / "a.iob2").write_text(text)
    source = TaggedSource(str(tmp_path / "a.iob2"), word_column=1, tag_column=2)
    architecture = "BertForTokenClassification"
    run = saved_run(tmp_path, source, architecture, TokenClassification(), num_labels=3)
    found = predict(capsys, run, "--input", tmp_path / "a.iob2")
    assert [[one["word"] for one in line["words"]] for line in found] == words
    guessed = [one["tag"] for line in found for one in line["words"]]
    assert len(set(guessed)) > 1
    right = np.mean(
        [a == b for a, b in zip(guessed, [t for row in tags for t in row], strict=True)]
    )
    scores = evaluate(capsys, run, "--output", str(tmp_path / "scores.json"))
    assert scores["eval/accuracy"] == pytest.approx(right)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (tmp_path / "scores.classes.txt").exists()
    assert not (Path(run) / "evaluation").exists()

    rows = [{"text": row} for row in words] + [{"text": "Is it, say, 5?"}]
    more = predict(capsys, run, "--input", write_rows(tmp_path / "a.jsonl", rows))
    assert more[:-1] == found
    spans = [(one["word"], one["start"], one["end"]) for one in more[-1]["words"]]
    assert spans[:3] == [("Is", 0, 2), ("it", 3, 5), (",", 5, 6)] and spans[-1] == ("?", 13, 14)


def test_answers_are_spans_of_the_context_and_score_as_in_evaluation(tmp_path, capsys):
    contexts = [f" It was {n} or so. " * (1 + n % 4) for n in range(10, 18)]
    data = [
        {"title": f"{n}", "paragraphs": [{"context": text, "qas": [
            {"id": f"q{n}", "question": "How many?", "answers": [
                {"text": "was", "answer_start": text.index("was")}]}]}]}
        for n, text in enumerate(contexts)
    ]  # fmt: skip
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": data}))
    objective = QuestionAnswering(max_question_length=9, doc_stride=16)
    run = saved_run(tmp_path, QuestionSource(str(file)), "BertForQuestionAnswering", objective)
    found = predict(capsys, run, "--input", file)
    for line, context in zip(found, contexts, strict=True):
        assert context[line["start"] : line["end"]] == line["answer"] != ""
    rows = [{"question": "How many?", "context": context} for context in contexts]
    again = predict(capsys, run, "--input", write_rows(tmp_path / "q.jsonl", rows))
    assert [line["answer"] for line in again] == [line["answer"] for line in found]
    exact = np.mean([line["answer"].strip(" .").lower() == "was" for line in found])
    assert evaluate(capsys, run)["eval/exact_match"] == pytest.approx(exact)


def test_an_encoder_decoder_answers_in_the_order_of_the_rows(tmp_path, capsys):
    settings = GenerationSettings(max_new_tokens=30)
    model, params = drawn_model("T5ForConditionalGeneration", vocab_size=384, generation=settings)
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    texts = ["a", "a longer text of more than sixteen bytes", "bb", "a"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    command = [tmp_path / "hf", "--input", tmp_path / "a.txt"]
    found = predict(capsys, *command)
    assert [list(line) for line in found] == [["text"]] * 4
    assert found[0] == found[3] != found[2] != found[1] != found[0]
    assert predict(capsys, *command, "--batch-size", 1) == found


def test_answers_of_a_run_have_its_lengths_as_in_evaluation(tmp_path, capsys, caplog):
    pairs = [{"source": "ab " * n, "target": "c d " * n} for n in (1, 30, 200)]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    source = PairSource(str(file), source_field="source", target_field="target")
    data = TextData(
        source=source, validation_source=source, tokenizer=TokenizerConfig("bytes"),
        store=str(tmp_path / "store"), shards=1, prepare_processes=1,
    )  # fmt: skip
    model, params = drawn_model(
        "MarianMTModel", vocab_size=262, max_positions=96, pad_id=0, eos_ids=(1,),
        decoder_start_id=0,
    )  # fmt: skip
    config = tiny_config(
        "", "", sequence_length=48, model=model.config, data=data,
        objective=SequenceToSequence(target_length=96),
    )  # fmt: skip
    prepared = prepare(data)
    run = save_step(tmp_path, config, prepared, params)
    decode = decode_target(prepared)
    held_out = pairs_of(config, prepared, "validation", 3)
    caplog.set_level("INFO", "flax_transformers")
    expected = [decode(ids) for ids in translate(config, prepared, model, params, held_out)]
    found = [line["text"] for line in predict(capsys, run, "--input", file)]
    assert found == expected and max(map(len, found)) > 70
    assert "than 48 tokens are truncated, 2 of 3; answers have at most 95" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "settings", "lengths"),
    [
        ("MarianMTModel", {}, (96, 95)),
        ("MarianMTModel", {"max_length": 40}, (96, None)),
        ("T5ForConditionalGeneration", {}, (8192, 511)),
    ],
)
def test_answers_of_a_published_model_end_by_its_settings_or_positions(
    architecture, settings, lengths
):
    changes = {} if architecture.startswith("T5") else {"max_positions": 96}
    model = tiny_architecture(architecture, generation=GenerationSettings(**settings), **changes)
    assert _lengths(SimpleNamespace(model=model, of_run=lambda name: None)) == lengths


def test_embeddings_are_pooled_hidden_states(classifier, capsys):
    run, file, rows = classifier
    model, params = ft.load_pretrained(run)
    tokenizer = ft.load_tokenizer(run)
    text = rows[5]["said"]
    ids = [
        tokenizer.vocabulary.cls_id, *tokenizer.encode_batch([text])[0],
        tokenizer.vocabulary.sep_id,
    ]  # fmt: skip
    state = jax.jit(model.apply)({"params": params}, input_ids=np.array([ids]))
    hidden = np.asarray(state.last_hidden_state)[0]
    for pool, expected in (("mean", hidden.mean(0)), ("cls", hidden[0])):
        found = predict(capsys, run, "--input", file, "--pool", pool)
        np.testing.assert_allclose(found[5]["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_texts_are_embedded_by_the_text_encoder_of_an_image_text_model(kind, tmp_path, capsys):
    model, params = drawn_model(f"{kind}Model", vocab_size=384)
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    command = ["predict", tmp_path / "hf", "--input", tmp_path / "a.txt"]
    assert main([*map(str, command), "--pool", "mean"]) == 2
    said = f"holds a {kind}Model, which has no hidden states of texts alone; give --pool with"
    assert said in capsys.readouterr().err
    assert main([*map(str, command), "--score"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    found = predict(capsys, *command[1:], "--pool", "mean", "--architecture", f"{kind}TextModel")
    assert [len(line["embedding"]) for line in found] == [model.config.hidden_size] * 2


def test_embeddings_of_a_sentence_encoder_end_at_its_own_length(tmp_path, capsys):
    model, params = drawn_model("BertModel", vocab_size=384, normalize_embeddings=True)
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    (tmp_path / "a.txt").write_text("one two three\none tw\n")
    apart = predict(capsys, tmp_path / "hf", "--input", tmp_path / "a.txt", "--pool", "mean")
    assert np.abs(np.subtract(*(line["embedding"] for line in apart))).max() > 1e-3
    limit = {"max_seq_length": len("one tw") + 2, "do_lower_case": False}
    (tmp_path / "hf" / "sentence_bert_config.json").write_text(json.dumps(limit))
    same = predict(capsys, tmp_path / "hf", "--input", tmp_path / "a.txt", "--pool", "mean")
    np.testing.assert_allclose(*(line["embedding"] for line in same), atol=1e-6)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert same == predict(
        capsys, tmp_path / "run", "--input", tmp_path / "a.txt", "--pool", "mean"
    )
    (tmp_path / "hf" / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    command = ["predict", tmp_path / "hf", "--input", tmp_path / "a.txt", "--pool", "mean"]
    assert main([str(part) for part in command]) == 2
    assert "at most 2 tokens, 2 of them special ones" in capsys.readouterr().err


def test_labels_of_a_published_classifier_may_be_independent(tmp_path, capsys):
    names = ("x", "y", "z")
    config = tiny_bert(
        architecture="BertForSequenceClassification", num_labels=3, label_names=names,
        problem_type="multi_label_classification",
    )  # fmt: skip
    model = build_model(config, ComputeConfig())
    ft.save_pretrained(tmp_path / "hf", model, parameters(model), tokenizer=ByteTokenizer())
    (tmp_path / "a.txt").write_text("one\nand two\n")
    found = predict(capsys, tmp_path / "hf", "--input", tmp_path / "a.txt")
    for line in found:
        shares = line["probabilities"]
        assert line["labels"] == [name for name in names if shares[name] >= 0.5]
        assert abs(sum(shares.values()) - 1.0) > 1e-3


def test_the_export_of_a_run_has_its_special_tokens_around_texts(tmp_path, capsys):
    rows = text_rows(4)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = LabelledSource(str(file), text_field="said", label_field="kind")
    architecture, objective = "BertForSequenceClassification", SequenceClassification(framing="t5")
    run = saved_run(tmp_path, source, architecture, objective, num_labels=3)
    command = "--input", file, "--text-field", "said"
    of_run = predict(capsys, run, *command)
    assert main(["convert", run, str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert_same(predict(capsys, tmp_path / "hf", *command), of_run)


@pytest.mark.parametrize("before", ["", "</s> "])
def test_texts_get_the_special_tokens_that_the_tokenizer_adds(tmp_path, capsys, caplog, before):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: i for i, name in enumerate(["<s>", "</s>", *letters])}
    backend = tokenizers.Tokenizer(models.BPE(names, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A", special_tokens=[("</s>", 1)] if before else []
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(roles))
    model, params = drawn_model("LlamaForSequenceClassification", vocab_size=len(names))
    hf = tmp_path / "hf"
    ft.save_pretrained(hf, model, params, tokenizer_from=tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("hello\n")
    (found,) = predict(capsys, hf, "--input", tmp_path / "a.txt")
    # No framing begins with </s>: texts get that of the family, and a warning says so.
    assert ("puts ['</s>'] before a text" in caplog.text) == bool(before)
    ids = load_tokenizer(hf).encode_prompt("hello").tolist()
    inputs = np.array([[*([0] if before else []), *ids]], np.int32)
    logits = jax.jit(model.apply)({"params": params}, inputs).logits
    shares = jax.nn.softmax(logits[0]).tolist()
    np.testing.assert_allclose(list(found["probabilities"].values()), shares, atol=2e-6)


def test_several_numbers_of_a_published_regression_are_all_printed(tmp_path, capsys):
    config = tiny_bert(
        architecture="BertForSequenceClassification", num_labels=2, label_names=("x", "y"),
        problem_type="regression",
    )  # fmt: skip
    model = build_model(config, ComputeConfig())
    params = parameters(model)
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    (tmp_path / "a.txt").write_text("one\nand two\n")
    found = predict(capsys, tmp_path / "hf", "--input", tmp_path / "a.txt")
    inputs = ByteTokenizer()(["one", "and two"])
    logits = jax.jit(model.apply)({"params": params}, **inputs).logits
    for line, (x, y) in zip(found, logits.tolist(), strict=True):
        assert line == {
            "values": {"x": pytest.approx(x, abs=1e-3), "y": pytest.approx(y, abs=1e-3)}
        }


def test_a_model_without_a_head_says_what_to_do(tmp_path, capsys):
    model, params = drawn_model("GPT2LMHeadModel", vocab_size=384)
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    (tmp_path / "a.txt").write_text("one\n")
    assert main(["predict", str(tmp_path / "hf"), "--input", str(tmp_path / "a.txt")]) == 2
    assert (
        "has no head for labels, tags, answers or translations; use flax-transformers generate"
        in (capsys.readouterr().err)
    )


def test_predictions_that_cannot_be_written_are_refused_first_and_printed_last(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "a.txt").write_text("one\n")
    command = ["predict", str(tmp_path / "none"), "--input", str(tmp_path / "a.txt"), "--output"]
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "a.txt" / "b", "be written")):
        assert main([*command, str(output)]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("flax_transformers.runtime.stored_model", lambda *_: None)
    found = tmp_path / "found.jsonl"

    def lines(*_):
        found.mkdir()  # in the meantime
        return [{"label": "x"}]

    monkeypatch.setattr("flax_transformers.cli.predict._lines", lines)
    assert main([*command, str(found)]) == 2
    written = capsys.readouterr()
    assert written.out == '{"label": "x"}\n' and "found.jsonl cannot be written" in written.err


def test_images_get_the_preprocessing_of_timm_and_a_model_that_is_not_square(tmp_path, capsys):
    from PIL import Image

    architecture = "DeiT3ForImageClassification"
    model, params = drawn_model(architecture, num_labels=3, image_size=(32, 48))
    ft.save_pretrained(tmp_path / "hf", model, params)
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    described["pretrained_cfg"] |= {"mean": [0.2] * 3, "std": [0.3] * 3, "crop_pct": 0.8}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    values = (pixels[4:36, 16:64] / 255 - 0.2) / 0.3
    values = np.asarray(values, np.float32).transpose(2, 0, 1)[None]
    logits = jax.jit(model.apply)({"params": params}, values).logits[0]
    for folder in ("hf", "run"):
        (found,) = predict(capsys, tmp_path / folder, "--input", tmp_path / "a.png")
        shares = list(found["probabilities"].values())
        np.testing.assert_allclose(shares, jax.nn.softmax(logits), atol=1e-4)
        if folder == "hf":
            assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
            capsys.readouterr()


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "CLIPVisionModel"])
def test_a_converted_model_of_images_is_used_with_its_preprocessing(tmp_path, capsys, architecture):
    from PIL import Image

    is_clip = architecture == "CLIPVisionModel"
    model, params = drawn_model("CLIPModel" if is_clip else architecture)
    tokenizer = ByteTokenizer() if is_clip else None
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=tokenizer)
    described = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(described))
    given = ["--architecture", architecture] if is_clip else []
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run"), *given]) == 0
    capsys.readouterr()
    assert stored_model(str(tmp_path / "run")).tokenizer is None
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["--input", tmp_path / "a.png", "--pool", "cls"]
    expected = predict(capsys, tmp_path / "hf", *arguments, *given)
    assert predict(capsys, tmp_path / "run", *arguments) == expected


def test_images_of_a_folder_or_a_list_get_labels(tmp_path, capsys):
    from PIL import Image

    model, params = drawn_model("ViTForImageClassification", num_labels=3)
    params["classification_head"]["kernel"] *= 100.0
    ft.save_pretrained(tmp_path / "hf", model, params)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        pixels = rng.integers(0, 256, (40, 32 + 8 * n, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{n}.png")
    found = predict(capsys, tmp_path / "hf", "--input", tmp_path / "images")
    assert [line["file"] for line in found] == [f"{tmp_path}/images/{n}.png" for n in range(3)]
    assert list(found[0]["probabilities"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    (tmp_path / "list.txt").write_text("images/2.png\nimages/0.png\n")
    again = predict(capsys, tmp_path / "hf", "--input", tmp_path / "list.txt")
    assert_same(again, [found[2], found[0]])
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    described["problem_type"] = "multi_label_classification"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described))
    for line in predict(capsys, tmp_path / "hf", "--input", tmp_path / "images"):
        shares = line["probabilities"]
        assert line["labels"] == [name for name in shares if shares[name] >= 0.5]
    (tmp_path / "list.txt").write_text("images/2.png\nimages/9.png\n")
    assert main(["predict", str(tmp_path / "hf"), "--input", str(tmp_path / "list.txt")]) == 2
    assert "there is no image" in capsys.readouterr().err


def test_rewards_are_those_that_model_rewards_give(tmp_path, capsys):
    turns = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    pair = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
    source = ConversationSource(str(write_rows(tmp_path / "pairs.jsonl", [pair, pair])))
    data = ChatData(
        source=source, validation_fraction=0.0, tokenizer=TokenizerConfig("bytes"),
        store=str(tmp_path / "store"), shards=1, prepare_processes=1,
    )  # fmt: skip
    model, params = drawn_model(
        "LlamaForSequenceClassification", vocab_size=262, max_positions=160, num_labels=1,
        pad_id=0, bos_id=None, eos_ids=(1,),
    )  # fmt: skip
    config = tiny_config(
        "", "", sequence_length=48, model=model.config, data=data, objective=RewardModel()
    )
    run = save_step(tmp_path, config, prepare(data), params)
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    of_texts, of_messages = (
        ModelReward(path=str(run), messages=messages).scorer(mesh)(["2+2="], ["4"], [{}])[0]
        for messages in (False, True)
    )
    rows = [{"text": "2+2=4"}, {"messages": turns}, {"prompt": "2+2=", "completion": "4"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = [line["value"] for line in predict(capsys, run, "--input", file)]
    expected = [of_texts, of_messages, of_texts]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(of_texts - of_messages) > 0.01
    (tmp_path / "rows.txt").write_text("2+2=4\n")
    lines = predict(capsys, run, "--input", tmp_path / "rows.txt")
    assert lines == [{"value": found[0]}]
    assert main(["predict", str(run), "--input", str(tmp_path / "pairs.jsonl")]) == 2
    assert "pairs.jsonl:1 has 2 answers, of which one is scored" in capsys.readouterr().err


def test_a_number_that_is_not_finite_is_null(tmp_path, monkeypatch, capsys):
    lines = [{"embedding": [float("nan"), 1.0]}]
    monkeypatch.setattr("flax_transformers.cli.predict._lines", lambda *given: lines)
    monkeypatch.setattr("flax_transformers.runtime.stored_model", lambda *given: None)
    (tmp_path / "rows.jsonl").touch()
    assert main(["predict", "run", "--input", str(tmp_path / "rows.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"embedding": [None, 1.0]}
