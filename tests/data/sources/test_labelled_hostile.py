"""Readers of labelled texts on TFDS data and on random data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.errors import UserError

GOOD = {
    "a.jsonl": b'{"text": "a text", "label": "x"}\n{"text": "another", "label": "y"}\n',
    "a.json": b'{"train": [["a text", "x"], ["another", "y"]], "test": []}',
    "a.csv": b'text,label\n"a, text",x\n"two\nlines",y\n',
    "a.tsv": b"text\tlabel\na text\tx\nanother\ty\n",
    "a.conllu": b"# text\n1\tHe\the\tPRON\n2-3\tisn't\t_\t_\n2\tis\tbe\tAUX\n\n1\tYes\tyes\tINTJ\n",
    "squad.json": json.dumps(
        {"data": [{"title": "t", "paragraphs": [{"context": "It was 1870.", "qas": [
            {"id": 1, "question": "When?", "answers": [{"text": "1870", "answer_start": 7}]}
        ]}]}]}
    ).encode(),
}  # fmt: skip


def reader(name, path):
    if name == "a.conllu":
        return TaggedSource(path, on_invalid="skip")
    if name == "squad.json":
        return QuestionSource(path, on_invalid="skip")
    if name == "a.json":
        return LabelledSource(path, text_field="0", label_field="1", on_invalid="skip")
    return LabelledSource(path, on_invalid="skip")


@pytest.mark.parametrize("name", GOOD)
def test_garbage_yields_documents_or_one_user_error(name, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    source = reader(name, str(path))
    path.write_bytes(GOOD[name])
    assert list(sources.read_documents(source))
    for trial in range(150):
        content = bytearray(GOOD[name])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(content)))
            if trial % 3 == 0:
                del content[place : place + int(rng.integers(1, 30))]
            else:
                content[place : place + trial % 2] = rng.bytes(int(rng.integers(1, 4)))
            if not content:
                break
        path.write_bytes(bytes(content))
        try:
            documents = [document for _, document in sources.read_documents(source)]
        except UserError:
            continue
        for document in documents:
            assert all(isinstance(text, str) and "\0" not in text for text in document.text)
            assert document.whole.encode()


@pytest.mark.slow
def test_tfds_data_has_names_of_classes_and_nested_answers(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "title": tfds.features.Text(),
            "context": tfds.features.Text(),
            "question": tfds.features.Text(),
            "answers": tfds.features.Sequence(
                {"text": tfds.features.Text(), "answer_start": np.int32}
            ),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        }
    )

    class Asked(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n, label in enumerate((1, 0, -1)):
                answers = {"text": ["1870"], "answer_start": [7]}
                fields = {"context": "It was 1870.", "question": f"When {n}?", "title": "t"}
                yield n, {"id": f"q{n}", "answers": answers, "label": label, **fields}

    tfds.disable_progress_bar()
    Asked(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    path = f"tfds:{tmp_path}/asked/1.0.0"
    source = LabelledSource(path, text_field="question", second_field="context", on_invalid="skip")
    found = [(d.text, d.labels) for _, d in sources.read_documents(source)]
    assert sorted(found) == [
        (("When 0?", "It was 1870."), ("yes",)),
        (("When 1?", "It was 1870."), ("no",)),
    ]
    asked = [document for _, document in sources.read_documents(QuestionSource(path))]
    assert {one.answers for one in asked} == {((7, 11),)} and {one.group for one in asked} == {"t"}
