"""Chat templates: what they may do, and which part of their text an assistant wrote."""

import resource
import time
from datetime import datetime

import numpy as np
import pytest

from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.post_training import sandbox
from flax_transformers.post_training.chat_data import turn_token_spans
from flax_transformers.post_training.chat_template import (
    CHATML,
    ChatTemplate,
    TemplateError,
    end_of_turn_id,
    template_of,
)

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def learned(template):
    text, spans = template.rendered(MESSAGES)
    return [text[start:end] for start, end in spans]


def test_a_template_with_tags_says_what_the_assistant_wrote():
    assert learned(ChatTemplate()) == ["Hello<|im_end|>", "So long<|im_end|>"]


def test_turns_are_found_without_tags():
    assert not ChatTemplate(PLAIN).marks_turns
    assert learned(ChatTemplate(PLAIN)) == ["Hello<|im_end|>\n", "So long<|im_end|>\n"]


def test_an_earlier_turn_that_is_written_otherwise_is_found_by_its_content():
    last = "{% if loop.last %}<think></think>{% endif %}{{ message['content'] + '<|im_end|>' }}"
    template = ChatTemplate(PLAIN.replace("{{ message['content'] + '<|im_end|>' }}", last, 1))
    assert learned(template)[0] == "Hello<|im_end|>\n"


MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{- '<s>' }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if tools is not none and (message == user_messages[-1]) %}"
    "{{- '[AVAILABLE_TOOLS] ' ~ tools ~ '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['tool_calls'] %}{{- '[TOOL_CALLS] ' ~ message['tool_calls'] ~ '</s>' }}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + '</s>' }}"
    "{%- endif %}{%- endfor %}"
)
"""The lines of Mistral-7B-Instruct-v0.3 that write a user's turn otherwise if it is the last."""


def turns_of(template, messages, tools=None):
    text, spans = ChatTemplate(template).rendered(messages, tools)
    return [text[start:end] for start, end in spans]


def test_turns_are_found_where_a_user_turn_is_written_otherwise_at_the_end():
    system = {"role": "system", "content": "Be brief"}
    assert turns_of(MISTRAL, [system, *MESSAGES]) == ["Hello</s>", "So long</s>"]
    assert turns_of(MISTRAL, MESSAGES) == [" Hello</s>", " So long</s>"]
    # The tools precede the last user turn, so that the first answer has no rendered beginning.
    assert turns_of(MISTRAL, MESSAGES, ["t"]) == ["Hello</s>", " So long</s>"]


def test_a_turn_is_found_although_the_user_has_said_the_same():
    messages = [{"role": "system", "content": "s"}, *MESSAGES[:1], MESSAGES[1] | {"content": "Hi"}]
    assert turns_of(MISTRAL, messages) == ["Hi</s>"]


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": "not written"}])
def test_a_tool_call_that_does_not_write_its_content_is_found(content):
    call = {"role": "assistant", "tool_calls": ["f()"], **content}
    turns = ["[TOOL_CALLS] ['f()']</s>", "So long</s>"]
    assert turns_of(MISTRAL, [MESSAGES[0], call, *MESSAGES[2:]], ["t"])[:1] == turns[:1]
    answered = [MESSAGES[0], call, {"role": "tool", "content": "4"}, *MESSAGES[1:]]
    tool = "{%- elif message['role'] == 'tool' %}{{- '[TOOL_RESULTS] ' + message['content'] }}"
    template = MISTRAL.replace("{%- elif", tool + "{%- elif", 1)
    assert turns_of(template, answered, ["t"]) == [turns[0], "Hello</s>", " So long</s>"]
    repeated = [MESSAGES[0], call, call, *MESSAGES[2:]]
    assert turns_of(MISTRAL, repeated, ["t"])[:2] == turns[:1] * 2


def test_a_turn_whose_beginning_is_not_found_is_an_error():
    call = {"role": "assistant", "content": "", "tool_calls": ["f()"]}
    numbered = "{{ messages | length }}" + MISTRAL
    with pytest.raises(TemplateError, match="turn of message 2 begins; let it write"):
        turns_of(numbered, [MESSAGES[0], call, *MESSAGES[2:]], ["t"])


def test_of_a_conversation_that_an_assistant_begins_no_header_is_learned():
    header = "<s>{% if messages[0]['role'] != 'system' %}Default{% endif %}"
    assert turns_of(header + PLAIN, MESSAGES[1:]) == ["Hello<|im_end|>\n", "So long<|im_end|>\n"]
    assert turns_of(header + PLAIN, MESSAGES[1:2]) == ["Hello<|im_end|>\n"]


def test_a_prompt_ends_with_the_beginning_of_an_answer():
    text = ChatTemplate().render(MESSAGES[:1], answer_next=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate().end_of_turn() == "<|im_end|>"


@pytest.mark.parametrize("source", [CHATML, MISTRAL, PLAIN])
def test_an_answer_to_a_rendered_prompt_is_what_the_template_renders(source):
    template, messages = ChatTemplate(source), MESSAGES[:3]
    prompt = template.render(messages, answer_next=True)
    whole = template.render([*messages, {"role": "assistant", "content": "So long"}])
    for text in (prompt, prompt.rstrip()):
        assert template.answered(text, "So long") == whole
    assert template.answered("Hi", "So long") is None
    assert template.answered(template.render(messages[:2]), "So long") is None


def test_the_end_of_a_turn_may_be_a_special_token():
    ends = ChatTemplate("{% for one in messages %}{{ one.content }}{{ eos_token }}{% endfor %}",
                        (("eos_token", "</s>"),))  # fmt: skip
    assert end_of_turn_id(ends, ByteTokenizer()) == 1
    assert end_of_turn_id(ChatTemplate(), ByteTokenizer()) is None
    assert end_of_turn_id(ChatTemplate("{{ messages[-1].content }}"), ByteTokenizer()) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no system message') }}", "fails: no system message"),
        ("{{ messages[9]['content'] + 'x' }}", "fails: list object has no element 9"),
        ("{{ 'x' * 10**9 }}", "it writes more than"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% set x = namespace(s='ab') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}"
         "{% endfor %}", "it writes more than"),
        ("{{ 2 ** 1000000000 }}", "more than 4,096 bits"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_an_error(source, reason):
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate(source, place="the template").render(MESSAGES)


def test_a_template_that_loops_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    loop = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="takes more than 0.05 seconds"):
        ChatTemplate("{% set r = range(99999) %}" + loop).render(MESSAGES)


POWERS = "{% set a=9**64 %}{% set b=a**64 %}{% set c=b**64 %}{% set d=c**64 %}{{ d }}"
NESTED = "{% set l = ['x' * 1000] * 1000 %}{% set l = [l] * 1000 %}"
DEEP = (
    "{% set ns = namespace(a=[1]) %}{% for i in range(9) %}{% set ns.a = [ns.a] * 10 %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        POWERS,
        "{% set ns = namespace(a=3) %}"
        "{% for i in range(40) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        "{{ '%200000000d' % 1 }}",
        "{{ '%.200000000f' % 1 }}",
        "{{ '%*d' % (200000000, 1) }}",
        "{{ '%200000000d'|format(1) }}",
        "{{ '{:200000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 200000000) }}",
        "{{ 'a'|center(200000000) }}",
        "{{ ['a']|map('center', width=200000000)|list }}",
        "{{ 'a'.center(200000000) }}",
        "{{ 'a'.ljust(200000000) }}",
        "{{ 'a'.rjust(200000000) }}",
        "{{ 'a'.zfill(200000000) }}",
        "{{ '\t'.expandtabs(200000000) }}",
        "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
        "{{ (['a'] * 100000)|join('b' * 100000) }}",
        "{{ (['a'] * 100000)|map('upper')|join('b' * 100000) }}",
        "{{ ('b' * 100000).join(['a'] * 100000) }}",
        "{{ ('a\n' * 100000)|indent(100000) }}",
        "{{ 1.5|round(200000000) }}",
        "{{ [1]|slice(200000000)|list }}",
        "{{ [1]|batch(200000000, 0)|list }}",
        "{{ [1]|tojson(indent=200000000) }}",
        "{{ 1.to_bytes(200000000, 'big') }}",
        "{{ ('f' * 10000000)|int(base=16) }}",
        "{{ lipsum(200000000) }}",
        "{{ ('x' * 10000000)|batch(1)|list }}",
        "{{ ([[1]] * 100000)|sum(start=[]) }}",
        NESTED + "{{ l }}",
        NESTED + "{{ l|tojson }}",
        NESTED + "{{ l|string }}",
        NESTED + "{{ 'x' ~ l }}",
        NESTED + "{{ '%s' % l }}",
        DEEP + "{% set b = ns.a %}" + DEEP + "{{ b == ns.a }}",
        "{% set x = 'x' * 10000000 %}{% for i in range(3) %}{{ x }}{% endfor %}",
        "{% set x = 'x' * 10000000 %}{% macro f() %}{{ x }}{{ x }}{% endmacro %}{% set y = f() %}",
        "{% set ns = namespace(l=[]) %}{% set x = 'x' * 10000000 %}"
        "{% for i in range(100) %}{% set ns.l = [ns.l, x[1:]] %}{% endfor %}",
    ],
)
def test_a_template_cannot_compute_what_is_too_long(source):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises((TemplateError, UserError)):
        ChatTemplate(source).render(MESSAGES)
    assert time.process_time() - started < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '%5d|%s' % (7, 'a') }}", "    7|a"),
        ("{{ '{:>3}|{}'.format(7, 'a') }}", "  7|a"),
        ("{{ 'a'|center(3) }}{{ 'b'.ljust(2) }}", " a b "),
        ("{{ 'a b'|replace(' ', '_') }}{{ 2 ** 10 * 3 }}", "a_b3072"),
        ("{{ messages|map(attribute='role')|unique|join(', ') }}", "user, assistant"),
        ("{{ messages[1:]|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ {'a': [1, None]}|tojson }}{{ [1]|tojson(indent=1) }}", '{"a": [1, null]}[\n 1\n]'),
        ("{% for a, b in {'x': 1}.items() %}{{ a ~ b }}{% endfor %}{{ (1, 2) }}", "x1(1, 2)"),
        ("{% set ns = namespace(a='') %}{% set ns.a = ns.a + 'x' %}{{ ns.a }}", "x"),
    ],
)
def test_limits_leave_the_text_of_templates_as_it_is(source, text):
    assert ChatTemplate(source).render(MESSAGES) == text


def test_a_message_may_have_fields_that_are_not_json():
    messages = [{"role": "user", "content": "Hi", "timestamp": datetime(2026, 1, 1)}]
    assert ChatTemplate().render(messages) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize("call", [{"a": ["\ufdd0"]}, {"\ufdd1": 1}])
def test_marks_in_a_field_of_a_message_are_refused(call):
    with pytest.raises(TemplateError, match="a message has the character"):
        ChatTemplate().render([{"role": "user", "content": "", "tool_calls": [call]}])


def test_marks_in_a_message_are_refused():
    with pytest.raises(TemplateError, match="U\\+FDD0"):
        ChatTemplate().render([{"role": "user", "content": "\ufdd0"}])


def test_a_file_with_a_mistake_is_named(tmp_path):
    (tmp_path / "template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="template.jinja is no valid template"):
        template_of(ByteTokenizer(), tmp_path / "template.jinja")
    with pytest.raises(UserError, match="none.jinja cannot be read"):
        template_of(ByteTokenizer(), tmp_path / "none.jinja")


def test_special_tokens_have_names_in_a_template(tmp_path):
    (tmp_path / "template.jinja").write_text("{{ eos_token }}")
    assert template_of(ByteTokenizer(), tmp_path / "template.jinja").render(MESSAGES) == "</s>"


def test_a_token_is_of_a_turn_if_one_of_its_characters_is():
    offsets = np.array([[0, 2], [2, 3], [3, 5], [5, 5], [5, 8]])
    assert turn_token_spans([(2, 4)], offsets) == [(1, 3)]
    assert turn_token_spans([(0, 1), (6, 8), (8, 9)], offsets) == [(0, 1), (4, 5)]
