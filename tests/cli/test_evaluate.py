"""Evaluation sets: scored beside the held-out data by ``train`` and ``evaluate``."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

import flax_transformers as ft
from flax_transformers.cli.evaluate import Evaluate, _log_other_values, _with_sets
from flax_transformers.cli.main import main
from flax_transformers.config_json import from_json, to_json
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import read_documents
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.report import table_of_sets
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.runtime import evaluation_sets, fitted_data, prepared_data
from flax_transformers.testing import tiny_bert, tiny_config
from flax_transformers.training.check_run import check_config
from flax_transformers.training.config import Evaluation
from tests.data.images.test_dataset import write_folder


def write_rows(path, classes, count=12):
    """Texts of ``classes``, a letter each; no two files share one."""
    rows = [
        {"text": f"{path.stem} {i} {classes[i % len(classes)]}", "label": classes[i % len(classes)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LabelledSource(str(path))


def classifier(folder, sets=(), **data):
    train = write_rows(folder / "train.jsonl", "aab")
    held_out = write_rows(folder / "held_out.jsonl", "abb")
    own = TextData(
        source=train,
        validation_source=held_out,
        tokenizer=TokenizerConfig("bytes"),
        shards=1,
        store=str(folder / "store"),
        **data,
    )
    model = replace(tiny_bert(), architecture="BertForSequenceClassification", num_labels=2)
    config = tiny_config(
        "", "", steps=2, batch_size=8, sequence_length=32, model=model,
        objective=SequenceClassification(), data=own,
    )  # fmt: skip
    return replace(config, evaluation=replace(config.evaluation, sets=tuple(sets)))


@pytest.mark.slow
def test_sets_are_scored_like_held_out_data_and_change_nothing_else(
    tmp_path, one_device, compiled_once
):
    other = write_rows(tmp_path / "other.jsonl", "ba")
    sets = [
        EvaluationSet("same", LabelledSource(str(tmp_path / "held_out.jsonl"))),
        EvaluationSet("other", other),
    ]
    without = ft.train(classifier(tmp_path), tmp_path / "without").metrics
    found = ft.train(classifier(tmp_path, sets), tmp_path / "with").metrics
    own = {name: value for name, value in without.items() if name.startswith("eval/")}
    assert {"eval/loss", "eval/accuracy", "eval/macro_f1"} <= own.keys()
    assert {name: found[name] for name in own} == own
    assert {name.replace("eval/", "eval/same/"): value for name, value in own.items()}.items() <= (
        found.items()
    )
    assert found["eval/other/loss"] != own["eval/loss"]
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / run) if "train/loss" in row]
        for run in ("with", "without")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_evaluate_prints_a_table_over_sets_that_the_run_never_saw(
    tmp_path, capsys, caplog, one_device
):
    ft.train(classifier(tmp_path), tmp_path / "run")
    write_rows(tmp_path / "x.jsonl", "ab", 10)
    run, sets = str(tmp_path / "run"), ["--sets", f"x={tmp_path}/x.jsonl"]
    capsys.readouterr()
    assert main(["evaluate", run, *sets]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["majority_class_accuracy_x"] == 0.5
    assert "eval/f1 is the F1 of the class 'b'" in caplog.text
    table = [
        line.split() for line in caplog.text.splitlines() if line.split()[:1] in (["x"], ["set"])
    ]
    assert table[0][1:4] == ["accuracy", "f1", "loss"]
    assert table[1][1] == f"{scores['eval/x/accuracy']:.4f}"

    assert main(["evaluate", run, "--sets", "x"]) == 2
    assert "give a name and a path" in capsys.readouterr().err
    write_rows(tmp_path / "y.jsonl", "abc")
    assert main(["evaluate", run, "--sets", f"y={tmp_path}/y.jsonl"]) == 2
    assert "'c'" in (message := capsys.readouterr().err)
    assert "not among the classes of the training documents" in message


@pytest.mark.slow
def test_evaluate_decodes_with_the_settings_that_are_given(
    tmp_path, monkeypatch, capsys, one_device, compiled_once
):
    def no_scores(config, prepared, model, *others):
        decoded.append((config.model.generation.num_beams, model.config.generation.num_beams))
        return []

    decoded, run = [], str(tmp_path / "run")
    ft.train(classifier(tmp_path), run)
    monkeypatch.setattr("flax_transformers.evaluation.tasks.evaluators", no_scores)
    assert main(["evaluate", run, "--model.generation.num-beams", "4"]) == 0
    assert decoded == [(4, 4)]
    capsys.readouterr()
    assert main(["evaluate", run, "--model.hidden-size", "96"]) == 2
    assert "leave --model.hidden-size out" in capsys.readouterr().err


def test_a_set_keeps_the_classes_and_the_tokenizer_of_the_training_data(tmp_path):
    few = EvaluationSet("few", write_rows(tmp_path / "few.jsonl", "b"))
    config = classifier(tmp_path, [few])
    ((name, data),) = evaluation_sets(config, prepared_data(config.data))
    assert name == "few"
    assert data.label_names == ("a", "b")
    assert data.validation.labels(0).tolist() == [1]
    assert data.validation.num_documents == 12
    assert data.train.directory == str(tmp_path / "store")
    assert open_dataset(config.data.of_evaluation_set(few, ("a", "b"))).train.num_documents == 0


@pytest.mark.parametrize("classes", [("dog", "wolf"), ("dog",)])
def test_images_of_a_set_have_the_classes_of_the_training_images(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pets = ImageSource(str(write_folder(tmp_path / "pets")))
    same, other = tmp_path / "same", tmp_path / "other"
    write_folder(same, splits=("train",))
    write_folder(other, splits=("train",), classes=classes)
    data = ImageData(source=replace(pets, label_names=("Katze", "Hund")))
    sets = [EvaluationSet(path.name, ImageSource(str(path))) for path in (same, other)]
    config = replace(classifier(tmp_path, sets), data=data, objective=ImageClassification())
    prepared = prepared_data(data)
    with pytest.raises(UserError, match=rf"set 'other' has the classes '{classes[0]}'"):
        evaluation_sets(config, prepared)
    learns_none = replace(config, objective=MaskedImage())
    assert len(evaluation_sets(learns_none, prepared)) == 2
    probed = replace(config.evaluation, probes=("knn",))
    with pytest.raises(UserError, match=r"set 'other' has the classes"):
        evaluation_sets(replace(learns_none, evaluation=probed), prepared)
    config = replace(config, evaluation=replace(config.evaluation, sets=tuple(sets[:1])))
    ((_, found),) = evaluation_sets(config, prepared)
    assert found.label_names == ("Katze", "Hund") and len(found.validation) == 12


def test_tokens_of_a_set_that_the_model_does_not_know_are_refused(tmp_path):
    more = EvaluationSet("more", write_rows(tmp_path / "more.jsonl", "ab"))
    (tmp_path / "more.jsonl").write_text('{"text": "\\u00ff", "label": "a"}\n')
    config = classifier(tmp_path, [more])
    config = replace(config, model=replace(config.model, vocab_size=190))
    prepared = fitted_data(config, prepared_data(config.data))
    with pytest.raises(UserError, match=r"sets/more has the token .* but model.vocab_size is 190"):
        evaluation_sets(config, prepared)


def test_a_store_of_a_set_with_another_tokenizer_is_refused(tmp_path):
    rows = EvaluationSet("rows", write_rows(tmp_path / "rows.jsonl", "ab"))
    config = classifier(tmp_path, [rows])
    source = replace(config.data.source, label_names=("a", "b", "x"))
    trained = TokenizerConfig("wordpiece", vocab_size=31)
    data = replace(config.data, source=source, tokenizer=trained)
    first = replace(config, data=data)
    evaluation_sets(first, prepared_data(data))
    write_rows(tmp_path / "train.jsonl", "xxa")
    data = replace(data, store=str(tmp_path / "second"))
    prepared = prepared_data(data)
    (tmp_path / "second" / "sets").symlink_to(tmp_path / "store" / "sets")
    with pytest.raises(UserError, match=r"set 'rows' was prepared in .* another tokenizer"):
        evaluation_sets(replace(config, data=data), prepared)


def test_sets_without_a_store_have_one_for_each_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = EvaluationSet("rows", write_rows(tmp_path / "rows.jsonl", "ab"))
    config = classifier(tmp_path, [rows])
    data = replace(config.data, store=None, tokenizer=TokenizerConfig("wordpiece", vocab_size=31))
    folders = set()
    for classes in ("aab", "xyxab"):
        write_rows(tmp_path / "train.jsonl", classes)
        data = replace(data, source=replace(data.source, label_names=("a", "b", "x", "y")))
        ((_, found),) = evaluation_sets(replace(config, data=data), prepared_data(data))
        folders.add(found.validation.directory)
    assert len(folders) == 2


def test_questions_of_a_set_keep_what_they_are_scored_with(tmp_path):
    answers = [{"text": "two", "answer_start": 4}]
    entry = {"context": "one two", "qas": [{"id": "q", "question": "which?", "answers": answers}]}
    text = json.dumps({"data": [{"title": "t", "paragraphs": [entry]}]})
    (tmp_path / "train.json").write_text(text)
    source = QuestionSource(str(tmp_path / "train.json"))
    own = EvaluationSet("own", source)
    config = classifier(tmp_path, [own])
    data = TextData(
        source=source, validation_fraction=0, tokenizer=TokenizerConfig("bytes"), shards=1,
        store=str(tmp_path / "questions"),
    )  # fmt: skip
    config = replace(config, data=data, objective=QuestionAnswering())
    ((_, found),) = evaluation_sets(config, prepared_data(data))
    assert b"two" in found.validation.record(0)


def test_a_mixture_has_sets_that_no_component_holds(tmp_path):
    sources = {name: write_rows(tmp_path / f"{name}.jsonl", "ab") for name in ("de", "en", "fr")}
    data = MixedText(
        components=tuple(Component(name=name, source=sources[name]) for name in ("de", "en")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.3,
        shards=1,
        store=str(tmp_path / "mixture"),
    )
    config = replace(classifier(tmp_path, [EvaluationSet("fr", sources["fr"])]), data=data)
    ((name, found),) = evaluation_sets(config, prepared_data(data))
    assert (name, found.validation.num_documents, found.train.num_documents) == ("fr", 12, 0)


def test_images_of_a_set_are_those_of_its_source_alone(tmp_path):
    from PIL import Image

    for folder, count in (("train", 4), ("more", 3)):
        for label in "ab":
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(count):
                shade = 10 * i + ord(label) + len(folder)
                Image.new("L", (8, 8), shade).save(tmp_path / folder / label / f"{i}.png")
    data = ImageData(
        source=ImageSource(str(tmp_path / "train")), validation_fraction=0, channels=1,
        store=str(tmp_path / "images"),
    )  # fmt: skip
    one = EvaluationSet("more", ImageSource(str(tmp_path / "more")))
    config = replace(classifier(tmp_path, [one]), data=data)
    ((_, found),) = evaluation_sets(config, prepared_data(data))
    assert (len(found.train), len(found.validation)) == (8, 6)


def test_mistakes_in_sets_are_found_before_anything_is_read(tmp_path):
    rows = LabelledSource("missing.jsonl")
    with pytest.raises(UserError, match="has 'x' twice"):
        Evaluation(sets=(EvaluationSet("x", rows), EvaluationSet("x", rows)))
    with pytest.raises(UserError, match="letters, digits"):
        EvaluationSet("a/b", rows)
    with pytest.raises(UserError, match="'x' is a TaggedSource; give a LabelledSource"):
        check_config(classifier(tmp_path, [EvaluationSet("x", TaggedSource("x.conllu"))]))
    numbers = EvaluationSet("x", replace(rows, label="number"))
    with pytest.raises(UserError, match="learns the labels 'classes'"):
        check_config(classifier(tmp_path, [numbers]))


def test_sets_are_part_of_a_saved_config(tmp_path):
    config = classifier(tmp_path, [EvaluationSet("x", LabelledSource("x.csv", text_field="t"))])
    assert from_json(to_json(config)) == config


def test_prepare_writes_the_stores_of_sets(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", "ab")
    write_rows(tmp_path / "x.jsonl", "a")
    (tmp_path / "config.py").write_text(
        f"""
from dataclasses import replace
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import Evaluation


def get_config():
    source = LabelledSource({str(tmp_path / "train.jsonl")!r})
    other = replace(source, path={str(tmp_path / "x.jsonl")!r})
    data = TextData(source=source, tokenizer=TokenizerConfig("bytes"), shards=1,
                    validation_fraction=0)
    config = tiny_config("", "", data=data)
    return replace(config, evaluation=Evaluation(sets=(EvaluationSet("x", other),)))
"""
    )
    output = str(tmp_path / "prepared")
    command = ["prepare", str(tmp_path / "config.py"), "--output", output]
    assert main(command) == 0
    assert f"store: {output}/sets/x" in capsys.readouterr().out
    assert main([*command, "--verify"]) == 0


def test_a_score_that_is_not_finite_is_null(tmp_path, monkeypatch, capsys):
    scores = {"step": 2, "eval/loss": float("nan"), "eval/perplexity": float("inf")}
    monkeypatch.setattr(Evaluate, "_scores", lambda self, overrides: scores)
    assert main(["evaluate", "run", "--output", str(tmp_path / "scores.json")]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "scores.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == {
            "step": 2, "eval/loss": None, "eval/perplexity": None,
        }  # fmt: skip


def test_the_table_has_a_row_for_each_set_and_a_column_for_each_metric():
    scores = {"step": 3, "eval/loss": 0.5, "eval/loss_part": 1.0, "eval/x/loss": 0.25}
    guess = Baseline("majority class", "eval/x/accuracy", 0.5, 4, "texts", part="x")
    of_part = replace(guess, metric="eval/accuracy_part", part="part")
    table = table_of_sets(scores, ["x"], [guess, of_part])
    assert [line.split("  ")[0].strip() for line in table.splitlines()] == ["set", "held-out", "x"]
    assert table.splitlines()[0].split()[1:] == ["loss", "majority", "class", "(accuracy)"]
    assert table.splitlines()[1].split() == ["held-out", "0.5000", "-"]
    assert table.splitlines()[2].split() == ["x", "0.2500", "0.5000"]


def test_of_another_objective_only_its_type_is_named(tmp_path, monkeypatch, caplog):
    config = classifier(tmp_path)
    other = replace(config, objective=MaskedLM(), seed=1)
    monkeypatch.setattr("flax_transformers.restore.saved_config", lambda found: other)
    with caplog.at_level(logging.INFO):
        _log_other_values(config, None, "mine.py")
    assert caplog.messages == [
        "scoring with the values of mine.py, not with those of the run: objective.type "
        "'sequence_classification' (run: 'masked_lm')"
    ]


def test_a_set_of_one_path_is_refused_for_targets_in_a_file_of_their_own(tmp_path):
    config = ft.recipe("transformer_tatoeba")
    source = PairSource("train.en", target_path="train.de")
    config = replace(config, data=replace(config.data, source=source))
    with pytest.raises(UserError, match=r"names one file, test\.en, but .* two files of sources"):
        _with_sets(config, ["test=test.en"])


def test_a_set_is_of_no_split_of_the_training_data(tmp_path):
    (tmp_path / "test_sft.jsonl").write_text("")
    config = classifier(tmp_path)
    source = replace(config.data.source, split="train_sft")
    config = replace(config, data=replace(config.data, source=source))
    of = [f"a={tmp_path}/test_sft.jsonl", "b=rows.json.gz", "c=tfds:glue/mnli"]
    rows, inside, tfds = (one.source for one in _with_sets(config, of).evaluation.sets)
    assert [path.name for _, path in rows.files()] == ["test_sft.jsonl"]
    assert (inside.split, tfds.split) == ("train_sft", "train_sft")
    path = tmp_path / "mytest.json"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (whole,) = (one.source for one in _with_sets(config, [f"d={path}"]).evaluation.sets)
    assert [document.text for _, document in read_documents(whole)] == [("a",), ("b",)]
