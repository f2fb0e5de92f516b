"""Attention probabilities of models, and the maps that reports show of them."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import all_families, build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.reporting import attention
from flax_transformers.reporting.attention import attention_maps, attention_probabilities
from flax_transformers.reporting.attention_charts import AttentionMaps, attention_chart
from flax_transformers.testing import tiny_architecture
from tests.huggingface.tensors import drawn_model

IDS = np.array([[5, 9, 3, 7, 11, 4]], np.int32)


def test_layers_of_a_pattern_come_in_order_and_keep_to_their_windows():
    """Of four layers the second and third attend to one neighbour, the others to all tokens."""
    windows = {"num_layers": 4, "local_attention": 2, "global_every": 3}
    model, params = drawn_model("ModernBertModel", **windows)
    found = attention_probabilities(model, params, input_ids=IDS)
    assert list(found) == ["attention"] and found["attention"].shape == (4, 1, 4, 6, 6)
    np.testing.assert_allclose(found["attention"].sum(-1), 1.0, rtol=1e-5)
    distance = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    far = [values[..., distance > 1].max() > 0 for values in found["attention"]]
    assert far == [True, False, False, True]


@pytest.mark.slow
def test_both_stacks_and_the_attention_between_them_are_told_apart():
    model, params = drawn_model("T5ForConditionalGeneration")
    found = attention_probabilities(model, params, input_ids=IDS, decoder_input_ids=IDS[:, :4])
    shapes = {name: values.shape for name, values in found.items()}
    assert shapes == {
        "encoder/attention": (2, 1, 4, 6, 6),
        "decoder/attention": (2, 1, 4, 4, 4),
        "decoder/cross_attention": (2, 1, 4, 4, 6),
    }
    assert np.triu(found["decoder/attention"][0, 0, 0], k=1).max() == 0.0


@pytest.mark.slow
def test_shared_layers_count_as_often_as_they_are_used():
    model, params = drawn_model(
        "AlbertModel", num_layers=4, num_groups=2, layers_per_group=2, vocab_size=96
    )
    assert attention_probabilities(model, params, input_ids=IDS)["attention"].shape[0] == 8


@pytest.mark.slow
def test_probabilities_times_values_are_what_the_layer_attends_to():
    """The values are the output of the layer's value projection, and what the layer attends to is
    what its output projection projects."""
    model, params = drawn_model("BertModel", num_layers=1, hidden_size=8, num_heads=1)
    mask = np.array([[1, 1, 1, 1, 0, 0]], np.int32)
    inputs = {"input_ids": IDS, "attention_mask": mask}
    probabilities = attention_probabilities(model, params, **inputs)["attention"][0, 0, 0]
    assert probabilities[:, 4:].max() == 0.0
    named = lambda module, method: method == "__call__" and module.name in ("value", "output")  # noqa: E731
    run = jax.jit(partial(model.apply, capture_intermediates=named, mutable=["intermediates"]))
    _, found = run({"params": params}, **inputs)
    results, layer = (
        tree["stack"]["layers"]["block_0"]["attention"] for tree in (found["intermediates"], params)
    )
    values, projected = (results[name]["__call__"][0][0, 0] for name in ("value", "output"))
    kernel, bias = (np.asarray(layer["output"][name])[0] for name in ("kernel", "bias"))
    attended = probabilities @ np.asarray(values)[:, 0]
    np.testing.assert_allclose(attended @ kernel[0] + bias, projected, atol=1e-6)


OF_EACH_KIND = {"BertConfig", "AlbertConfig", "DebertaV2Config", "T5Config", "CoAtNetConfig"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=[pytest.mark.full] * (name not in OF_EACH_KIND))
        for family in all_families()
        for name in [family.config.__name__]
    ],
)
def test_every_family_says_what_its_heads_attend_to(family):
    model = build_model(tiny_architecture(family.config().architecture), ComputeConfig())
    trace = partial(model.init, jax.random.key(0), mutable=True)
    sown = jax.eval_shape(trace, **model.example_inputs())["intermediates"]
    sown = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sown)
    stacks = attention._stacks(attention._layers(sown))
    assert stacks and {values.ndim for values in stacks.values()} == {5}
    if "stage_2/attention" in stacks:  # CoAtNet: maps of 2 x 2 and 1 x 1 positions
        assert stacks["stage_2/attention"].shape == (1, 1, 1, 4, 4)
        assert stacks["stage_3/attention"].shape == (2, 1, 2, 1, 1)


class Sowing(nn.Module):
    """A layer that attends to the inputs, equally."""

    @nn.compact
    def __call__(self, x_BT, deterministic=True):
        length = x_BT.shape[1]
        if deterministic:
            values = jnp.full((len(x_BT), 1, length, length), 1 / length)
            self.sow("intermediates", "probabilities", values)
        return x_BT


class Unusual(nn.Module):
    """Layers outside a ``Stack``, with names of its parts, and repeated calls."""

    weights: Any = None

    def setup(self):
        self.layers, self.first, self.twice = Sowing(), Sowing(), Sowing()

    def __call__(self, x_BT, deterministic=True):
        x_BT = self.twice(self.layers(x_BT, deterministic), deterministic)
        self.first(x_BT, deterministic)
        self.first(x_BT[:, 1:], deterministic)
        return self.twice(x_BT, deterministic)


@pytest.mark.parametrize("weights", [None, np.zeros(2)], ids=["hashed", "without_a_hash"])
def test_any_names_and_repeated_calls_are_shown(weights):
    found = attention_probabilities(Unusual(weights), {}, x_BT=np.zeros((2, 3), np.float32))
    assert {name: values.shape for name, values in found.items()} == {
        "layers": (1, 2, 1, 3, 3),
        "first/0": (1, 2, 1, 3, 3),
        "first/1": (1, 2, 1, 2, 2),
        "twice": (2, 2, 1, 3, 3),
    }


def test_options_of_a_call_are_not_traced_and_equal_calls_are_compiled_once():
    x_BT = np.zeros((1, 5), np.float32)
    first = attention_probabilities(Unusual(), {}, x_BT=x_BT, deterministic=True)
    compiled = attention._compiled_sown._cache_size()
    again = attention_probabilities(Unusual(), {}, x_BT=x_BT, deterministic=True)
    assert attention._compiled_sown._cache_size() == compiled and again.keys() == first.keys()
    with pytest.raises(UserError, match="Unusual has no attention"):
        attention_probabilities(Unusual(), {}, x_BT=x_BT, deterministic=False)


def test_separate_layers_come_in_the_order_of_stacked_ones():
    blocks = {f"block_{i}": i + 10.0 * np.arange(3).reshape(3, 1, 1, 1, 1) for i in range(2)}
    stacked = {name: {"attention": {"probabilities": (values,)}} for name, values in blocks.items()}
    separate = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)}
    for sown in ({"layers": stacked}, separate):
        found = attention._stacks(attention._layers({"stack": sown}))
        assert list(found) == ["attention"]
        assert found["attention"].flatten().tolist() == [0, 1, 10, 11, 20, 21]


def test_parts_of_a_stack_that_differ_in_heads_have_entries_of_their_own():
    """The first layer of a stage of some CoAtNets has fewer heads."""

    def part(heads):
        return {"block_0": {"attention": {"probabilities": (np.zeros((1, 2, heads, 4, 4)),)}}}

    sown = {"stage_2": {"first": part(1), "layers": part(2)}}
    found = attention._stacks(attention._layers(sown))
    assert sorted(found) == ["stage_2/first/attention", "stage_2/layers/attention"]


def test_a_model_without_attention_is_refused():
    class Nothing(nn.Module):
        def __call__(self, x):
            return x

    with pytest.raises(UserError, match="Nothing has no attention"):
        attention_probabilities(Nothing(), {}, x=np.zeros(1))


def test_the_prefix_and_other_arrays_of_the_tokens_reach_the_model():
    model = SimpleNamespace(inputs=("input_ids", "attention_mask", "position_ids", "prefix_mask"))
    row = {"input_ids": 7, "attention_mask": 1, "position_ids": 3, "prefix_mask": 1, "labels": 2}
    batch = {name: np.full((2, 8), value, np.int32) for name, value in row.items()}
    batch["attention_mask"][:, 6:] = 0
    batch["prefix_mask"][:, 4:] = 0
    found = attention._inputs(model, PrefixLM(), batch)
    assert sorted(found) == ["input_ids", "position_ids", "prefix_mask"]
    assert found["prefix_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]


def given(**found):
    """Stands for the probabilities of a model."""
    return lambda model, params, **inputs: found


def test_the_first_long_text_is_shown_without_padding_and_other_segments(monkeypatch):
    monkeypatch.setattr(
        attention, "attention_probabilities", given(attention=np.ones((1, 1, 2, 7, 7)))
    )
    text = b"abcdefg"
    ids = np.zeros((2, 12), np.int32)
    ids[0, :2], ids[1] = [100, 101], [*(byte + 3 for byte in text), 90, 91, 92, 0, 0]
    segments = np.zeros((2, 12), np.int32)
    segments[0, :2], segments[1, :7], segments[1, 7:10] = 1, 1, 2
    config = tiny_architecture("BertModel")
    model = SimpleNamespace(config=config, inputs=("input_ids", "segment_ids"))
    batch = {"input_ids": ids, "segment_ids": segments}
    (maps,) = attention_maps(model, {}, MaskedLM(), batch, ByteTokenizer())
    assert maps.queries == maps.keys == tuple("abcdefg") and maps.layers == (0,)


def test_over_an_image_the_class_token_or_all_patches_attend(monkeypatch):
    weights = np.arange(25.0).reshape(1, 1, 1, 5, 5)
    batch = {"pixel_values": np.full((1, 3, 8, 8), 255, np.uint8)}
    model, _ = drawn_model("ViTModel", image_size=8, patch_size=4)
    monkeypatch.setattr(attention, "attention_probabilities", given(attention=weights))
    (maps,) = attention_maps(model, {}, ImageClassification(), batch, None)
    assert maps.probabilities.tolist() == [[[[1, 2], [3, 4]]]] and maps.picture.min() == 1.0
    monkeypatch.setattr(attention, "attention_probabilities", given(attention=weights[..., 1:, 1:]))
    (maps,) = attention_maps(model, {}, ImageClassification(), batch, None)
    assert maps.probabilities.tolist() == [[[[13.5, 14.5], [15.5, 16.5]]]]


def test_the_grid_of_patches_is_that_of_the_config_whatever_tokens_come_before(monkeypatch):
    """An image of 2 x 4 patches and two tokens has as many keys as one of 2 x 5 patches."""
    weights = np.broadcast_to(np.arange(10.0), (1, 1, 1, 10, 10))
    batch = {"pixel_values": np.zeros((1, 3, 16, 32), np.uint8)}
    config = tiny_architecture("DeiTModel", image_size=(16, 32))
    monkeypatch.setattr(attention, "attention_probabilities", given(attention=weights))
    model = SimpleNamespace(config=config, inputs=("pixel_values",))
    (maps,) = attention_maps(model, {}, ImageClassification(), batch, None)
    assert maps.probabilities.tolist() == [[[[2, 3, 4, 5], [6, 7, 8, 9]]]]


def test_each_stage_of_coatnet_has_a_grid_of_its_own_and_texts_have_none():
    coatnet = tiny_architecture("CoAtNetForImageClassification", image_size=(32, 64))
    for stage in (2, 3):
        rows, columns = coatnet.map_shape(stage)
        assert attention._grid(coatnet, f"stage_{stage}/attention", rows * columns) == (
            rows,
            columns,
        )
    clip = tiny_architecture("CLIPModel")
    assert attention._grid(clip, "image_tower/attention", 17) == clip.vision.grid == (4, 4)
    assert attention._grid(clip, "text_tower/attention", 17) is None


def test_of_many_layers_some_are_shown_with_the_first_and_the_last():
    assert attention._spread(3, 12) == [0, 1, 2]
    assert attention._spread(24, 12)[0] == 0 and attention._spread(24, 12)[-1] == 23
    assert len(attention._spread(96, 12)) == 12


def test_a_chart_of_text_names_tokens_once_and_layers_and_heads_each():
    maps = AttentionMaps(
        "attention", np.eye(3)[None, None].repeat(2, 1), (4,), ("<a>", "b", "c"), ("x",) * 3
    )
    chart = attention_chart(maps, "m")
    assert chart.count("&lt;a&gt;") == 1 and chart.count(">x</text>") == 3
    assert re.findall(r"<figcaption>(.*?)</figcaption>", chart) == [
        "layer 4, head 0",
        "layer 4, head 1",
    ]
    assert chart.count("data:image/png;base64,") == 1
