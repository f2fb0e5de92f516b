"""Chat templates: from messages to text, as ``transformers`` renders them.

A template is a program in Jinja that comes with a tokenizer. It runs in Jinja's sandbox, without
access to Python, and under limits of time and of length: the folder it is in may be anyone's.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_transformers.data.tokenizers.facts import CONFIG_FILE, TEMPLATE_FILE
from flax_transformers.data.tokenizers.kinds import Tokenizer
from flax_transformers.errors import UserError

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a template reads, such as ``tool_calls``."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of a tokenizer that has none: ChatML."""

BEGIN, END = "\ufdd0", "\ufdd1"
"""Marks around what an assistant wrote: noncharacters, which text has no use for."""
_OTHER = "\ufdd2"
"""What a message says in place of its own content to find where that is: a noncharacter."""
_ENDING = 256
"""Number of characters by which the end of a text is recognized."""
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateError(Exception):
    """A template fails on some messages; the message says why, for a sentence."""


class Rendered(NamedTuple):
    """A conversation as text, and the start and end of each assistant turn in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may name (``eos_token`` ...). Picklable.

    ``place``: where it is from, for messages.
    """

    source: str = CHATML
    tokens: tuple[tuple[str, str], ...] = ()
    place: str = "the default chat template"

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, answer_next: bool = False
    ) -> str:
        """The text of messages; ``answer_next``: with the beginning of an assistant turn at the
        end. Raises `TemplateError`."""
        return self._run(messages, tools, answer_next).replace(BEGIN, "").replace(END, "")

    def rendered(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """The text, and the parts of it that an assistant wrote and that are learned: those of
        messages of ``weight`` 0 are not. Raises `TemplateError`.

        They are what the template puts between ``{% generation %}`` and ``{% endgeneration %}``.
        Without these tags, a turn begins at `start_of` it, and ends where the messages up to it do.
        """
        marked = self._run(messages, tools, False)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        weights = [messages[i].get("weight", 1) for i in answers]
        if BEGIN in marked:
            text, turns = _without_marks(marked)
            if not all(weights) and len(turns) != len(answers):
                raise TemplateError(
                    f"{self.place} marks {len(turns)} parts of {len(answers)} assistant turns, so "
                    "that those of weight 0 cannot be told from others"
                )
            learned = [all(weights) or weights[place] for place in range(len(turns))]
            return Rendered(text, tuple(itertools.compress(turns, learned)))
        if self.marks_turns:
            return Rendered(marked, ())
        answers = list(itertools.compress(answers, weights))
        spans = [self._span(marked, messages, tools, number) for number in answers]
        return Rendered(marked, tuple((start, end) for start, end in spans if start < end))

    def _span(
        self, text: str, messages: Sequence[Message], tools: Any, number: int
    ) -> tuple[int, int]:
        """Where the turn of a message is in the text of all."""
        start = self.start_of(text, messages, tools, number)
        if number + 1 == len(messages):
            return start, len(text)
        upto = self.render(messages[: number + 1], tools)
        if text.startswith(upto):
            return start, len(upto)
        # A template may write earlier turns otherwise, such as without their thoughts.
        content = str(messages[number].get("content") or "").strip()
        place = text.find(content, start)
        if not content or place < 0:
            found = self._left_out(text, messages, tools, number)
            return start, found[1] if found else common_prefix(upto, text)
        end = place + len(content)
        return start, end + common_prefix(self._closing(), text[end:])

    def start_of(self, text: str, messages: Sequence[Message], tools: Any, number: int) -> int:
        """Where the turn of a message begins in ``text``, that of all messages.

        It is where the messages before it, with the beginning of an assistant turn, end. Templates
        that write those otherwise without the turn, and first turns, begin at their content; turns
        that do not write it, such as tool calls, at what a conversation without them leaves out.
        Raises `TemplateError` where that is not found.
        """
        if number:
            before = self.render(messages[:number], tools, answer_next=True)
            plain = before if text.startswith(before) else self.render(messages[:number], tools)
            if text.startswith(plain):
                return max(len(plain), common_prefix(before, text))
        other = {**messages[number], "content": _OTHER}
        changed = self.render([*messages[:number], other, *messages[number + 1 :]], tools)
        start = common_prefix(changed, text)
        if changed.startswith(_OTHER, start):
            return start
        found = self._left_out(text, messages, tools, number)
        if found is None:
            raise TemplateError(
                f"{self.place} does not tell where the turn of message {number + 1} begins; let it "
                "write messages alike whatever follows them, or for conversations give "
                "data.template_path a copy of it with {% generation %} and {% endgeneration %} "
                "around what an assistant writes"
            )
        return found[0]

    def _left_out(
        self, text: str, messages: Sequence[Message], tools: Any, number: int
    ) -> tuple[int, int] | None:
        """The part of ``text`` that is missing when it is rendered without a message; None where
        that changes other parts too, or fails."""
        others = [*messages[:number], *messages[number + 1 :]]
        try:
            without = self.render(others, tools)
            plain = self.render(messages[:number], tools) if number else ""
            before = self.render(messages[:number], tools, answer_next=True) if number else ""
        except TemplateError:
            return None
        size, start = len(text) - len(without), common_prefix(without, text)
        if size < 1 or text[start + size :] != without[start:]:
            return None
        # A turn that begins as the next one, or ends as the one before, may be at several places:
        # it is where the text before it ends as that of the messages before it does.
        starts = [start]
        while starts[-1] and text[starts[-1] - 1] == text[starts[-1] - 1 + size]:
            starts.append(starts[-1] - 1)
        end = plain[-_ENDING:][::-1]
        start = max(starts, key=lambda n: common_prefix(end, text[max(0, n - _ENDING) : n][::-1]))
        header = before[len(plain) :] if before.startswith(plain) else ""
        return start + common_prefix(header, text[start : start + size]), start + size

    def answered(self, prompt: str, answer: str) -> str | None:
        """The text of a conversation of which ``prompt`` is the text before ``answer``, whitespace
        at its end aside; None if it does not end as the beginning of an answer. Raises
        `TemplateError`."""
        question = "A question."
        messages = [{"role": "user", "content": question}]
        header = self.render(messages, answer_next=True).partition(question)[2].rstrip()
        if not header or not prompt.rstrip().endswith(header):
            return None
        messages.append({"role": "assistant", "content": answer})
        rest = self.render(messages).partition(question)[2]
        return prompt.rstrip().removesuffix(header) + rest

    @property
    def marks_turns(self) -> bool:
        """Whether it says by its tags what an assistant wrote."""
        return _TAG.search(self.source) is not None

    def end_of_turn(self) -> str:
        """What follows an answer in the text of a conversation, without whitespace around it."""
        return self._closing().strip()

    def _closing(self) -> str:
        content = "An answer."
        messages = [{"role": "user", "content": "A question."}]
        messages += [{"role": "assistant", "content": content}]
        return self.render(messages).rpartition(content)[2]

    def _run(self, messages: Sequence[Message], tools: Any, answer_next: bool) -> str:
        if any(BEGIN in text or END in text for text in _strings(messages)):
            raise TemplateError("a message has the character U+FDD0 or U+FDD1; remove it")
        variables = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": answer_next,
            **dict(self.tokens),
        }
        template = _compiled(self.source, self.place)
        from flax_transformers.post_training import sandbox

        try:
            return sandbox.render(template, variables)
        except sandbox.Failure as error:
            raise TemplateError(f"{self.place} fails: {error}") from error


def template_of(tokenizer: Tokenizer, path: str | os.PathLike[str] | None = None) -> ChatTemplate:
    """The template in the file ``path``, or else that of a tokenizer's files, or else `CHATML`.

    Raises UserError for a file that is missing or is no template.
    """
    names = {f"{role}_token": tokenizer.vocabulary.roles.get(role) for role in _ROLES}
    tokens = tuple((n, tokenizer.pieces([i])[0]) for n, i in names.items() if i is not None)
    if path is not None:
        found = ChatTemplate(template_in(path), tokens, f"the chat template {os.fspath(path)}")
    else:
        source = template_in_files(tokenizer)
        place = "the tokenizer's chat template"
        found = (
            ChatTemplate(tokens=tokens) if source is None else ChatTemplate(source, tokens, place)
        )
    _compiled(found.source, found.place)  # raises for a template with a mistake
    return found


def end_of_turn_id(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that ends an answer; None if the template ends it otherwise. Raises
    `TemplateError`."""
    end = template.end_of_turn()
    first = int(tokenizer.encode_prompt(end)[0]) if end else None
    return first if first in tokenizer.vocabulary.special_ids else None


def template_in(path: str | os.PathLike[str]) -> str:
    """The text of a template's file. Raises UserError if it cannot be read."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template {os.fspath(path)} cannot be read ({error}); give the path of a "
            "Jinja file"
        ) from error


def template_in_files(tokenizer: Tokenizer) -> str | None:
    """The template in a tokenizer's own files: in chat_template.jinja, or else in
    tokenizer_config.json, where it may be one of several; None if there is none."""
    if TEMPLATE_FILE in tokenizer.files:
        return tokenizer.files[TEMPLATE_FILE].decode("utf-8", "replace")
    given = json.loads(tokenizer.files.get(CONFIG_FILE, b"{}")).get("chat_template")
    if isinstance(given, list):
        by_name = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = by_name.get("default")
    return given if isinstance(given, str) else None


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of equal elements at the beginning of two texts or lists."""
    if one == other[: len(one)]:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _without_marks(marked: str) -> Rendered:
    """The text without marks, and where they were."""
    text, spans = "", []
    for part in marked.split(BEGIN):
        inside, mark, after = part.partition(END)
        if mark and inside:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, tuple(spans))


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested objects and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value))
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message without fields of None, and its reasoning under the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _compiled(source: str, place: str) -> Any:
    """The compiled template. Raises UserError for one with a mistake, and without Jinja."""
    try:
        from flax_transformers.post_training import sandbox
    except ImportError as error:
        raise UserError(
            "chat templates need Jinja; install it with pip install 'flax_transformers[chat]'"
        ) from error
    try:
        return sandbox.compiled(source, (BEGIN, END))
    except sandbox.Failure as error:
        raise UserError(f"{place} is no valid template ({error}); correct it") from error
