"""What convert writes beside a run's weights for pipelines of transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flax_transformers.cli.run_files import preprocessor, run_files, with_ids_of
from flax_transformers.config_json import to_json
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import build_model, config_json, within_vocabulary
from flax_transformers.huggingface.generation_settings import settings_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.image_classification import ImageClassification


def test_exported_preprocessing_equals_that_of_evaluation():
    data = ImageData(source=ImageSource("x"), crop_fraction=0.875)
    found = preprocessor(data, ImageClassification(), ViTConfig(image_size=224))
    assert found == {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def test_one_mean_for_all_channels_is_written_for_each():
    pixels = ImageClassification(mean=(0.5,), std=(0.25,))
    data = ImageData(source=ImageSource("x"), crop_fraction=1.0)
    found = preprocessor(data, pixels, ViTConfig(image_size=28, patch_size=7))
    assert found["image_mean"] == [0.5] * 3 and found["image_std"] == [0.25] * 3
    assert found["size"] == {"shortest_edge": 28}


def run_of(data, objective):
    """A checkpoint of a run, whose model, optimizer and phases cannot be read here."""
    rest = {"type": "elsewhere:Model"}
    return SimpleNamespace(
        meta={
            "config": {
                "type": "train_config", "format": 2, "data": data, "objective": objective,
                "model": rest, "optimizer": rest, "phases": [rest],
            }
        }
    )  # fmt: skip


def test_of_a_run_of_images_only_the_data_and_the_objective_are_read():
    data = ImageData(source=ImageSource("x"), crop_fraction=0.875)
    run = run_of(to_json(data), to_json(ImageClassification()))
    model = ViTConfig(image_size=224)
    assert run_files(run, model, None) == {
        "preprocessor_config.json": preprocessor(data, ImageClassification(), model)
    }


def test_with_a_custom_objective_no_preprocessor_is_written_and_a_warning_logged(caplog):
    data = to_json(ImageData(source=ImageSource("x")))
    run = run_of(data, {"type": "mine:Own"})
    assert run_files(run, ViTConfig(image_size=224), None) == {}
    assert "preprocessor_config.json is not written: the saved config uses Own of" in caplog.text


def test_the_data_of_a_run_on_text_are_not_read(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    run = run_of({"type": "mine:Data"}, {"type": "mine:Own"})
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {
        "tokenizer_config.json": {"model_max_length": 64}
    }


def test_the_length_limit_is_added_to_a_tokenizer_without_one(tmp_path):
    run = SimpleNamespace(meta={})
    file = tmp_path / "tokenizer_config.json"
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {}
    file.write_text(json.dumps({"do_lower_case": True}))
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 64}
    }
    file.write_text(json.dumps({"model_max_length": 32}))
    written = run_files(run, BertConfig(max_positions=64), tmp_path)
    assert written["tokenizer_config.json"] == {"model_max_length": 32}
    assert run_files(run, T5Config(), tmp_path) == {}  # it has no limit


@pytest.mark.parametrize("config", [GPT2Config(vocab_size=300), LlamaConfig(vocab_size=2)])
def test_no_id_beyond_the_vocabulary_is_written(config):
    config = within_vocabulary(config)
    described = config_json(config)
    settings = settings_json(config, None) or {}
    assert described["eos_token_id"] is None and "eos_token_id" not in settings
    size = config.vocab_size
    assert (described["bos_token_id"] or 0) < size and settings.get("bos_token_id", 0) < size


def test_ids_of_the_vocabulary_stay():
    config = GPT2Config(vocab_size=300, bos_id=4, eos_ids=(5, 50256))
    assert within_vocabulary(config).eos_ids == (5,) and within_vocabulary(config).bos_id == 4
    assert within_vocabulary(GPT2Config()) == GPT2Config()


def test_ids_that_are_missing_come_from_the_tokenizer(tmp_path, monkeypatch):
    from flax_transformers.cli import run_files as module

    vocabulary = SimpleNamespace(bos_id=1, end_id=2)
    monkeypatch.setattr(
        module, "load_tokenizer", lambda folder: SimpleNamespace(vocabulary=vocabulary)
    )
    small = GPT2Config(vocab_size=300, hidden_size=8, num_heads=2, num_layers=1)
    model = with_ids_of(build_model(small, ComputeConfig()), tmp_path)
    assert (model.config.bos_id, model.config.eos_ids) == (1, (2,))
    kept = GPT2Config(vocab_size=300, hidden_size=8, num_heads=2, bos_id=None, eos_ids=(7,))
    assert with_ids_of(build_model(kept, ComputeConfig()), tmp_path).config == kept
