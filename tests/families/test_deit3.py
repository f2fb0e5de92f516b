"""DeiT III against a few lines of torch, through tests/golden/deit3.npz; its sizes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families.deit3 import (
    SIZES,
    DeiT3Config,
    LayerScale,
    from_huggingface,
    weights,
)
from flax_transformers.huggingface.family import config_json, identify
from tests.families.parity import first_by_default, load_case
from tests.families.vision import published_count
from tests.golden import deit3 as golden
from tests.huggingface.tensors import export_weights, import_weights


def test_tensors_have_the_names_and_shapes_of_timm():
    _, _, params, table = load_case(golden.CASE)
    tensors = export_weights(table, params, 0)
    assert {name: tensor.shape for name, tensor in tensors.items()} == golden.shapes()


def test_the_authors_names_of_layer_scale_are_read():
    _, _, params, table = load_case(golden.CASE)
    tensors = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in export_weights(table, params, 0).items()
    }
    assert "blocks.1.gamma_2" in tensors
    read = import_weights(table, tensors, params, 0)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_layer_scale_starts_from_the_number_in_the_config():
    scale = LayerScale(0.01).init(jax.random.key(0), np.ones((1, 2, 6), np.float32))
    np.testing.assert_array_equal(scale["params"]["scale"].unbox(), np.full(6, 0.01, np.float32))


def test_every_layer_drops_at_the_same_rate():
    rates = DeiT3Config(num_layers=3, drop_path=0.25).drop_path_rates()
    np.testing.assert_array_equal(rates, [0.25, 0.25, 0.25])


def test_the_configuration_survives_the_way_out_and_back():
    ours = DeiT3Config(
        hidden_size=48, num_heads=6, num_layers=3, intermediate_size=36, patch_size=8,
        image_size=(32, 48), drop_path=0.25, layer_scale_init=0.5, num_labels=2,
        label_names=("cat", "dog"), qkv_bias=False,
    )  # fmt: skip
    assert from_huggingface(json.loads(json.dumps(config_json(ours)))) == ours
    for config in SIZES.values():
        assert from_huggingface(config_json(config)) == config
        assert "model_args" not in config_json(config)


def test_what_is_written_is_read_by_timm_and_not_by_transformers():
    written = config_json(SIZES["deit3-l16-384"])
    assert written["architecture"] == "deit3_large_patch16_384"
    assert (written["num_classes"], written["num_features"]) == (1000, 1024)
    assert written["pretrained_cfg"]["input_size"] == [3, 384, 384]
    assert not {"model_type", "architectures"} & set(written)


PUBLISHED_CONFIG = {
    "architecture": "deit3_small_patch16_224",
    "num_classes": 1000,
    "num_features": 384,
    "pretrained_cfg": {
        "tag": "fb_in22k_ft_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    },
}
"""config.json as timm publishes it."""


def test_the_config_json_of_timm_is_read():
    for architecture in (None, "DeiT3ForImageClassification"):
        found = identify(PUBLISHED_CONFIG, architecture)
        read = found.family.from_huggingface(found.wanted)
        assert read == SIZES["deit3-s16"]
    other = PUBLISHED_CONFIG | {"architecture": "deit3_huge_patch14_224.fb_in1k"}
    assert from_huggingface(other) == SIZES["deit3-h14"]
    labels = {"num_classes": 2, "label_names": ["cat", "dog"]}
    assert from_huggingface(PUBLISHED_CONFIG | labels).label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "vit_base_patch16_224"}, "timm's, for 'vit_base_patch16_224'; of timm's"),
        ({"architecture": "deit3_giant_patch16_224"}, "timm's, for 'deit3_giant_patch16_224'"),
        ({"model_args": {"reg_tokens": 4}}, "model_args reg_tokens, not supported"),
        ({"model_args": {"no_embed_class": False}}, "no_embed_class False, which is not supported"),
        ({"model_args": {"depth": math.nan}}, "depth nan"),
        ({"global_pool": "avg"}, "global_pool 'avg', which is not supported"),
        ({"num_classes": 0}, "num_labels is 0"),
    ],
)
def test_other_models_of_timm_are_refused_by_name(changes, said):
    described = PUBLISHED_CONFIG | changes
    with pytest.raises(UserError, match=said):
        identify(described).family.from_huggingface(described)


@pytest.mark.slow
@pytest.mark.parametrize("authors", [True, False])
def test_a_folder_of_timm_is_read_and_written_back(tmp_path, authors):
    _, model, params, table = load_case(golden.CASE)
    tensors = export_weights(table, params, 0)
    if authors:
        tensors = {re.sub(r"ls([12])\.gamma", r"gamma_\1", n): t for n, t in tensors.items()}
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = replace(model.config, norm_eps=1e-6)
    published = config_json(config)
    (folder / "config.json").write_text(json.dumps(published))
    loaded, back = load_pretrained(folder)
    assert replace(loaded.config, hub_fields=()) == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    save_pretrained(tmp_path / "again", loaded, back)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == published | {"dtype": "float32"}


def test_another_model_is_refused():
    with pytest.raises(UserError, match="model_type 'deit'"):
        from_huggingface({"model_type": "deit"})


# Parameters of timm's deit3_*: those of a ViT, less a position, plus two scales for each layer. The
# paper states 22.0, 38.8, 86.6, 304.4 and 632.1 millions at 224 pixels (table 1).
PUBLISHED = {
    "deit3-s16": 22_059_496,
    "deit3-s16-384": 22_205_416,
    "deit3-m16": 38_849_512,
    "deit3-b16": 86_585_320,
    "deit3-b16-384": 86_877_160,
    "deit3-l16": 304_374_760,
    "deit3-l16-384": 304_763_880,
    "deit3-h14": 632_126_440,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name]
