"""DeiT III against a few lines of torch, through tests/golden/deit3.npz; its sizes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.deit3 import (
    SIZES,
    DeiT3Config,
    LayerScale,
    from_huggingface,
    weights,
)
from flax_transformers.families.family import config_json
from tests.families.parity import load_case
from tests.families.tensors import export_weights, import_weights
from tests.families.vision import published_count
from tests.golden import deit3 as golden


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
    assert config_json(from_huggingface(golden.CONFIG)).items() >= golden.CONFIG.items()
    ours = DeiT3Config(drop_path=0.25, layer_scale_init=0.5, image_size=(32, 48))
    assert from_huggingface(config_json(ours)) == ours


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


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name]
