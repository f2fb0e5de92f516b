"""Rows of answered conversations, for reward models."""

from __future__ import annotations

import json

import pytest

from flax_transformers.data.tokenizers.facts import TEMPLATE_FILE
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.answers import AnsweredRows, answered_examples
from flax_transformers.evaluation.prediction.examples import TextRows
from flax_transformers.evaluation.prediction.heads import Rewards, RowFile, head_of
from flax_transformers.post_training.chat_template import ChatTemplate
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.testing import tiny_architecture

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows_of(folder, *rows, name="rows.jsonl", **settings):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return AnsweredRows(str(folder / name), **settings).rows()


def texts_of(rows, tokenizer=None, vocab_size=262):
    config = tiny_architecture("LlamaForSequenceClassification", vocab_size=vocab_size)
    return TextRows(rows, tokenizer or ByteTokenizer(), config)


def test_messages_are_read_by_the_template_and_texts_end_with_the_end_token(tmp_path):
    rows = rows_of(
        tmp_path, {"messages": TURNS}, {"text": " ab "}, {"prompt": "a", "completion": "b"}
    )
    found = answered_examples(texts_of(rows), 100).ids
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(found[0]) == ChatTemplate().render(TURNS)
    expected = [*tokenizer.encode_prompt("ab").tolist(), tokenizer.vocabulary.eos_id]
    assert found[1].tolist() == found[2].tolist() == expected


def test_plain_texts_may_be_in_another_field_and_in_a_table(tmp_path):
    row = {"said": "ab", "prompt": "a", "completion": "c"}
    (document,) = (one.document for one in rows_of(tmp_path, row, text_field="said"))
    assert document.completions == ("ab",)
    (tmp_path / "rows.csv").write_text("text\nab\n")
    (document,) = (one.document for one in AnsweredRows(str(tmp_path / "rows.csv")).rows())
    assert document.completions == ("ab",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " "}, "rows.jsonl:1 has no text; correct the row"),
        ({"text": 3}, "rows.jsonl:1 .* 'text', not text"),
        ({"other": "a"}, "rows.jsonl:1 has none of the fields"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rows.jsonl:1 has 2 answers, of which"),
        ({"messages": TURNS[:1]}, "has no assistant turn"),
    ],
)
def test_a_row_that_is_no_answered_conversation_is_named(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, row)
    with pytest.raises(UserError, match="holds no rows"):
        rows_of(tmp_path)


def test_rows_that_the_model_does_not_take_are_named(tmp_path):
    rows = rows_of(tmp_path, {"text": "ab"}, {"messages": TURNS})
    with pytest.raises(
        UserError, match="row 2 has .* tokens, but the model takes 10; leave it out"
    ):
        answered_examples(texts_of(rows), 10)
    with pytest.raises(UserError, match="text of row 1 has the token .* only 90 tokens"):
        answered_examples(texts_of(rows, vocab_size=90), 100)
    refuses = ByteTokenizer(files={TEMPLATE_FILE: b"{{ raise_exception('no') }}"})
    with pytest.raises(UserError, match="row 2 cannot be rendered: .*no; correct it"):
        answered_examples(texts_of(rows, refuses), 100)


def test_a_run_of_a_reward_model_has_a_head_of_its_own():
    head = head_of(RewardModel())
    assert isinstance(head, Rewards) and head.length(512, 96) == 512
    with pytest.raises(UserError, match="--second-field is b"):
        head.inputs(RowFile("rows.jsonl", second_field="b"))
