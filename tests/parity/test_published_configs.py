"""Configs of published models at tiny sizes: outputs, files and greedy texts of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import flax_transformers as ft
from flax_transformers.generation.decode import generate
from flax_transformers.generation.sampling import Sampling
from flax_transformers.generation.translate import generate_target
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE
from tests.families.test_published_configs import PUBLISHED

VOCAB = 97
NEW_TOKENS = 10
SCALED = "google/umt5-small"
"""transformers 5 scales its logits, which earlier releases did not: see families/t5.py."""
WRITERS = [
    name
    for name, given in PUBLISHED.items()
    if any(word in given["config"]["architectures"][0] for word in ("LM", "Generation", "MT"))
    and "Masked" not in given["config"]["architectures"][0]
]


def small(value):
    """A setting with every id brought below the vocabulary of the small model."""
    if isinstance(value, list):
        return [small(item) for item in value]
    ids = isinstance(value, int) and not isinstance(value, bool)
    return value % VOCAB if ids and value >= VOCAB else value


def shrunk(name):
    """config.json and generation_config.json of a model with tiny sizes."""
    given = PUBLISHED[name]
    config = given["config"] | given["sizes"]
    ids = [field for field in config if field.endswith("token_id")]
    config |= {field: small(config[field]) for field in ids}
    settings = given["generation_config"]
    if settings is not None:
        settings = settings | {
            field: small(value) for field, value in settings.items() if field.endswith("_id")
        }
        settings |= {field: config[field] for field in given["sizes"].keys() & settings.keys()}
    return config, settings


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The model of transformers with random weights, and its folder with the published texts."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("published")
            described, settings = shrunk(name)
            (folder / "config.json").write_text(json.dumps(described))
            config = transformers.AutoConfig.from_pretrained(folder)
            torch.manual_seed(sorted(PUBLISHED).index(name))
            model = getattr(transformers, described["architectures"][0])(config).float().eval()
            wide = 1.0 if hasattr(config, "d_kv") else 3.0  # T5 starts wide
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(wide)  # so that texts are not one token over and over
            model.tie_weights()
            model.save_pretrained(folder)
            add_table_of_logits(folder, described)
            for file in folder.glob("*config.json"):
                file.unlink()
            (folder / "config.json").write_text(json.dumps(described))
            if settings is not None:
                (folder / "generation_config.json").write_text(json.dumps(settings))
            made[name] = type(model).from_pretrained(folder, dtype=torch.float32).eval(), folder
        return made[name]

    return make


def add_table_of_logits(folder, described):
    """Where published files have a table of its own, which transformers 5 does not save."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if described.get("tie_word_embeddings") is False and "lm_head.weight" not in tensors:
        table = tensors["shared.weight"]
        tensors["lm_head.weight"] = torch.randn(table.shape) * 0.3
        save_file(tensors, file, metadata={"format": "pt"})


def inputs_of(model):
    random = np.random.default_rng(0)
    config = model.config
    if hasattr(config, "image_size"):
        pixels = random.normal(size=(2, 3, config.image_size, config.image_size))
        inputs = {"pixel_values": pixels.astype(np.float32)}
        if hasattr(config, "mask_ratio"):
            inputs["noise"] = random.uniform(size=(2, 16)).astype(np.float32)
        return inputs
    inputs = {"input_ids": random.integers(5, 90, (2, 9)).astype(np.int32)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random.integers(5, 90, (2, 7)).astype(np.int32)
    return inputs


@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_are_those_of_the_original_and_files_are_equal_again(name, original, tmp_path):
    theirs, folder = original(name)
    model, params = ft.load_pretrained(folder)
    inputs = inputs_of(theirs)
    output = model.apply({"params": params}, **inputs)
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    tensors = {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}
    with torch.no_grad():
        expected = theirs(**tensors)
    field = "logits" if getattr(expected, "logits", None) is not None else "last_hidden_state"
    if name != SCALED:
        found = np.asarray(getattr(output, field))
        assert relative_difference(found, getattr(expected, field).numpy()) < TOLERANCE
    ft.save_pretrained(tmp_path / "out", model, params)
    before, after = (
        transformers.AutoConfig.from_pretrained(path).to_dict()
        for path in (folder, tmp_path / "out")
    )
    for each in (before, after):
        del each["_name_or_path"], each["dtype"]
        each.pop("torch_dtype", None)
    unequal = {k for k in before if before[k] != after.get(k)}
    assert unequal <= {"head_dim"}
    if unequal:  # which may be left out where it is the width over the heads
        assert after["head_dim"] * after["num_attention_heads"] == after["hidden_size"]
    if name in WRITERS:
        settings = [
            transformers.GenerationConfig.from_pretrained(path).to_dict()
            if (path / "generation_config.json").exists()
            else theirs.generation_config.to_dict()
            for path in (folder, tmp_path / "out")
        ]
        unequal = {k for k in settings[0] if settings[0][k] != settings[1][k]}
        assert unequal <= {"_from_model_config", "transformers_version", "use_cache"}


@pytest.mark.parametrize("name", [name for name in WRITERS if name != SCALED])
def test_greedy_texts_are_those_of_the_original_with_all_settings_in_force(name, original):
    theirs, folder = original(name)
    model, params = ft.load_pretrained(folder)
    random = np.random.default_rng(1)
    ids = random.integers(5, 90, (1, 6))
    settings = theirs.generation_config
    extra = {}
    if "cc25" in name:
        extra["decoder_start_token_id"] = 20
    expected = theirs.generate(
        torch.tensor(ids),
        num_beams=1,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        attention_mask=torch.ones_like(torch.tensor(ids)),
        **extra,
    )
    write = generate_target if theirs.config.is_encoder_decoder else generate
    start = {"start_ids": (20,)} if extra else {}
    greedy = {"choice": Sampling(), "max_new_tokens": NEW_TOKENS}
    found = np.asarray(write(model, params, ids, **greedy, **start))[0].tolist()
    first = 1 if theirs.config.is_encoder_decoder else ids.shape[1]
    wanted = expected[0, first:].tolist()
    assert found[: len(wanted)] == wanted
    pad = settings.pad_token_id or 0
    assert found[len(wanted) :] == [pad] * (NEW_TOKENS - len(wanted))
