"""Questions: positions of answers in characters and tokens, and windows over long texts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.sources.squad import (
    QuestionSource,
    _example,
    question_of_record,
    token_spans,
)
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.question_answering import QuestionAnswering

CONTEXT = (
    "  In 1870 Zoë\u2019s ﬁne café — 中国 — opened;\n\n it closed in (1939). A naïve </s> [SEP] end"
)
ANSWERS = ("1870", "Zoë\u2019s", "ﬁne café", "中国", "closed", "1939", "naïve", "end")


def squad(*articles):
    """Articles of (title, context, questions); a question is (text, answers or None)."""
    data = []
    for title, context, questions in articles:
        qas = [
            {
                "id": f"{title}-{number}",
                "question": text,
                "is_impossible": answers is None,
                "answers": [
                    {"text": a, "answer_start": context.index(a)} for a in answers or (context[:2],)
                ],
            }
            for number, (text, answers) in enumerate(questions)
        ]
        data.append({"title": title, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": data}


def write(folder, *articles):
    (folder / "squad.json").write_text(json.dumps(squad(*articles)))
    return QuestionSource(str(folder / "squad.json"))


QUESTIONS = [(f"what is number {i}?", (answer,)) for i, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "bytes"])
def test_tokens_of_an_answer_give_back_its_text(kind):
    size = 90 if kind == "wordpiece" else 296
    config = TokenizerConfig(kind, vocab_size=size, lowercase=kind != "bytes")
    known = CONTEXT.replace("中国", "")  # characters of several pieces, or of an unknown one
    tokenizer = train_tokenizer(config, [known, "in the of it was café ﬁne naïve " * 3])
    ((_, offsets),) = tokenizer.encode_with_offsets([CONTEXT])
    assert len(offsets) == len(tokenizer.encode_batch([CONTEXT])[0])
    assert (np.diff(offsets[:, 0]) >= 0).all() and (offsets[:, 1] <= len(CONTEXT)).all()
    starts = [CONTEXT.index(answer) for answer in ANSWERS]
    spans = token_spans([(s, s + len(a)) for s, a in zip(starts, ANSWERS, strict=True)], offsets)
    found = [CONTEXT[offsets[a, 0] : offsets[b, 1]].strip() for a, b in spans]
    assert found == list(ANSWERS)
    first, last = spans[ANSWERS.index("中国")]
    ids = tokenizer.encode_batch([CONTEXT])[0][first : last + 1]
    assert tokenizer.decode(ids).replace(" ", "") == (
        "[UNK]" * 2 if kind == "wordpiece" else "中国"
    )


def prepared(source, folder, pieces=90, **settings):
    tokenizer = TokenizerConfig("wordpiece", vocab_size=pieces)
    data = TextData(source=source, tokenizer=tokenizer, shards=2, **settings)
    return prepare(data, folder / "store")


def test_the_tokens_of_a_text_do_not_depend_on_its_answer(tmp_path):
    store = prepared(write(tmp_path, ("a", CONTEXT, QUESTIONS)), tmp_path, validation_fraction=0)
    examples = store.examples("train", QuestionAnswering().window_spec(384))
    rows = [examples.read(number, None)["tokens"].tolist() for number in range(len(examples))]
    assert len(rows) == len(ANSWERS) and all(row == rows[0] for row in rows)


def test_windows_cover_every_token_and_mark_the_answers_within_them(tmp_path):
    context = " ".join(f"w{i}" for i in range(40))
    questions = [("where?", (f"w{i}",)) for i in range(40)] + [("nowhere?", None)]
    source = write(tmp_path, ("a", context, questions))
    store = prepared(source, tmp_path, pieces=60, validation_fraction=0)
    objective = QuestionAnswering(doc_stride=5, max_question_length=8)
    examples = store.examples("train", objective.window_spec(32))
    covered: dict[int, set[int]] = {}
    marked: dict[int, list[list[int]]] = {}
    for number in range(len(examples)):
        raw = examples.read(number, None)
        row = objective.prepare(raw, None, store.vocabulary, 32)
        document, offset = examples.document_of(number), int(raw["offset"])
        covered.setdefault(document, set()).update(range(offset, offset + len(raw["tokens"])))
        inside = slice(int(row["context_start"]), int(row["context_end"]))
        np.testing.assert_array_equal(row["input_ids"][inside], raw["tokens"])
        if row["start"]:
            ids = row["input_ids"][int(row["start"]) : int(row["end"]) + 1]
            marked.setdefault(document, []).append(store.tokenizer.decode(ids))
    edges = np.append(0, store.train.sentence_ends).reshape(-1)
    for document in range(41):
        assert covered[document] == set(range(edges[2 * document + 2] - edges[2 * document + 1]))
    words = [f"w{i}" for i in range(40)]
    assert sorted(words) == sorted(text.replace(" ", "") for texts in marked.values()
                                   for text in texts[:1])  # fmt: skip
    assert len(marked) == 40  # and the question without an answer has none


def test_articles_are_held_out_as_a_whole(tmp_path):
    articles = [(f"title {n}", f"{CONTEXT} {n}", QUESTIONS) for n in range(12)]
    store = prepared(write(tmp_path, *articles), tmp_path, validation_fraction=0.4)
    held = [
        question_of_record(store.validation.record(i))
        for i in range(store.validation.num_documents)
    ]
    titles = [question.name.split("-")[0] for question in held]
    assert 0 < len(set(titles)) < 12
    assert all(titles.count(title) == len(QUESTIONS) for title in set(titles))
    context, (start, end) = held[0].text[1], held[0].answers[0]
    assert context[start:end] in ANSWERS
    assert store.train.record(0) == b""  # only what is scored is kept


@pytest.mark.parametrize("title", ["", None])
def test_articles_without_titles_are_held_out_each_by_itself(title, tmp_path):
    articles = [(title, f"{CONTEXT} {n}", QUESTIONS) for n in range(12)]
    found = sources.read_documents(write(tmp_path, *articles))
    groups = {document.group for _, document in found}
    assert len(groups) == 12


def test_questions_of_tfds_without_titles_are_held_out_by_their_context():
    answers = {"answer_start": np.array([0]), "text": ["a"]}
    row = {"id": "1", "title": "", "context": "a text", "question": "what?", "answers": answers}
    decoder = SimpleNamespace(text=lambda value, _: value)
    assert _example(decoder, row, "row 1").group == "a text"
    assert _example(decoder, row | {"title": "A"}, "row 1").group == "A"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            {"answers": [{"text": "1870", "answer_start": 4}]},
            "'1870' is not at character 4",
        ),
        ({"answers": [{"text": "1870"}]}, "an answer without answer_start or text"),
        ({"question": " "}, "has no question"),
        ({"question": 3}, "has a int in 'question', not text"),
        ({"id": "\ud800"}, "is not valid UTF-8"),
    ],
)
def test_a_bad_question_is_named_or_skipped_and_counted(damage, said, tmp_path):
    content = squad(("a", CONTEXT, QUESTIONS[:2]))
    content["data"][0]["paragraphs"][0]["qas"][1].update(damage)
    (tmp_path / "squad.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        list(sources.read_documents(QuestionSource(str(tmp_path / "squad.json"))))
    assert said in str(error.value)
    counts = Counts()
    source = QuestionSource(str(tmp_path / "squad.json"), on_invalid="skip")
    assert len(list(sources.read_documents(source, counts=counts))) == 1
    assert counts.invalid == 1


def test_an_id_may_be_a_number_or_text_that_is_replaced(tmp_path):
    content = squad(("a", CONTEXT, QUESTIONS[:3]))
    rows = content["data"][0]["paragraphs"][0]["qas"]
    rows[0]["id"], rows[1]["id"] = 7, "a\ud800"
    del rows[2]["id"]
    (tmp_path / "squad.json").write_text(json.dumps(content))
    source = QuestionSource(str(tmp_path / "squad.json"), on_invalid="replace")
    found = [document for _, document in sources.read_documents(source)]
    assert [question_of_record(one.record).name for one in found] == ["7", "a" + 3 * "\ufffd", ""]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"data": 3}', b'{"data": [{}]}', b"\xff\xfe"])
def test_a_file_in_another_format_raises_a_user_error(content, tmp_path):
    (tmp_path / "squad.json").write_bytes(content)
    with pytest.raises(UserError, match="is not in the format of SQuAD"):
        list(sources.read_documents(QuestionSource(str(tmp_path))))
