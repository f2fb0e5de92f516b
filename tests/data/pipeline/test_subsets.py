"""Subsets of the training examples."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare, training_examples
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.pipeline import examples as examples_module
from flax_transformers.data.pipeline.examples import Examples, subset
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.evaluation.report import introduce
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config
from flax_transformers.training.batches import training_batches


@dataclasses.dataclass(frozen=True)
class Numbers(Examples):
    """Examples that are their indices, of classes 0, 1 and 2."""

    count: int

    def __len__(self):
        return self.count

    def read(self, index, rng):
        return {"index": np.array(index)}

    @property
    def classes(self):
        return np.arange(self.count) % 3


def indices(found):
    rng = np.random.default_rng(0)
    return [int(found.read(i, rng)["index"]) for i in range(len(found))]


def test_a_subset_depends_on_the_seed_alone_and_a_smaller_one_is_part_of_it():
    ten = indices(subset(Numbers(500), 10, None, (), 3))
    assert len(set(ten)) == 10 and ten == sorted(ten)
    assert ten == indices(subset(Numbers(500), 10, None, (), 3))
    assert ten != indices(subset(Numbers(500), 10, None, (), 4))
    assert set(ten) < set(indices(subset(Numbers(500), 100, None, (), 3)))
    assert indices(subset(Numbers(5), 100, None, (), 3)) == [0, 1, 2, 3, 4]


@dataclasses.dataclass(frozen=True)
class Windows(Numbers):
    """The same, each said to be a document of its own."""

    @property
    def documents(self):
        return np.arange(self.count)


@pytest.mark.parametrize("count", [1, 10, 64, 65, 499, 500, 900])
def test_few_of_many_examples_are_chosen_without_arrays_of_all(count, monkeypatch):
    expected = indices(subset(Windows(500), count, None, (), 3))
    philox, sizes = np.random.Philox, []

    class Drawn:
        def __init__(self, key):
            self.bits = philox(key=key)

        def random_raw(self, size):
            sizes.append(size)
            return self.bits.random_raw(size)

    monkeypatch.setattr(examples_module, "_DRAWN_AT_ONCE", 64)
    monkeypatch.setattr(np.random, "Philox", Drawn)
    assert indices(subset(Numbers(500), count, None, (), 3)) == expected
    assert sum(sizes) == 500 and max(sizes) <= max(count, 64)


def test_classes_are_read_at_once_and_not_document_by_document(tmp_path, monkeypatch):
    prepared = prepare(text_data(tmp_path, rows(tmp_path / "rows.jsonl")))
    examples = training_examples(prepared, SequenceClassification().window_spec(16))
    rng = np.random.default_rng(0)
    expected = [int(examples.read(i, rng)["labels"][0]) for i in range(len(examples))]
    monkeypatch.delattr(TokenStore, "labels")
    assert examples.classes.tolist() == expected and set(expected) == {0, 1}


def test_a_balanced_subset_has_as_many_of_each_class():
    names = ("a", "b", "c")
    chosen = np.array(indices(subset(Numbers(300), None, 7, names, 0)))
    assert np.bincount(chosen % 3).tolist() == [7, 7, 7]
    more = indices(subset(Numbers(300), None, 8, names, 0))
    assert set(chosen.tolist()) < set(more)
    with pytest.raises(UserError, match="is 101, but the class 'a' has 100 training examples"):
        subset(Numbers(300), None, 101, names, 0)
    with pytest.raises(UserError, match="the class 'd' has 0"):
        subset(Numbers(300), None, 1, (*names, "d"), 0)
    with pytest.raises(UserError, match="the classes have no names; give label_names"):
        subset(Numbers(300), None, 1, (), 0)


def rows(path, count=40):
    lines = [{"text": f"text {i}", "label": "ab"[i % 4 == 0]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return LabelledSource(str(path))


def text_data(folder, source, **settings):
    return TextData(
        source=source,
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0,
        shards=2,
        store=str(folder / "store"),
        **settings,
    )


def test_training_reads_the_subset_and_no_other_example(tmp_path):
    data = text_data(tmp_path, rows(tmp_path / "rows.jsonl"), examples_per_class=3)
    prepared, objective = prepare(data), SequenceClassification()
    stream = training_batches(
        prepared, objective, sequence_length=16, batch_size=6, data=data, subset_seed=1
    )
    epochs = [next(stream) for _ in range(3)]
    texts = [sorted(map(bytes, batch["input_ids"].astype(np.uint8))) for batch in epochs]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 6
    assert np.bincount(epochs[0]["labels"]).tolist() == [3, 3]


def test_windows_of_one_question_stay_together(tmp_path):
    paragraphs = [
        {
            "context": f"{'word ' * 40}{i}",
            "qas": [
                {"id": str(i), "question": "q", "answers": [{"text": "word", "answer_start": 0}]}
            ],
        }
        for i in range(6)
    ]
    text = json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})
    (tmp_path / "questions.json").write_text(text)
    source = QuestionSource(str(tmp_path / "questions.json"))
    data = text_data(tmp_path, source, max_training_examples=2)
    prepared, spec = prepare(data), QuestionAnswering(max_question_length=8).window_spec(64)
    whole, chosen = training_examples(prepared, spec), training_examples(prepared, spec, data)
    assert len(whole) % 6 == 0 and len(whole) > 6
    assert len(chosen) == len(whole) // 3
    each = replace(data, max_training_examples=None, examples_per_class=1)
    with pytest.raises(UserError, match=r"no classes; set --data.max-training-examples"):
        training_examples(prepared, spec, each)


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_chosen_before_they_are_packed(packed, tmp_path, capsys):
    (tmp_path / "pairs.tsv").write_text("".join(f"de {i:02d}\ten {i:02d}\n" for i in range(40)))
    data = text_data(tmp_path, PairSource(str(tmp_path / "pairs.tsv")), max_training_examples=3)
    prepared, objective = prepare(data), SequenceToSequence(pack=packed)
    found = training_examples(prepared, objective.window_spec(24), data, 5)
    assert len(found) == (1 if packed else 3)
    rng = np.random.default_rng(0)

    def texts(examples):
        rows = [examples.read(i, rng) for i in range(len(examples))]
        return [
            bytes(text - 3)
            for row in rows
            for text in np.split(row["source_tokens"], row["source_ends"][:-1])
        ]

    alone = replace(objective, pack=False).window_spec(24)
    chosen = sorted(texts(training_examples(prepared, alone, data, 5)))
    assert sorted(texts(found)) == sorted(texts(pickle.loads(pickle.dumps(found)))) == chosen
    assert len(chosen) == 3
    more = training_examples(prepared, alone, replace(data, max_training_examples=9), 5)
    assert set(chosen) < set(texts(more))

    model = tiny_architecture("MarianMTModel")
    config = tiny_config("", "", model=model, objective=objective, data=data, sequence_length=24)
    introduce(replace(config, seed=5), prepared, tmp_path, [])
    assert "trained on a subset of 3 of 40 examples, chosen by seed 5" in capsys.readouterr().out


def test_a_run_prints_how_much_it_is_trained_on(tmp_path, capsys):
    data = text_data(tmp_path, rows(tmp_path / "rows.jsonl"), examples_per_class=3)
    model = replace(tiny_bert(), architecture="BertForSequenceClassification", num_labels=2)
    config = tiny_config("", "", model=model, objective=SequenceClassification(), data=data)
    introduce(replace(config, seed=5), prepare(data), tmp_path, [])
    said = "trained on a subset of 6 of 40 examples, 3 of each of 2 classes, chosen by seed 5"
    assert said in capsys.readouterr().out


def test_limits_that_contradict_each_other_are_refused(tmp_path):
    source = rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="exclude each other"):
        text_data(tmp_path, source, max_training_examples=3, examples_per_class=3)
    with pytest.raises(UserError, match="without components"):
        MixedText(components=(Component(name="a", source=source),), max_training_examples=3)
