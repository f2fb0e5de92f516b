"""Fine-tuning through ``train CONFIG --init-from``, from folders of either kind."""

from __future__ import annotations

import json

import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.cli.main import main
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import assert_bit_equal, tiny_bert, write_corpus
from tests.huggingface.tensors import drawn_model, drawn_parameters, parameter_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

CONFIG = """
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config
from flax_transformers.optim.optimizers import AdamW


def get_config():
    data = TextData(
        source={source}, tokenizer=TokenizerConfig("bytes"), validation_fraction=0.4, shards=1,
        store={store!r},
    )
    return tiny_config(
        "", "", steps=4, batch_size=8, sequence_length=48, model={model}, objective={objective},
        data=data, optimizer=AdamW({optimizer}),
    )
"""


def write_config(folder, source, model, objective, optimizer="learning_rate=1e-2"):
    path = folder / "config.py"
    path.write_text(
        CONFIG.format(
            source=source, model=model, objective=objective, optimizer=optimizer,
            store=str(folder / "store"),
        )
    )  # fmt: skip
    return str(path)


def texts(folder):
    rows = [{"text": f"text {n} is {'bad' * (n % 3)}", "label": "abc"[n % 3]} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"LabelledSource({str(folder / 'rows.jsonl')!r})"


def train(folder, config, *more):
    assert main(["train", config, "--workdir", str(folder / "run"), *more]) == 0
    return json.loads((folder / "run" / "config.json").read_text())


def test_a_published_encoder_learns_classes_with_parts_of_it_frozen(tmp_path, capsys, caplog):
    model = build_model(tiny_bert(), ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    ft.save_pretrained(tmp_path / "hf", model, params)
    config = write_config(
        tmp_path,
        texts(tmp_path),
        'tiny_bert(architecture="BertForSequenceClassification", num_labels=3)',
        "SequenceClassification()",
        'learning_rate=1e-2, frozen=("words", "stack"), layer_decay=0.5',
    )
    saved = train(tmp_path, config, "--init-from", str(tmp_path / "hf"))
    assert "classification_head" in caplog.text and "pooler" in caplog.text
    assert saved["model"]["label_names"] == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert (
        "baseline: accuracy" in said and "(majority class)" in said and "held-out accuracy" in said
    )
    trained = restore_params(find_checkpoint(tmp_path / "run"))
    real = slice(262)  # what fills the table up has no file to come from
    found, given = (np.asarray(tree["words"]["embedding"])[real] for tree in (trained, params))
    assert_bit_equal(found, given)
    assert_bit_equal(trained["stack"], params["stack"])
    moved = np.abs(trained["embeddings"]["norm"]["scale"] - params["embeddings"]["norm"]["scale"])
    # AdamW takes about the rate in each step; embeddings have half of half of half of it.
    assert 0 < moved.max() < 4 * 1e-2 * 0.5**3
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {"eval/accuracy", "eval/macro_f1", "eval/truncated"} <= set(scores)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["id2label"] == {"0": "a", "1": "b", "2": "c"}


@pytest.mark.full  # tests/sweeps/test_runner.py starts from a checkpoint
def test_a_checkpoint_is_fine_tuned_on_entities(tmp_path, capsys, caplog):
    write_corpus(tmp_path / "text.txt")
    (tmp_path / "before").mkdir()
    source = f"TextSource({str(tmp_path / 'text.txt')!r})"
    train(
        tmp_path / "before", write_config(tmp_path / "before", source, "tiny_bert()", "MaskedLM()")
    )
    (tmp_path / "a.iob2").write_text(
        "".join(f"1\tIn\tO\n2\tParis\tB-LOC\n3\t{n}\tI-LOC\n\n" for n in range(30))
    )
    config = write_config(
        tmp_path,
        f"TaggedSource({str(tmp_path / 'a.iob2')!r}, word_column=1, tag_column=2)",
        'tiny_bert(architecture="BertForTokenClassification", num_labels=3)',
        "TokenClassification()",
    )
    capsys.readouterr()
    saved = train(tmp_path, config, "--init-from", str(tmp_path / "before" / "run"))
    assert "classification_head" in caplog.text
    assert saved["model"]["label_names"] == ["B-LOC", "I-LOC", "O"]
    said = capsys.readouterr().out
    assert "majority class" in said and "held-out entity f1" in said


def test_answers_are_written_down_and_scored(tmp_path, capsys):
    data = [
        {"title": f"{n}", "paragraphs": [{"context": f"It was {n} or so. " * 4, "qas": [
            {"id": f"q{n}", "question": "How many?",
             "answers": [{"text": f"{n}", "answer_start": 7}]},
            {"id": f"none{n}", "question": "Why?", "is_impossible": True, "answers": []},
        ]}]}
        for n in range(10, 22)
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": data}))
    config = write_config(
        tmp_path,
        f"QuestionSource({str(tmp_path / 'squad.json')!r})",
        'tiny_bert(architecture="BertForQuestionAnswering")',
        "QuestionAnswering(max_question_length=9, doc_stride=16, no_answer=True)",
    )
    train(tmp_path, config)
    assert "f1" in capsys.readouterr().out
    answers = json.loads((tmp_path / "run" / "predictions" / "step_00000004.json").read_text())
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    scores = json.loads(capsys.readouterr().out)
    held_out = [name for name in answers if name.startswith("q")]
    assert 0 < len(held_out) == len(answers) / 2  # each once, over all its windows
    contexts = {f"q{n}": f"It was {n} or so. " * 4 for n in range(10, 22)}
    assert all(best["text"] in contexts[name] for name in held_out for best in answers[name])
    assert {"eval/exact_match", "eval/f1", "eval/no_answer_accuracy"} <= set(scores)


@pytest.mark.full  # test_two_vocabularies.py trains an encoder-decoder on pairs
def test_a_published_encoder_decoder_is_fine_tuned_on_pairs(tmp_path):
    model, params = drawn_model("T5ForConditionalGeneration", vocab_size=262)
    ft.save_pretrained(tmp_path / "hf", model, params)
    rows = [{"source": f"say {n}", "target": f"{n}"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = write_config(
        tmp_path,
        f"PairSource({str(tmp_path / 'pairs.jsonl')!r})",
        'tiny_architecture("T5ForConditionalGeneration", vocab_size=262)',
        "SequenceToSequence()",
        "learning_rate=1e-30, weight_decay=0.0",
    )
    train(tmp_path, config, "--init-from", str(tmp_path / "hf"))
    found = restore_params(find_checkpoint(tmp_path / "run"))
    for tree in (found, params):  # what fills a table up has no file to come from
        tree["words"]["embedding"] = tree["words"]["embedding"][:262]
    assert_bit_equal(found, params)


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, capsys):
    source = texts(tmp_path)
    model = 'tiny_bert(architecture="BertForSequenceClassification", num_labels={})'
    for labels, objective, message in (
        ("4", "SequenceClassification()", "set --model.num-labels 3"),
        ('3, label_names=("a", "c", "b")', "SequenceClassification()", "the class 'b' where the"),
        ("3", "QuestionAnswering()", "needs answer_spans, which BertForSequenceClassification"),
        (
            "3",
            "SequenceClassification(loss='mse')",
            "learns the labels 'numbers', which the LabelledSource of",
        ),
    ):
        config = write_config(tmp_path, source, model.format(labels), objective)
        assert main(["train", config, "--workdir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
