"""What a model's config, its tokenizer and the command line show is refused before any weights are
read."""

from __future__ import annotations

import functools
import json
import logging

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.huggingface import read
from tests.huggingface.tensors import drawn_model

CONFIG = """
from flax_transformers.testing import tiny_bert, tiny_config

def get_config():
    return tiny_config(CORPUS, STORE)
"""


pytestmark = pytest.mark.usefixtures("one_device")

model_of = functools.cache(drawn_model)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a model of random weights, which nothing reads after that, with the tokenizer of bytes
    or words."""

    def save(architecture, *, words=False, **changes):
        model, params = model_of(architecture, **{"vocab_size": 262, "pad_id": 0} | changes)
        folder = tmp_path / "words"
        if words:
            folder.mkdir()
            names = ["<pad>", "</s>", "<mask>", "a", "b", *(f"w{i}" for i in range(260))]
            entries = {name: i for i, name in enumerate(names)}
            backend = tokenizers.Tokenizer(models.WordLevel(entries, "a"))
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            backend.add_special_tokens(names[:3])
            backend.save(str(folder / "tokenizer.json"))
            roles = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(roles))
        tokenizer = {"tokenizer_from": folder} if words else {"tokenizer": ByteTokenizer()}
        ft.save_pretrained(tmp_path / "model", model, params, **tokenizer)
        return str(tmp_path / "model")

    def unread(*arguments, **how):
        raise AssertionError("weights were read")

    monkeypatch.setattr(read, "read_parameters", unread)
    return save


def refused(capsys, *arguments):
    assert main([*arguments]) == 2
    return capsys.readouterr().err.strip()


GENERATING = [
    ("BertForMaskedLM", {}, [], "BertForMaskedLM does not generate text; use a causal model"),
    ("GPT2Model", {}, [], "GPT2Model does not generate text; use a causal model"),
    (
        "GPT2LMHeadModel",
        {},
        ["--max-new-tokens", "64"],
        "66 tokens of prompt and text are more than the model's 64 positions; shorten the input",
    ),
    ("GPT2LMHeadModel", {}, ["--start-ids", "1"], "--start-ids is for encoder-decoders"),
    ("GPT2LMHeadModel", {}, ["--top-k", "3"], "top_k, top_p and min_p apply to sampling only"),
    (
        "BartForConditionalGeneration",
        {"decoder_start_id": None},
        [],
        "the model has no decoder start id; give start_ids",
    ),
    (
        "BartForConditionalGeneration",
        {},
        ["--start-ids", "262"],
        "the start of the target has id 262, but the decoder's ids are 0 to 261",
    ),
    (
        "BartForConditionalGeneration",
        {},
        ["--max-new-tokens", "64"],
        "tokens of source and 65 of target are more than the model's 64 positions",
    ),
]


@pytest.mark.parametrize(("architecture", "changes", "options", "says"), GENERATING)
def test_generate_refuses_before_it_reads_weights(
    saved, capsys, architecture, changes, options, says
):
    folder = saved(architecture, **changes)
    said = refused(capsys, "generate", folder, "--prompt", "a", *options)
    assert says in said and said.count("\n") == 0


def test_generate_names_a_token_that_the_model_lacks_before_it_reads_weights(saved, capsys):
    folder = saved("GPT2LMHeadModel", words=True)
    said = refused(capsys, "generate", folder, "--prompt", "a w259")
    assert "the token 'w259' with id 264, but the model has only 262 tokens" in said


FILLING = [
    ("BertModel", {}, "a [MASK]", "holds a BertModel, which predicts no tokens"),
    ("GPT2LMHeadModel", {}, "a [MASK]", "GPT2LMHeadModel, which sees only the text before a mask"),
    ("BartForConditionalGeneration", {}, "a [MASK]", "is an encoder-decoder and fills no masks"),
    ("BertForMaskedLM", {}, "no gap", "the text has no [MASK]; add one"),
    ("BertForMaskedLM", {}, "[MASK]" + 62 * "a", "65 tokens, but the model takes 64; shorten it"),
]


@pytest.mark.parametrize(("architecture", "changes", "text", "says"), FILLING)
def test_fill_mask_refuses_before_it_reads_weights(
    saved, capsys, architecture, changes, text, says
):
    folder = saved(architecture, **changes)
    said = refused(capsys, "fill-mask", folder, "--text", text)
    assert says in said and said.count("\n") == 0


def test_fill_mask_names_a_token_that_the_model_lacks_before_it_reads_weights(saved, capsys):
    folder = saved("BertForMaskedLM", words=True)
    said = refused(capsys, "fill-mask", folder, "--text", "[MASK] w259")
    assert "the token 'w259' with id 264, but the model has only 262 tokens" in said


def test_evaluate_refuses_data_that_do_not_fit_before_it_reads_weights(saved, capsys, tmp_path):
    ft.testing.write_corpus(tmp_path / "corpus.txt")
    places = f"CORPUS, STORE = {str(tmp_path / 'corpus.txt')!r}, {str(tmp_path / 'store')!r}\n"
    (tmp_path / "config.py").write_text(places + CONFIG)
    folder = saved("GPT2LMHeadModel")
    said = refused(capsys, "evaluate", folder, "--config", str(tmp_path / "config.py"))
    assert "objective MaskedLM is for a model that sees both ways" in said
    assert not (tmp_path / "store").exists()


def test_other_ends_than_the_tokenizers_are_a_warning(saved, caplog, capsys, tmp_path):
    folder = saved("GPT2LMHeadModel", eos_ids=(7,), bos_id=9)
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="were read"):
        main(["generate", folder, "--prompt", "a", "--max-new-tokens", "4"])
    said = [record.getMessage() for record in caplog.records]
    ends = f"{folder}: the tokenizer ends a text with id 1, but model.eos_ids is (7,): no text"
    assert any(line.startswith(ends) and "set its eos_token_id to 1" in line for line in said)
    caplog.clear()
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [7, 1]}))
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="were read"):
        main(["convert", folder, str(tmp_path / "ours")])
    assert not any("ends a text" in record.getMessage() for record in caplog.records)


def test_convert_says_which_tokens_the_model_lacks(saved, caplog, tmp_path):
    folder = saved("GPT2LMHeadModel", words=True, eos_ids=(1,), bos_id=None)
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="were read"):
        main(["convert", folder, str(tmp_path / "ours")])
    assert "the tokenizer has 265 tokens, but the model has embeddings for 262" in caplog.text


def test_a_described_model_is_the_one_that_is_loaded(tmp_path):
    model, params = drawn_model("RobertaForMaskedLM", vocab_size=262)
    ft.save_pretrained(tmp_path / "model", model, params, tokenizer=ByteTokenizer())
    for architecture in (None, "RobertaModel"):
        found = ft.pretrained.find_pretrained(tmp_path / "model")
        described = ft.pretrained.describe_pretrained(found, architecture)
        loaded, _ = ft.load_pretrained(tmp_path / "model", architecture=architecture)
        assert described == loaded.config
        assert described.architecture == (architecture or "RobertaForMaskedLM")
