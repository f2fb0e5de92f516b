"""Questions with choices, in the forms of published data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Invalid
from flax_transformers.data.sources.labelled import ChoiceSource, chosen
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.multiple_choice.objective import MultipleChoice


def documents(folder, rows, **fields):
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = sources.read_documents(ChoiceSource(str(file), **fields))
    return [(one.text, one.labels) for _, one in found]


def test_a_choice_of_swag_continues_the_second_sentence(tmp_path):
    row = {"sent1": "He sits.", "sent2": "She", "ending0": "runs.", "ending1": "eats.", "label": 1}
    fields = {
        "text_field": "sent1", "question_field": "sent2", "label_field": "label",
        "choice_fields": ("ending0", "ending1"),
    }  # fmt: skip
    assert documents(tmp_path, [row], **fields) == [(("He sits.", "She runs.", "She eats."), (1,))]
    (tmp_path / "swag.csv").write_text(
        "n,sent1,sent2,ending0,ending1,label\n0,He sits.,She,runs.,eats.,0\n"
    )
    found = [
        one for _, one in sources.read_documents(ChoiceSource(f"{tmp_path}/swag.csv", **fields))
    ]
    assert [(one.text[1:], one.labels) for one in found] == [(("She runs.", "She eats."), (0,))]


def test_a_choice_of_race_follows_the_question_or_fills_its_gap(tmp_path):
    row = {"article": "It rains.", "options": ["dry", "wet"], "answer": "B"}
    rows = [row | {"question": "How is it?"}, row | {"question": "It is _ outside."}]
    found = documents(
        tmp_path, rows, text_field="article", question_field="question", choice_fields=("options",)
    )
    assert found == [
        (("It rains.", "How is it? dry", "How is it? wet"), (1,)),
        (("It rains.", "It is dry outside.", "It is wet outside."), (1,)),
    ]


def test_choices_may_be_in_an_object_and_the_answer_a_text(tmp_path):
    row = {"question": "Which?", "choices": {"text": ["a dog", "a cat"]}, "answer": "a cat"}
    found = documents(tmp_path, [row], choice_fields=("choices.text",))
    assert found == [(("Which?", "a dog", "a cat"), (1,))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "C"}, "has the answer 'C', which is none of its 2 choices"),
        ({"answer": 2}, "has the answer 2, which is none of its 2 choices"),
        ({"answer": None}, "has the answer None"),
        ({"choices": ["one"]}, "has 1 choices; at least two are needed"),
        ({"choices": "one"}, "has no list of choices in 'choices'"),
        ({"choices": ["one", " "]}, "has an empty text or choice"),
        ({"choices": ["one", 2]}, "has a int in 'choice', not text"),
        ({"question": ""}, "has an empty text or choice"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, change, message):
    row = {"question": "Which?", "choices": ["one", "two"], "answer": 0}
    with pytest.raises(UserError, match=message):
        documents(tmp_path, [row, row | change])


def test_examples_have_all_choices_and_the_right_one(tmp_path):
    rows = [
        {"question": f"q{n}", "choices": ["a", "bb", "ccc"][: 2 + n % 2], "answer": n % 2}
        for n in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = TextData(
        source=ChoiceSource(str(file)), tokenizer=TokenizerConfig("bytes"), validation_fraction=0.0,
        shards=1, prepare_processes=1,
    )  # fmt: skip
    store = prepare(data, tmp_path / "store")
    with pytest.raises(UserError, match="has 3 choices, but objective.choices is 2; set --obj"):
        store.examples("train", MultipleChoice(choices=2).window_spec(32))
    examples = store.examples("train", MultipleChoice().window_spec(32))
    found = [examples.read(n, None) for n in range(len(examples))]
    texts = [
        [
            bytes((text - 3).astype(np.uint8)).decode()
            for text in _split(one["tokens"], one["text_ends"])
        ]
        for one in found
    ]
    known = {row["question"]: row for row in rows}
    assert sorted(text[0] for text in texts) == sorted(known)
    for (question, *choices), one in zip(texts, found, strict=True):
        assert choices == known[question]["choices"]
        assert one["labels"].tolist() == [known[question]["answer"]]


def _split(tokens, ends):
    return [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.mark.parametrize(
    ("label", "choices", "place"),
    [
        (3, "2 3 4 5", 3),
        ("4", "2 3 4 5", 2),  # there is no choice of this number
        ("1", "0 1", 1),  # number and text agree
        ("B", "x y", 1),
        ("3", "2 3 4 5", None),
        ("A", "B A", None),
    ],
)
def test_an_answer_that_names_two_choices_is_refused(label, choices, place):
    if place is None:
        with pytest.raises(Invalid, match="one of its choices and the place of another"):
            chosen(label, choices.split(), "rows.jsonl:1")
    else:
        assert chosen(label, choices.split(), "rows.jsonl:1") == place
