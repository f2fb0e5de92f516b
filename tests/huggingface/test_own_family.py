"""A registered family of a user's own is built, saved and loaded like those of the package."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers import config_json
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import Family, build_model, family_of, family_of_json
from flax_transformers.huggingface.placement import body_names, boxed_shapes
from flax_transformers.monitoring.model_flops import step_flops
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import Adafactor, decay_mask
from flax_transformers.optim.selection import logical_axes
from tests.huggingface import own_family

CONFIG = own_family.BagConfig(speed=0.5)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(config_json, "_families", dict(config_json._families))
    monkeypatch.setattr(config_json, "_registered", dict(config_json._registered))
    assert ft.register(own_family.FAMILY) is own_family.FAMILY


def start():
    model = build_model(CONFIG)
    boxed = model.init(jax.random.key(0), **model.example_inputs())["params"]
    return model, boxed


def test_an_unregistered_config_names_the_remedy(monkeypatch):
    monkeypatch.setattr(config_json, "_families", {})
    with pytest.raises(UserError, match="BagConfig is the config of no family.*register"):
        build_model(CONFIG)


def test_its_configs_are_saved_by_type_and_read_back():
    saved = json.loads(json.dumps(config_json.to_json(CONFIG)))
    assert saved["type"] == "tests.huggingface.own_family:BagConfig"
    assert config_json.from_json(saved) == CONFIG
    assert family_of(CONFIG) is own_family.FAMILY


@pytest.mark.slow
def test_its_weights_go_out_and_come_back_bit_equal(tmp_path):
    model, boxed = start()
    params = nn.meta.unbox(boxed)
    # Padded rows of the vocabulary are not in a file, and come back as zeros.
    params["lookup"]["vectors"] = params["lookup"]["vectors"].at[96:].set(0)
    params["readout"]["out"] = params["readout"]["out"].at[:, 96:].set(0)
    ft.save_pretrained(tmp_path / "bag", model, params)
    described = json.loads((tmp_path / "bag" / "config.json").read_text())
    assert (described["model_type"], described["speed"]) == ("bag", 0.5)
    again, read = ft.load_pretrained(tmp_path / "bag")
    assert type(again) is own_family.BagForCausalLM
    assert dataclasses.replace(again.config, generation=CONFIG.generation) == CONFIG
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.slow
def test_its_head_starts_fresh_where_a_file_has_none(tmp_path, caplog):
    model, boxed = start()
    assert body_names(model) == {"lookup", "mixer"}
    bare = build_model(own_family.BagConfig(architecture="BagModel"))
    params = nn.meta.unbox(boxed)
    del params["readout"]
    ft.save_pretrained(tmp_path / "bag", bare, params)
    _, read = ft.load_pretrained(tmp_path / "bag", architecture="BagForCausalLM")
    assert "readout: newly initialised" in caplog.text
    np.testing.assert_array_equal(read["mixer"]["w_in"], params["mixer"]["w_in"])


def test_decay_goes_by_the_axes_of_its_parameters():
    boxed = boxed_shapes(build_model(CONFIG))
    axes, shapes = logical_axes(boxed), nn.meta.unbox(boxed)
    assert decay_mask(shapes, ("bias", "scale", "embedding"), axes) == {
        "lookup": {"vectors": False},
        "mixer": {"gain": False, "w_in": True, "b_in": False, "w_out": True},
        "readout": {"out": True},
    }
    assert decay_mask(shapes, ("bias", "scale"), axes)["lookup"] == {"vectors": True}


@pytest.mark.slow
def test_statistics_are_factored_in_each_layer():
    boxed = boxed_shapes(build_model(CONFIG))
    optimizer = Adafactor(min_factored=4).make(10, logical_axes(boxed))
    state = jax.eval_shape(optimizer.init, nn.meta.unbox(boxed))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    row, column, full = (
        next(s for k, s in shapes.items() if f".{field}['mixer']['{name}']" in k)
        for field, name in (("row", "w_in"), ("column", "w_in"), ("full", "gain"))
    )
    assert (row, column, full) == ((3, 8), (3, 12), (3, 8))


def test_flops_count_its_kernels():
    boxed = boxed_shapes(build_model(CONFIG))
    found = step_flops(
        CONFIG, CausalLM(), nn.meta.unbox(boxed), logical_axes(boxed), batch_size=2,
        sequence_length=16,
    )  # fmt: skip
    tokens, predicted = 32, 2 * CausalLM().predictions(16)
    layers = 6 * tokens * 3 * 2 * 8 * 12
    attention = 6 * tokens * 3 * 16 * 8  # as of any causal text model
    assert found == layers + attention + 6 * predicted * 8 * 128


def test_a_family_of_no_other_library_needs_no_format(tmp_path):
    family = Family(config=own_family.BagConfig, architectures=own_family.FAMILY.architectures)
    ft.register(family)
    model, boxed = start()
    with pytest.raises(UserError, match="this family has no Hugging Face format"):
        ft.save_pretrained(tmp_path / "bag", model, nn.meta.unbox(boxed))


def test_a_model_type_that_the_package_has_too_is_read_by_the_registered_family():
    mine = dataclasses.replace(
        own_family.FAMILY, model_types=("distilbert",), from_huggingface=lambda config: CONFIG
    )
    ft.register(mine)
    assert family_of_json({"model_type": "distilbert"}) is mine


def test_an_installed_package_offers_its_family_as_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "offered_family.py").write_text(
        "from dataclasses import dataclass\n"
        "from flax_transformers.huggingface.family import Family\n"
        "from flax_transformers.models.config import TextConfig\n"
        "from flax_transformers.models.text import TextModel\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class OfferedConfig(TextConfig):\n"
        "    architecture: str = 'OfferedModel'\n"
        "FAMILY = Family(config=OfferedConfig, architectures={'OfferedModel': TextModel})\n"
    )
    info = tmp_path / "offered_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flax_transformers]\nmine = offered_family:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    small = {"hidden_size": 4, "num_layers": 1, "num_heads": 1, "intermediate_size": 4}
    saved = {
        "type": "offered_family:OfferedConfig", "vocab_size": 8, "max_positions": 4, **small,
    }  # fmt: skip
    config = config_json.from_json(saved)
    assert type(build_model(config)).__name__ == "TextModel"
