"""Chat templates and masks of learned tokens against transformers and TRL, live."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
import trl
from transformers.utils.chat_template_utils import render_jinja_template
from trl.data_utils import common_prefix_length

from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import (
    CHATML,
    ChatTemplate,
    TemplateError,
    template_of,
)
from flax_transformers.post_training.conversations import conversation

TEMPLATES = {path.stem: path for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<think>"]
TURN = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
CONVERSATIONS = {
    "one turn": TURN,
    "system": [{"role": "system", "content": "Be brief."}, *TURN],
    "two turns": [
        *TURN,
        {"role": "user", "content": "Sure? 🤔"},
        {"role": "assistant", "content": "Yes ✓!"},
    ],
    "parts": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in TURN],
    "thoughts": [TURN[0], {**TURN[1], "reasoning_content": "Add them."}],
    "tool": [
        TURN[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
            ],
        },
        {"role": "tool", "name": "add", "content": "4"},
        TURN[1],
    ],
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE with special tokens of several templates."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["user assistant system What is 2? It is 4."] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(folder)


def texts_of(template, tokens, messages, tools, answer_next):
    """What transformers and this package write; "error" if they refuse."""
    try:
        (theirs,), _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=answer_next,
            **dict(tokens),
        )
    except Exception:
        theirs = "error"
    try:
        found = ChatTemplate(template, tokens).render(messages, tools, answer_next=answer_next)
    except TemplateError:
        found = "error"
    return theirs, found


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_write_what_they_write_in_transformers(name, ours):
    template, tokens = TEMPLATES[name].read_text(), template_of(ours).tokens
    written = 0
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            for answer_next in (False, True):
                theirs, found = texts_of(template, tokens, messages, tools, answer_next)
                assert found == theirs
                written += found != "error"
    assert written >= 4


TAGGED = sorted(name for name, path in TEMPLATES.items() if "endgeneration" in path.read_text())


@pytest.mark.parametrize("name", ["chatml", *TAGGED])
def test_learned_tokens_are_those_of_the_assistant_mask_of_transformers(name, ours, theirs):
    template = CHATML if name == "chatml" else TEMPLATES[name].read_text()
    learned = 0
    for messages in CONVERSATIONS.values():
        try:
            expected = theirs.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:
            continue
        own = ChatTemplate(template, template_of(ours).tokens)
        (ids,), (spans,) = encode(conversation({"messages": messages}), own, ours)
        mask = np.zeros(len(ids), int)
        for start, end in spans:
            mask[start:end] = 1
        assert ids.tolist() == expected["input_ids"]
        assert mask.tolist() == expected["assistant_masks"]
        learned += mask.sum()
    assert learned > 0


UNTAGGED = ("llama3", "qwen2_5", "phi3", "gemma", "cohere", "qwen3", "deepseekv3", "glm4moe")


@pytest.mark.parametrize("name", UNTAGGED)
def test_learned_tokens_of_completions_are_those_of_trl(name, ours, theirs):
    template = TEMPLATES[name].read_text()
    own = ChatTemplate(template, template_of(ours).tokens)
    row = {"prompt": CONVERSATIONS["two turns"][:3], "completion": CONVERSATIONS["two turns"][3:]}
    prompt = theirs.apply_chat_template(
        row["prompt"], chat_template=template, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    whole = theirs.apply_chat_template(
        row["prompt"] + row["completion"], chat_template=template, return_dict=True
    )["input_ids"]
    (ids,), (spans,) = encode(conversation(row), own, ours)
    assert ids.tolist() == whole
    assert spans == [(common_prefix_length(prompt, whole), len(whole))]
    # Without tags, the turns of a whole conversation are found in the same way.
    (same,), (turns,) = encode(
        conversation({"messages": row["prompt"] + row["completion"]}), own, ours
    )
    assert same.tolist() == whole and turns[-1] == spans[0] and len(turns) == 2


def test_plain_completions_are_those_of_trl(ours, theirs):
    row = {"prompt": "Name: ", "completion": "Ann"}
    (ids,), (spans,) = encode(conversation(row), template_of(ours), ours)
    whole = theirs("Name: Ann</s>")["input_ids"]
    assert ids.tolist() == whole
    assert spans == [(common_prefix_length(theirs("Name: ")["input_ids"], whole), len(whole))]


def test_the_template_goes_with_the_tokenizer(folder, theirs, tmp_path):
    given = json.loads(Path(folder, "tokenizer_config.json").read_text())
    assert "chat_template" not in given
    theirs.chat_template = TEMPLATES["qwen3"].read_text()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_tokenizer(tmp_path / "theirs")
    assert template_of(loaded).source == theirs.chat_template
    loaded.save(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again.chat_template == theirs.chat_template
