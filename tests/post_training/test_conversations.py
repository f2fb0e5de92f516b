"""The shapes of records of conversations and preferences, and what is said of wrong ones."""

import math

import pytest

from flax_transformers.data.sources.documents import Decoder, Invalid
from flax_transformers.post_training.conversations import _row, conversation


def said(*turns, roles=("user", "assistant")):
    return tuple(
        {"role": roles[i % 2], "content": content} for i, content in enumerate(turns)
    )  # fmt: skip


def test_messages_and_sharegpt_are_one_conversation():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    for row in ({"messages": list(said("Hi", "Hello"))}, {"conversations": turns}):
        found = conversation(row)
        assert (found.prompt, found.completions) == ((), (said("Hi", "Hello"),))


def test_a_call_of_a_tool_needs_no_text():
    call = [{"name": "f", "arguments": {}}]
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": None, "tool_calls": call},
    ]
    (found,) = conversation({"conversations": turns}).completions
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": call}


def test_the_field_system_is_the_first_message():
    (turns,) = conversation(
        {"messages": list(said("Hi", "Hello")), "system": "Be kind."}
    ).completions
    assert turns[0] == {"role": "system", "content": "Be kind."}


def test_alpaca_has_an_instruction_with_an_input_and_a_history():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert conversation(row).completions == (said("Hi", "Hello", "Add\n\n1 2", "3"),)


def test_prompt_and_completion_are_texts_or_messages():
    found = conversation({"prompt": "Hi", "completion": "Hello"})
    assert (found.prompt, found.completions) == ("Hi", ("Hello",))
    found = conversation({"prompt": list(said("Hi")), "completion": list(said("Hi", "Hello"))[1:]})
    assert (found.prompt, found.completions) == (said("Hi"), (said("Hi", "Hello")[1:],))
    found = conversation({"prompt": list(said("Hi")), "completion": "Hello"})
    assert found.completions == (said("Hi", "Hello")[1:],)


@pytest.mark.parametrize("prompt", [{"prompt": list(said("Hi"))}, {}])
def test_a_prompt_that_both_answers_repeat_is_one_prompt(prompt):
    row = {**prompt, "chosen": list(said("Hi", "Hello")), "rejected": list(said("Hi", "Go"))}
    found = conversation({**row, "margin": 2})
    assert found.prompt == said("Hi")
    assert found.completions == (said("Hi", "Hello")[1:], said("Hi", "Go")[1:])
    assert (found.scores, found.margin) == ((1.0, 0.0), 2.0)


SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("fields", "first", "expected"),
    [
        ({"prompt": "Hi"}, (), said("Hi")),
        ({"prompt": "Hi\n"}, (), said("Hi")),
        ({"prompt": "Hi"}, (SYSTEM,), (SYSTEM, *said("Hi"))),
        ({"prompt": list(said("Hi"))}, (SYSTEM,), (SYSTEM, *said("Hi"))),
        ({"prompt": "Hi", "system": "S"}, (), (SYSTEM, *said("Hi"))),
        ({"prompt": "Hi", "system": "S"}, (SYSTEM,), (SYSTEM, *said("Hi"))),
    ],
)
def test_a_prompt_that_is_given_and_repeated_in_messages_is_read_once(fields, first, expected):
    good, bad = [*first, *said("Hi", "Hello")], [*first, *said("Hi", "Go")]
    answers = (said("Hi", "Hello")[1:], said("Hi", "Go")[1:])
    for row in (
        {"chosen": good, "rejected": bad},
        {"completions": [bad, good], "scores": [1, 2]},
        {"completion": good},
    ):
        found = conversation({**fields, **row})
        assert (found.prompt, found.completions) == (expected, answers[: len(found.completions)])


def test_a_prompt_that_is_not_repeated_stays_before_the_answers():
    answers = {"chosen": [*said("Hi", "Hello")[1:]], "rejected": [*said("Hi", "Go")[1:]]}
    assert conversation({"prompt": "Hi", **answers}).prompt == said("Hi")
    assert conversation({"prompt": "", **answers}).prompt == ()


HUMAN = {"from": "human", "value": "Hi"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "Hi", "input": ""}, said("Hi")),
        ({"instruction": "Add", "input": "1 2"}, said("Add\n\n1 2")),
        ({"instruction": "Hi", "history": [["A", "B"]]}, said("A", "B", "Hi")),
        ({"conversations": [HUMAN]}, said("Hi")),
        ({"messages": [SYSTEM, *said("Hi")]}, (SYSTEM, *said("Hi"))),
        ({"system": "", "question": "Hi"}, said("Hi")),
        ({"system": "S", "question": "Hi"}, (SYSTEM, *said("Hi"))),
        ({"question": "Hi", "messages": list(said("Hi")), "prompt": ""}, said("Hi")),
    ],
)
def test_answers_are_to_the_prompt_of_every_shape_of_record(fields, expected):
    good, bad = said("", "It is 4.")[1:], said("", "It is 5.")[1:]
    for one, other in (
        ("It is 4.", "It is 5."),
        ({"from": "gpt", "value": "It is 4."}, {"from": "gpt", "value": "It is 5."}),
        (list(good), list(bad)),
    ):
        for row in (
            {"chosen": one, "rejected": other},
            {"completions": [other, one], "scores": [1, 2]},
        ):
            found = conversation({**fields, **row})
            assert (found.prompt, found.completions) == (expected, (good, bad))


@pytest.mark.parametrize(
    ("question", "good", "bad"),
    [("Hello", "Hello! How can I help?", "Hello there."), ("I", "I am fine", "I am not")],
)
def test_answers_may_begin_with_the_words_of_a_short_question(question, good, bad):
    found = conversation({"question": question, "chosen": good, "rejected": bad})
    assert found.prompt == said(question)
    assert [answer[0]["content"] for answer in found.completions] == [good, bad]


def test_whole_conversations_may_have_a_system_message_that_messages_lack():
    good, bad = ([SYSTEM, *said("Hi", answer)] for answer in ("Hello", "Go"))
    for messages in (list(said("Hi")), "a note"):
        found = conversation({"messages": messages, "chosen": good, "rejected": bad})
        assert found.prompt == (SYSTEM, *said("Hi"))


def test_answers_that_are_whole_conversations_have_their_prompt_themselves():
    good, bad = list(said("Hi", "Hello")), list(said("Hi", "Go"))
    for fields in ({"messages": good}, {"messages": good[:1]}, {"question": "Hi", "input": "x"}):
        found = conversation({**fields, "chosen": good, "rejected": bad})
        assert (found.prompt, found.completions[0]) == (said("Hi"), said("Hi", "Hello")[1:])


def test_calls_of_functions_are_turns_of_an_assistant():
    roles = ("human", "function_call", "observation", "gpt", "tool_call", "tool_response")
    turns = [{"from": role, "value": "x"} for role in roles]
    (found,) = conversation({"conversations": turns}).completions
    expected = ["user", "assistant", "tool", "assistant", "assistant", "tool"]
    assert [one["role"] for one in found] == expected


def test_completions_are_ordered_by_their_scores():
    found = conversation({"prompt": "Hi", "completions": ["c", "a", "b"], "scores": [1, 3, 2]})
    assert (found.completions, found.scores) == (("a", "b", "c"), (3.0, 2.0, 1.0))


def test_tools_may_be_written_as_json_and_null_fields_are_left_out():
    row = {"messages": [*said("Hi"), {"role": "assistant", "content": "Yes", "name": None}]}
    found = conversation({**row, "tools": '[{"name": "add"}]'})
    assert found.tools == [{"name": "add"}] and "name" not in found.completions[0][1]


def test_values_of_parquet_files_are_bytes():
    row = {
        "messages": [{"role": b"user", "content": b"Hi"}, {"role": b"assistant", "content": b"A"}]
    }
    assert _row(Decoder(False), row, "Row 0").completions == (said("Hi", "A"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": list(said("Hi"))}, "has no assistant turn to learn from"),
        ({"messages": []}, "has no list of messages in 'messages'"),
        ({"messages": [{"role": "user"}]}, "has a message of 'user' without content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is of type int, not text"),
        ({"messages": ["Hi"]}, "has a str in 'messages', not a message"),
        ({"text": "Hi"}, "has none of the fields messages, .*it has text"),
        ({"prompt": "Hi", "completion": "  "}, "has no assistant turn to learn from"),
        (
            {"prompt": "Hi", "chosen": "b", "rejected": list(said("a"))},
            "has a plain text beside messages",
        ),
        (
            {"system": "S", "prompt": "a", "chosen": "b", "rejected": "c"},
            "has plain texts, and a system message, which only messages can have",
        ),
        ({"prompt": "a", "completions": ["b"], "scores": [1]}, "1 completions and 1 scores"),
        (
            {"question": "a", "instruction": "b", "chosen": "c", "rejected": "d"},
            "has a prompt in each of instruction, question; leave out all but one",
        ),
        (
            {"messages": list(said("a", "b")), "chosen": "c", "rejected": "d"},
            "has answers beside an answer in 'messages'; end that with the question",
        ),
        (
            {"question": "a?", "chosen": "Q: a? A: b", "rejected": "Q: a? A: c"},
            "has answers that all repeat 'question'; leave that out, or rename it",
        ),
        (
            {
                "messages": list(said("a", "b")),
                "chosen": [*said("c", "d")],
                "rejected": [*said("c", "e")],
            },
            "has 'messages' with which its answers do not begin",
        ),
        (
            {"prompt": "a", "completions": ["b", "c"], "scores": [1, "x"]},
            "score that is not a finite number",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "the margin 'x'"),
        ({"messages": list(said("Hi", "A")), "tools": "{"}, "has tools that are not JSON"),
        ({"instruction": 5}, "has 'instruction' of type int, not text"),
        ({"instruction": "a", "input": ["b"]}, "has 'input' of type list, not text"),
        ({"instruction": "a", "output": 7}, "has 'output' of type int, not text"),
        ({"messages": list(said("Hi", "A")), "system": 5}, "has 'system' of type int, not text"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "not a list of pairs of texts"),
        ({"instruction": "a", "output": "b", "history": 3}, "not a list of pairs of texts"),
        ({"instruction": "a", "output": "b", "history": [["a", 1]]}, "not a list of pairs of tex"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, "the margin nan"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "the margin 1000"),
        (
            {"prompt": "a", "completions": ["b", "c"], "scores": [1, math.nan]},
            "score that is not a finite number",
        ),
        ([1], "holds a JSON list, not an object with messages"),
    ],
)
def test_a_wrong_record_is_named_with_what_is_wrong(row, problem):
    with pytest.raises(Invalid, match=f"line 3 {problem}|line 3 .*{problem}"):
        _row(Decoder(False), row, "line 3")
