"""The config.json and generation_config.json of published models: read, and written back equal.

``published_configs.json`` has the texts by the names of the models; id2label is shortened, and
``sizes`` makes the model tiny for tests/parity.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flax_transformers.huggingface.family import config_json
from flax_transformers.huggingface.generation_settings import settings_json
from flax_transformers.huggingface.read import _read_config

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_a_published_folder_comes_back(tmp_path, name, caplog):
    given = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(given["config"]))
    (tmp_path / "model.safetensors").touch()  # whose tensors are not looked at
    if given["generation_config"] is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given["generation_config"]))
    _, config, _ = _read_config(tmp_path, None, None)
    written = config_json(config)
    assert {field: written[field] for field in given["config"]} == given["config"]
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
