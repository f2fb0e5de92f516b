"""The config.json and generation_config.json of published models: read, and written back equal.

``published_configs.json`` has the texts by the names of the models; id2label is shortened, and
``sizes`` makes the model tiny for tests/parity. The texts were compared with published copies or
their checksums, except for those of deit-base-distilled-patch16-224, t5-v1_1-small and umt5-small,
and the generation_config.json of byt5-small, gemma-2b, Mistral-7B-v0.1, mt5-small and
opus-mt-en-de. For mt5-small, mbart-large-cc25 and opus-mt-en-de it was copies that transformers
had written again, which do not tell ``_name_or_path`` and ``transformers_version``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flax_transformers.huggingface.family import config_json
from flax_transformers.huggingface.generation_settings import settings_json
from flax_transformers.huggingface.read import _read_config

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbart-cnn-12-6": (
        "facebook/bart-large-cnn",
        {
            "decoder_layers": 6,
            "extra_pos_embeddings": 2,
            "replacing_rate": 0,
            "static_position_embeddings": False,
            "student_decoder_layers": None,
        },
    ),
    "bart-large-xsum": (
        "facebook/bart-large-cnn",
        {
            "do_blenderbot_90_layernorm": False,
            "eos_token_ids": [2],
            "save_step": 58,
            "task_specific_params": {},
        },
    ),
    "opus-mt-de-en of transformers 4.57": (
        "Helsinki-NLP/opus-mt-en-de",
        {"max_length": None, "num_beams": None},
    ),
    "opus-mt-zh-en of 2020": (
        "Helsinki-NLP/opus-mt-en-de",
        {"extra_pos_embeddings": 65001, "force_bos_token_to_be_generated": False},
    ),
    "distilgpt2 of 2019": (
        "openai-community/gpt2",
        {
            "finetuning_task": None,
            "n_layer": 6,
            "num_labels": 1,
            "output_attentions": False,
            "pruned_heads": {},
            "torchscript": False,
            "use_bfloat16": False,
        },
    ),
    "CDial-GPT2": (
        "openai-community/gpt2",
        {"gradient_checkpointing": False, "n_inner": None, "tokenizer_class": "BertTokenizer"},
    ),
    "flan-t5-base of transformers 4.54": (
        "google/flan-t5-base",
        {"classifier_dropout": 0.0, "dense_act_fn": "gelu_new", "is_gated_act": True},
    ),
    "the first LLaMA": (
        "meta-llama/Llama-2-7b-hf",
        {"max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06},
    ),
    "longchat": (
        "meta-llama/Llama-2-7b-hf",
        {"rope_scaling": {"factor": 8.0, "type": "linear"}},
    ),
    "Llama-3.1 of transformers 5": (
        "meta-llama/Llama-3.1-8B-Instruct",
        {
            "pad_token_id": None,
            "rope_parameters": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_theta": 500000.0,
                "rope_type": "llama3",
            },
        },
    ),
    "Mistral-7B-Instruct-v0.3 with every default": (
        "mistralai/Mistral-7B-v0.3",
        {
            "chunk_size_feed_forward": 0,
            "cross_attention_hidden_size": None,
            "diversity_penalty": 0.0,
            "exponential_decay_length_penalty": None,
            "max_length": 20,
            "problem_type": None,
            "remove_invalid_values": False,
            "suppress_tokens": None,
            "tf_legacy_loss": False,
            "tie_encoder_decoder": False,
            "typical_p": 1.0,
        },
    ),
    "ViT of transformers 4.57": (
        "google/vit-base-patch16-224",
        {"encoder_stride": 16, "pooler_act": "tanh", "pooler_output_size": 768},
    ),
}
"""By the models that have them: fields that none of PUBLISHED has, and the one they go with."""


def _read(folder: Path, given: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
    """The config of a folder with these texts."""
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "model.safetensors").touch()  # whose tensors are not looked at
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return _read_config(folder, None, None)[1]


def _written(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The given fields as the config.json that is written has them."""
    written = config_json(config)
    return {field: written[field] for field in given}


@pytest.mark.parametrize("name", OTHERS)
def test_rarer_fields_come_back_without_a_warning(tmp_path, name, caplog):
    model, fields = OTHERS[name]
    given = {**PUBLISHED[model]["config"], **fields}
    assert _written(_read(tmp_path, given), given) == given
    assert not caplog.text


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_a_published_folder_comes_back(tmp_path, name, caplog):
    given = PUBLISHED[name]
    config = _read(tmp_path, given["config"], given["generation_config"])
    assert _written(config, given["config"]) == given["config"]
    if given["generation_config"] is not None:
        assert settings_json(config, None) == given["generation_config"]
    assert not caplog.text


def test_settings_of_a_config_json_alone_reach_the_head_that_writes(tmp_path):
    given = PUBLISHED["facebook/bart-base"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    (tmp_path / "model.safetensors").touch()
    _, own, config = _read_config(tmp_path, "BartForConditionalGeneration", None)
    assert settings_json(own, None) is None  # BartModel writes no text
    assert settings_json(config, None) == {
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "eos_token_id": 2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "pad_token_id": 1,
    }
