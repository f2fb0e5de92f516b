"""Prompts begin as documents did in training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.families.bart import BartConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.generation.prompts import (
    end_ids,
    read_lines,
    read_prompts,
    read_texts,
    special_stops,
)
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.objectives.causal_lm import CausalLM, packed_documents
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.rows import run_frame
from tests.golden.multilingual import corpus
from tests.golden.tokenizer_layouts import bert_cased_vocab, gpt2, llama3, write

CONFIG = GPT2Config(vocab_size=2_000, bos_id=None, eos_ids=())


def inputs_of(tokenizer, text):
    """What `CausalLM` reads of a document."""
    tokens = tokenizer.encode_batch([text])[0]
    example = {"tokens": tokens, "document_ends": np.array([len(tokens)])}
    return packed_documents(example, tokenizer.vocabulary)[0].tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "bytes", "byte_level_bpe"])
def test_a_prompt_is_encoded_as_in_training(tmp_path, kind):
    tokenizer = train_tokenizer(TokenizerConfig(kind, 1_500), corpus())
    tokenizer.save(tmp_path)
    prompts = read_prompts(tmp_path, CONFIG)
    assert list(prompts.encode("All human")) == inputs_of(tokenizer, "All human")
    assert list(prompts.encode("")) == inputs_of(tokenizer, "All")[:1]


@pytest.mark.parametrize("layout", [gpt2, llama3, bert_cased_vocab])
def test_a_run_with_a_published_tokenizer_records_its_special_tokens(tmp_path, layout):
    write(tmp_path / "published", layout())
    config = TokenizerConfig(path=str(tmp_path / "published"))
    tokenizer = train_tokenizer(config, ())
    tokenizer.save(tmp_path / "run", run_frame(CausalLM(), tokenizer.vocabulary))
    prompts = read_prompts(tmp_path / "run", CONFIG)
    assert list(prompts.encode("All human")) == inputs_of(tokenizer, "All human")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "bytes"])
def test_a_stop_string_that_is_a_special_token_is_its_id(kind):
    tokenizer = train_tokenizer(TokenizerConfig(kind, 1_500), corpus())
    end = tokenizer.vocabulary.end_id
    [name] = tokenizer.pieces([end])
    assert special_stops(tokenizer, ["a", name, "\n"]) == ((end,), ("a", "\n"))


def test_a_text_ends_by_the_generation_settings_the_config_or_the_tokenizer():
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), ())
    settings = GenerationSettings(eos_token_id=(7, 8))
    config = GPT2Config(vocab_size=262, eos_ids=(7, 9), generation=settings)
    assert end_ids(tokenizer, config) == {7, 8, 9, tokenizer.vocabulary.end_id}
    assert end_ids(tokenizer, GPT2Config(eos_ids=())) == {tokenizer.vocabulary.end_id}


def test_special_tokens_that_a_prompt_names_itself_are_there_once(tmp_path):
    write(tmp_path / "llama3", llama3())
    encode = read_prompts(tmp_path / "llama3", CONFIG).encode
    assert list(encode("<|begin_of_text|>All human")) == list(encode("All human"))
    assert list(encode("<|begin_of_text|>" * 2)) == [400, 400]
    tokenizer = train_tokenizer(TokenizerConfig("wordpiece", 1_500), corpus())
    tokenizer.save(tmp_path / "bart", run_frame(Denoising(), tokenizer.vocabulary))
    encode = read_prompts(tmp_path / "bart", BartConfig(vocab_size=1_500)).encode
    assert list(encode("[CLS] All human [SEP]")) == list(encode("All human"))


def test_an_empty_prompt_of_a_published_gpt2_starts_with_the_end_token(tmp_path):
    write(tmp_path / "published", gpt2())
    tokenizer = train_tokenizer(TokenizerConfig(path=str(tmp_path / "published")), ())
    prompts = read_prompts(tmp_path / "published", CONFIG)
    assert list(prompts.encode("All")) == tokenizer.encode_batch(["All"])[0].tolist()
    assert list(prompts.encode("")) == [400]


def test_a_source_has_the_special_tokens_of_denoising(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig("wordpiece", 1_500), corpus())
    tokenizer.save(tmp_path, run_frame(Denoising(), tokenizer.vocabulary))
    ids = list(read_prompts(tmp_path, BartConfig(vocab_size=1_500)).encode("All human"))
    assert ids[0] == tokenizer.vocabulary.cls_id and ids[-1] == tokenizer.vocabulary.sep_id


@pytest.mark.parametrize("frame", [3, "around", None])
def test_an_attribute_named_frame_that_is_no_method_is_ignored(frame):
    assert run_frame(SimpleNamespace(frame=frame), None) is None


def test_lines_of_a_file_of_prompts_are_its_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028 and \x0bmore\r\ntwo\n".encode())
    assert read_lines(str(file)) == ["one\u2028 and \x0bmore", "two"]
    for content in ("", "\n", "one\n\ntwo"):
        file.write_text(content)
        with pytest.raises(UserError, match="has no prompts|line 2 of .* is empty"):
            read_lines(str(file))


def test_prompts_are_a_field_of_json_lines_and_lines_of_other_files(tmp_path):
    content = '{"prompt": "one \\n more", "answer": 1}\n"two"\n{"prompt": ""}\n'
    for name, expected in (
        ("a.jsonl", ["one \n more", "two", ""]),
        ("a.txt", content.splitlines()),
    ):
        (tmp_path / name).write_text(content)
        assert read_texts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plain text", "line 2 of .*a.ndjson is not JSON in UTF-8; correct it"),
        ('"\\ud800"', "line 2 of .* is not JSON in UTF-8"),
        ('{"text": "one"}', 'line 2 of .* has no text "prompt"; write'),
        ('{"prompt": 3}', "line 2 of .* has no text"),
        ("[" * 5000, "line 2 of .* is not JSON"),
    ],
)
def test_a_json_line_without_a_prompt_is_refused(tmp_path, line, message):
    file = tmp_path / "a.ndjson"
    file.write_text(f'{{"prompt": "one"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_texts(str(file))
