"""Conversations and preferences as documents: the shapes in which they are published.

A conversation is a list of messages with a ``role`` and ``content``. One document is one or several
*sequences*: a whole conversation, or the answers to one prompt from the best to the worst.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.sources import row_files
from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import (
    LARGEST_NUMBER,
    Decoder,
    Document,
    Invalid,
    LabelKind,
    Where,
)
from flax_transformers.data.sources.records import MemoryTexts, Part, Records, Source
from flax_transformers.data.sources.row_files import ParquetFile, reading_parquet, row_of
from flax_transformers.errors import UserError
from flax_transformers.post_training.chat_template import Message, common_prefix
from flax_transformers.post_training.problems import Problems, Task, generated

Turns = tuple[Message, ...] | str
"""Messages, or plain text that no template changes."""

FIELDS = (
    "messages", "conversations", "instruction", "input", "output", "history", "prompt", "question",
    "completion", "completions", "scores", "chosen", "rejected", "margin", "system", "tools",
)  # fmt: skip
"""Fields that are read of a record."""
_EMBEDDED = 4000  # generated records
_DIGITS = (1, 5)  # fewest and most digits of a generated problem
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "function_response": "tool", "tool_response": "tool",
    "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation(Document):
    """One conversation, or several completions of one prompt.

    ``prompt``: what precedes each completion; empty for a conversation, in which every assistant
    turn is learned, while of a completion all of it is. ``scores``: one for each completion, from
    high to low. ``margin``: by how much the first is better (of two). ``where``: for messages.
    """

    prompt: Turns = ()
    completions: tuple[Turns, ...] = ()
    scores: tuple[float, ...] = ()
    margin: float = 0.0
    tools: Any = None
    where: str = ""


@dataclass(frozen=True)
class ConversationSource(Source):
    """A corpus of conversations or preferences (``ChatData.source``).

    ``path``: a file, a folder or a glob of jsonl, ndjson, json and parquet files, compressed or not
    as for a `LabelledSource`; or "embedded", generated problems with right and wrong
    answers.
    ``split``: of the files, as for every `Source`, or of a json file with named splits.
    ``problems``: what "embedded" generates instead, as plain texts: the training problems, each
    with its right answer and a wrong one (`preference_rows`).

    The shape of each record follows from its fields:

    - ``messages``: a list of objects with ``role`` and ``content`` (OpenAI); an assistant turn of
      ``weight`` 0 is not learned
    - ``conversations``: the same with ``from`` and ``value`` (ShareGPT)
    - ``instruction``, ``input``, ``output``, ``history`` (Alpaca)
    - ``prompt`` and ``completion``: messages, or plain texts that no template changes
    - ``chosen`` and ``rejected``, with ``prompt`` or with what they have in common at the
      beginning, and ``margin`` if there is one
    - ``prompt``, ``completions`` and ``scores``: several answers and a number for each

    A ``prompt`` that all answers repeat, as a text or as messages, is read once. Answers without a
    ``prompt`` are to the ``messages`` or ``conversations`` before them, to ``instruction``,
    ``input`` and ``history``, or to ``question``: whatever the record has.

    ``system`` is the first message of records that have it, ``tools`` is for the template. A record
    in which no assistant says anything is invalid.
    """

    problems: Problems | None = None

    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json", ".parquet")
    label_kind: ClassVar[LabelKind] = "spans"
    store_version: ClassVar[int] = 4
    # 1: parts of a user's turn were learned with some templates
    # 2: plain texts that name the start token got a second one, turns of weight 0 were learned
    # 3: answers without ``prompt`` had none, and calls of functions were no turns of an assistant

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problems is not None and self.path != "embedded":
            raise ranges.OutOfRange(
                f"data.source.problems are generated, but data.source.path is {self.path}; set the "
                'path to "embedded", or leave out the problems'
            )

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order; none for the embedded exercises."""
        return [] if self.path == "embedded" else super().files()

    def embedded_texts(self) -> Iterator[str]:
        rows = embedded_rows() if self.problems is None else preference_rows(self.problems)
        return map(json.dumps, rows)

    def parts(self) -> Iterator[Part]:
        if self.path == "embedded":
            yield Part(MemoryTexts(tuple(self.embedded_texts())), _row)
            return
        listing = self.listing()
        for _, path in listing.files:
            yield Part(_records(path, self, listing.inside), _row)


def _records(path: Path, source: ConversationSource, inside: bool) -> Records:
    if ending(path, source.endings) != ".parquet":
        return row_files.row_file(path, source.split, FIELDS, inside=inside)
    from pyarrow import parquet

    with reading_parquet(path):
        names = parquet.read_schema(path).names
    known = tuple(name for name in FIELDS if name in names)
    if not known:
        raise UserError(
            f"The parquet file {path} has none of the columns messages, conversations, "
            f"instruction, prompt, chosen; it has {', '.join(names)}."
        )
    return ParquetFile(path, (), known)


def _row(decoder: Decoder, content: Any, where: Where) -> Conversation:
    record = content.encode() if isinstance(content, str) else content
    found = conversation(_decoded(decoder, row_of(decoder, record, where), where), where)
    for turns in found.completions:
        answers = turns.strip() if isinstance(turns, str) else _says_something(turns)
        if not answers:
            raise Invalid(where, "has no assistant turn to learn from")
    return found


def _says_something(turns: Sequence[Message]) -> bool:
    return any(
        one["role"] == "assistant" and one.get("weight", 1) and _text_of(one).strip()
        for one in turns
    )


def conversation(row: Any, where: Where = "the record") -> Conversation:
    """The conversation in a record of any shape; raises `Invalid`, naming ``where``."""
    if not isinstance(row, dict):
        kind = "JSON list" if isinstance(row, list) else type(row).__name__
        raise Invalid(where, f"holds a {kind}, not an object with messages")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise Invalid(where, f"has tools that are not JSON ({error})") from error
    prompt, completions, scores = _turns(row, where)
    margin = row.get("margin") or 0.0
    if not _is_number(margin):
        raise Invalid(where, f"has the margin {margin!r}, which is not a finite number")
    texts = [prompt, *completions]
    return Conversation(
        tuple(_text_of(one) for turns in texts for one in _listed(turns)),
        group=None if not prompt else "\0".join(map(_text_of, _listed(prompt))),
        prompt=prompt,
        completions=completions,
        scores=scores,
        margin=float(margin),
        tools=tools,
        where=str(where),
    )


Parsed = tuple[Turns, tuple[Turns, ...], tuple[float, ...]]


def _turns(row: Mapping[str, Any], where: Where) -> Parsed:
    """Prompt, completions and their scores."""
    first = _text(row, "system", where)
    system = ({"role": "system", "content": first},) if first else ()
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _pair(row, system, where)
    if row.get("completions") is not None:
        return _scored(row, system, where)
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return (), (system + _messages(row[name], name, where),), ()
    if row.get("instruction") is not None:
        answer: Message = {"role": "assistant", "content": _text(row, "output", where)}
        return (), ((*system, *_alpaca(row, where), answer),), ()
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _either(row["prompt"], "prompt", where)
        completion = _either(row["completion"], "completion", where, "assistant")
        return (*_matching(*_apart(prompt, (completion,)), system, where), ())
    raise Invalid(
        where,
        "has none of the fields messages, conversations, instruction, prompt and completion, "
        f"chosen and rejected; it has {', '.join(row) or 'none'}",
    )


def _pair(row: Mapping[str, Any], system: tuple[Message, ...], where: Where) -> Parsed:
    chosen = _either(row["chosen"], "chosen", where, "assistant")
    rejected = _either(row["rejected"], "rejected", where, "assistant")
    given = _asked(row, (chosen, rejected), where)
    if given is not None:
        prompt, (chosen, rejected) = _apart(given, (chosen, rejected))
    else:
        if isinstance(chosen, str) is not isinstance(rejected, str):
            raise Invalid(where, "has a text and messages for chosen and rejected")
        shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if isinstance(chosen, str) and shared > 0 and chosen[shared - 1] == " ":
            shared -= 1
        shared = max(shared, 0)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return (*_matching(prompt, (chosen, rejected), system, where), (1.0, 0.0))


def _asked(row: Mapping[str, Any], answers: Sequence[Turns], where: Where) -> Turns | None:
    """What answers are given to: ``prompt``, or what other shapes of records have in its place.

    Empty if an empty ``prompt`` is all there is, and None without any, or if the answers are whole
    conversations. Raises `Invalid` for several prompts, and where the answers may repeat theirs.
    """
    if row.get("prompt") not in (None, "", []):
        return _either(row["prompt"], "prompt", where)
    nothing = None if row.get("prompt") is None else ""
    lists = (name for name in ("messages", "conversations") if isinstance(row.get(name), list))
    names = [name for name in lists if row[name]]
    found = {name: _messages(row[name], name, where) for name in names}
    if any(map(_is_whole, answers)):
        for name, turns in found.items():
            if not any(_begins_with(answer, turns) for answer in answers):
                raise Invalid(
                    where,
                    f"has {name!r} with which its answers do not begin; leave one of them out",
                )
        return nothing
    if row.get("instruction") or row.get("input"):
        found["instruction"] = _alpaca(row, where)
    if row.get("question"):
        found["question"] = ({"role": "user", "content": _text(row, "question", where)},)
    if not found:
        return nothing
    first, *others = found.values()
    if any(turns != first for turns in others):
        raise Invalid(
            where, f"has a prompt in each of {', '.join(found)}; leave out all but one of them"
        )
    name = next(iter(found))
    if first[-1]["role"] == "assistant":
        raise Invalid(
            where, f"has answers beside an answer in {name!r}; end that with the question"
        )
    texts = [answer for answer in answers if isinstance(answer, str)]
    same = texts[0][: common_prefix(min(texts), max(texts))] if len(texts) == len(answers) else ""
    if _repeats(same, _text_of(first[-1]).strip()):
        raise Invalid(
            where,
            f"has answers that all repeat {name!r}; leave that out, or rename it to 'prompt' if it "
            "precedes them",
        )
    return first


def _repeats(text: str, question: str) -> bool:
    """Whether ``text``, with which all answers begin, has the question in it. They may begin with
    the words of a short one, such as "Hello": it is a line, or follows a colon."""
    words = re.escape(question)
    framed = re.search(rf"(?:[:\n]\s*{words}|^{words}\s*\n)", text)
    return bool(question) and (framed is not None or (len(question) >= 20 and question in text))


def _is_whole(answer: Turns) -> bool:
    """Whether an answer is a conversation from its beginning."""
    if isinstance(answer, str):
        return False
    return next((one["role"] for one in answer if one["role"] != "system"), "") == "user"


def _begins_with(answer: Turns, turns: Sequence[Message]) -> bool:
    """Whether an answer begins with turns, of which the last may be another answer. Only one of
    the two may have a system message."""
    messages: tuple[Sequence[Any], ...] = (answer, turns)
    mine, theirs = ([one for one in each if one["role"] != "system"] for each in messages)
    count = min(len(theirs), len(mine) - 1)
    return mine[:count] == theirs[:count]


def _scored(row: Mapping[str, Any], system: tuple[Message, ...], where: Where) -> Parsed:
    answers, scores = row["completions"], row.get("scores")
    if not isinstance(answers, list) or not isinstance(scores, list):
        raise Invalid(where, "has no lists of completions and scores")
    if len(answers) != len(scores) or len(answers) < 2:
        raise Invalid(
            where,
            f"has {len(answers)} completions and {len(scores)} scores; give at least two of each",
        )
    if not all(map(_is_number, scores)):
        raise Invalid(where, "has a score that is not a finite number")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    turns = tuple(_either(answers[i], "completions", where, "assistant") for i in order)
    prompt, turns = _apart(_asked(row, turns, where) or "", turns)
    return (*_matching(prompt, turns, system, where), tuple(float(scores[i]) for i in order))


def _apart(prompt: Turns, answers: tuple[Turns, ...]) -> tuple[Turns, tuple[Turns, ...]]:
    """The prompt, and the answers without it: some data repeat it in each of them.

    Beside messages, a text is what the user says; the answers may begin with a system message.
    """
    lists = [answer for answer in answers if not isinstance(answer, str)]
    if len(lists) < len(answers):
        return prompt, answers
    first = lists[0][: lists[0][0]["role"] == "system"]
    if isinstance(prompt, str):
        asked = lists[0][len(first) : len(first) + 1]
        if [(one["role"], _text_of(one).strip()) for one in asked] != [("user", prompt.strip())]:
            asked = ({"role": "user", "content": prompt},)
        prompt = asked if prompt else ()
    whole = prompt if prompt[: len(first)] == first else first + prompt
    if all(answer[: len(whole)] == whole and len(answer) > len(whole) for answer in lists):
        return whole, tuple(answer[len(whole) :] for answer in lists)
    return prompt, answers


def _matching(
    prompt: Turns, completions: tuple[Turns, ...], system: tuple[Message, ...], where: Where
) -> tuple[Turns, tuple[Turns, ...]]:
    """Prompt and completions of one kind: all plain texts, or all messages."""
    plain = [isinstance(turns, str) for turns in (prompt, *completions)]
    if all(plain):
        if system:
            raise Invalid(
                where,
                "has plain texts, and a system message, which only messages can have; give prompt "
                "and answers as messages, or leave out 'system'",
            )
        return prompt, completions
    if all(plain[1:]) and not plain[0]:  # messages that are answered by texts
        completions = tuple(({"role": "assistant", "content": turns},) for turns in completions)
    elif any(plain[1:]):
        raise Invalid(where, "has a plain text beside messages; give both the same form")
    assert not isinstance(prompt, str)  # beside messages, `_apart` made it one
    return (prompt if prompt[: len(system)] == system else system + prompt), completions


def _either(value: Any, name: str, where: Where, role: str = "user") -> Turns:
    """A text, or messages; one message may stand for a list of one."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    return _messages(value, name, where, role)


def _messages(value: Any, name: str, where: Where, role: str = "user") -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Invalid(where, f"has text in {name!r}, not a list of messages") from error
    if not isinstance(value, list) or not value:
        raise Invalid(where, f"has no list of messages in {name!r}")
    return tuple(_message(one, name, where, role) for one in value)


def _message(one: Any, name: str, where: Where, role: str) -> Message:
    if not isinstance(one, dict):
        raise Invalid(where, f"has a {type(one).__name__} in {name!r}, not a message")
    fields = {key: value for key, value in one.items() if value is not None}
    if "from" in fields:  # ShareGPT
        fields["role"] = fields.pop("from")
        fields["content"] = fields.pop("value", fields.get("content"))
    fields.setdefault("role", role)
    fields["role"] = _ROLES.get(str(fields["role"]), str(fields["role"]))
    if fields.get("content") is None:
        if "tool_calls" not in fields:
            raise Invalid(where, f"has a message of {fields['role']!r} without content in {name!r}")
        fields["content"] = ""
    elif not isinstance(fields["content"], str | list):
        kind = type(fields["content"]).__name__
        raise Invalid(where, f"has a message whose content is of type {kind}, not text")
    if fields["role"] == "assistant" and fields.get("weight", 1) not in (0, 1):
        raise Invalid(where, f"has a message of the weight {fields['weight']!r}; give 0 or 1")
    return fields


def _alpaca(row: Mapping[str, Any], where: Where) -> tuple[Message, ...]:
    """The history and the instruction with its input, without the answer."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise Invalid(where, "has a history that is not a list of pairs of texts")
    asked = "\n\n".join(
        filter(None, (_text(row, name, where) for name in ("instruction", "input")))
    )
    before: tuple[Message, ...] = tuple(
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    )
    return (*before, {"role": "user", "content": asked})


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER


def _text(row: Mapping[str, Any], name: str, where: Where) -> str:
    """A field that is text; empty if it is missing."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise Invalid(where, f"has {name!r} of type {type(value).__name__}, not text")
    return value or ""


def _listed(turns: Turns) -> Sequence[Message]:
    return ({"content": turns},) if isinstance(turns, str) else turns


def _text_of(message: Message) -> str:
    """The text of a message, and what else a template may write of it."""
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(str(one.get("text", "")) for one in content if isinstance(one, dict))
    extra = [message[name] for name in ("tool_calls", "reasoning_content") if message.get(name)]
    return content + "".join(f"\n{one}" for one in extra)


def _decoded(decoder: Decoder, value: Any, where: Where) -> Any:
    """A record with text for bytes; in objects without fields of null, which parquet adds."""
    if isinstance(value, bytes):
        return decoder.text(value, where)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return decoder.unpaired(value, where)
        return value
    if isinstance(value, dict):
        decode = partial(_decoded, decoder, where=where)
        return {key: decode(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_decoded(decoder, one, where) for one in value]
    return value


def embedded_rows(count: int = _EMBEDDED) -> Iterator[dict[str, Any]]:
    """Problems of all tasks in turn: the prompt, the right answer and a wrong one.

    ``completion`` is the right answer too, so that they serve instruction tuning as well. No prompt
    is there twice.
    """
    seen: set[str] = set()
    tasks = get_args(Task)
    for number in range(100 * count):
        if len(seen) == count:
            return
        random = np.random.default_rng([number, count])
        digits = int(random.integers(_DIGITS[0], _DIGITS[1] + 1))
        prompt, right = generated(tasks[number % len(tasks)], digits, random)
        if prompt in seen:
            continue
        seen.add(prompt)
        answer = [{"role": "assistant", "content": right}]
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": answer,
            "chosen": answer,
            "rejected": [{"role": "assistant", "content": wrong_answer(right, random)}],
        }


def preference_rows(problems: Problems) -> Iterator[dict[str, str]]:
    """The training problems as plain texts: the prompt, the right answer and a wrong one.

    No prompt is there twice.
    """
    train, _ = problems.items()
    seen: set[str] = set()
    for number in range(len(train)):
        prompt, right = train.problem(number)
        if prompt not in seen:
            seen.add(prompt)
            wrong = wrong_answer(right, np.random.default_rng([number, problems.digits]))
            yield {"prompt": prompt, "chosen": right, "rejected": wrong}


def wrong_answer(right: str, random: np.random.Generator) -> str:
    """A number of as many digits that differs from the right one: one digit is changed, or the
    order of digits."""
    while True:
        digits = list(right)
        if random.random() < 0.5:
            digits[random.integers(len(digits))] = str(random.integers(10))
        else:
            random.shuffle(digits)
        if (changed := "".join(digits)) != right:
            return changed
