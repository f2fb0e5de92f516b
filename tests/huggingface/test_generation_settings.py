"""Generation settings of a folder: read, kept, and written back."""

from __future__ import annotations

import json

import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bart import BartConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.huggingface.generation_settings import (
    read_folder,
    read_settings,
    settings_json,
    write_settings,
)
from flax_transformers.models.generation_settings import (
    NO_SETTINGS,
    GenerationSettings,
)

LLAMA_3_INSTRUCT = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128009],
    "max_length": 4096,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.40.0.dev0",
}
BART_CNN = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "early_stopping": True,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "length_penalty": 2.0,
    "max_length": 142,
    "min_length": 56,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "pad_token_id": 1,
    "transformers_version": "4.27.0.dev0",
}
MARIAN = {
    "bad_words_ids": [[58100]],
    "bos_token_id": 0,
    "decoder_start_token_id": 58100,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "max_length": 512,
    "num_beams": 6,
    "pad_token_id": 58100,
    "renormalize_logits": True,
}
UNKNOWN = {"suppress_tokens": [1, 2], "a_field_of_next_year": {"x": [1, None, 0.5]}}


def write(folder, name="generation_config.json", /, **content):
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("given", [LLAMA_3_INSTRUCT, BART_CNN, MARIAN, UNKNOWN, {}])
def test_every_field_of_a_file_is_written_back(tmp_path, given):
    settings = read_folder(write(tmp_path, **given), LlamaConfig())
    assert write_settings(settings) == given


def test_settings_have_fields_or_are_kept_as_they_are():
    settings = read_settings(BART_CNN, "file")
    assert settings.no_repeat_ngram_size == 3 and settings.eos_ids == (2,)
    assert settings.num_beams == 4 and settings.early_stopping is True
    assert ("transformers_version", '"4.27.0.dev0"') in settings.other
    assert hash(settings) == hash(read_settings(BART_CNN, "file"))


def test_what_is_not_obeyed_is_named_unless_it_changes_nothing():
    groups = BART_CNN | {"num_beam_groups": 2}
    assert read_settings(groups, "file").not_obeyed == {"num_beam_groups": 2}
    neutral = {"num_beams": 1, "typical_p": 1.0, "guidance_scale": None, "length_penalty": 2.0}
    assert read_settings(neutral, "file").not_obeyed == {}
    assert read_settings({"sequence_bias": [[[1], 2.0]]}, "file").not_obeyed == {
        "sequence_bias": [[[1], 2.0]]
    }


def test_fields_of_today_in_configs_that_were_saved_before_are_read():
    saved = GenerationSettings(other=(("num_beams", "4"), ("stop_strings", '["a"]'), ("x", "1")))
    expected = GenerationSettings(num_beams=4, stop_strings=("a",), other=(("x", "1"),))
    assert saved == expected


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("early_stopping", "always", "True or False, 'never' or None"),
        ("length_penalty", "1", "a number"),
        ("stop_strings", [""], "an empty item"),
        ("repetition_penalty", 0, "positive"),
        ("repetition_penalty", "1.2", "a number"),
        ("no_repeat_ngram_size", 2.5, "whole"),
        ("no_repeat_ngram_size", -1, "at least 0"),
        ("no_repeat_ngram_size", True, "whole"),
        ("bad_words_ids", [3], "each item a whole number"),
        ("bad_words_ids", [[]], "an empty item"),
        ("suppress_tokens", "50256", "each item a whole number"),
        ("eos_token_id", ["</s>"], "whole"),
        ("eos_token_id", [-1], "at least 0"),
        ("do_sample", "no", "True or False"),
        ("max_length", 10**20, "at most 2,147,483,647"),
        ("temperature", float("inf"), "finite"),
        ("top_p", -0.5, "not be negative"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_file_and_field(tmp_path, field, value, said):
    write(tmp_path, **{field: value})
    with pytest.raises(
        UserError, match=rf"generation_config.json cannot be used: {field} .*{said}"
    ):
        read_folder(tmp_path, GPT2Config())


def test_a_number_out_of_range_is_refused_with_file_and_field():
    with pytest.raises(UserError, match=r"^x/f.json cannot be used: num_beams is 1000000; it m"):
        read_settings({"num_beams": 10**6}, "x/f.json")


def test_a_config_json_counts_only_without_the_other_file(tmp_path):
    config = LlamaConfig()
    write(tmp_path, "config.json", model_type="llama", repetition_penalty=1.3, hidden_size=8)
    settings = read_folder(tmp_path, config)
    assert settings == GenerationSettings(repetition_penalty=1.3, bos_token_id=1, eos_token_id=2)
    write(tmp_path, max_length=7)
    assert read_folder(tmp_path, config) == GenerationSettings(max_length=7)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_token_id_of_minus_one_means_that_there_is_no_such_token(tmp_path, file):
    write(tmp_path, file, model_type="llama", max_length=7, pad_token_id=-1, bos_token_id=-1)
    settings = read_folder(tmp_path, None)
    assert (settings.max_length, settings.pad_token_id, settings.bos_token_id) == (7, None, None)


def test_older_files_have_defaults_that_they_do_not_say(tmp_path):
    write(tmp_path, "config.json", model_type="bart", force_bos_token_to_be_generated=True)
    settings = read_folder(tmp_path, BartConfig())
    assert (settings.forced_bos_token_id, settings.forced_eos_token_id) == (0, 2)
    assert (settings.decoder_start_token_id, settings.pad_token_id) == (2, 1)
    write(tmp_path, "config.json", model_type="bart", forced_eos_token_id=None)
    assert read_folder(tmp_path, BartConfig()).forced_eos_token_id is None
    write(tmp_path, "config.json", model_type="marian")
    assert read_folder(tmp_path, MarianConfig()).forced_eos_token_id == 0


def test_a_model_that_writes_no_text_has_no_settings(tmp_path):
    write(tmp_path, "config.json", model_type="bert", pad_token_id=0, max_length=20)
    assert read_folder(tmp_path, BertConfig()) == NO_SETTINGS
    assert settings_json(BertConfig(), tmp_path) is None


def test_the_settings_of_a_model_come_before_those_beside_its_tokenizer(tmp_path):
    write(tmp_path, max_length=7, repetition_penalty=2.0)
    own = GPT2Config(generation=GenerationSettings(max_length=9))
    assert settings_json(own, tmp_path) == {"max_length": 9}
    ids = {"bos_token_id": 50256, "eos_token_id": 50256}
    assert settings_json(GPT2Config(), tmp_path) == ids | {
        "max_length": 7,
        "repetition_penalty": 2.0,
    }


def test_a_run_of_ours_says_how_its_texts_begin_and_end():
    config = BartConfig(pad_id=0, bos_id=2, eos_ids=(3,), decoder_start_id=3)
    assert settings_json(config, None) == {
        "bos_token_id": 2,
        "decoder_start_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
