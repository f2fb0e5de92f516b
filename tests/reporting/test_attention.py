"""Attention probabilities of models, and the maps that reports show of them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.reporting import attention
from flax_transformers.reporting.attention import attention_maps, attention_probabilities
from flax_transformers.reporting.attention_charts import AttentionMaps, attention_chart
from flax_transformers.testing import tiny_model

IDS = np.array([[5, 9, 3, 7, 11, 4]], np.int32)


def test_layers_of_a_pattern_come_in_order_and_keep_to_their_windows():
    """Of four layers the second and third attend to one neighbour, the others to all tokens."""
    windows = {"num_layers": 4, "local_attention": 2, "global_every": 3}
    model, params = tiny_model("ModernBertModel", **windows)
    found = attention_probabilities(model, params, input_ids=IDS)
    assert list(found) == ["attention"] and found["attention"].shape == (4, 1, 4, 6, 6)
    np.testing.assert_allclose(found["attention"].sum(-1), 1.0, rtol=1e-5)
    distance = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    far = [values[..., distance > 1].max() > 0 for values in found["attention"]]
    assert far == [True, False, False, True]


@pytest.mark.slow
def test_both_stacks_and_the_attention_between_them_are_told_apart():
    model, params = tiny_model("T5ForConditionalGeneration")
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
    model, params = tiny_model(
        "AlbertModel", num_layers=4, num_groups=2, layers_per_group=2, vocab_size=96
    )
    assert attention_probabilities(model, params, input_ids=IDS)["attention"].shape[0] == 8


@pytest.mark.slow
def test_probabilities_times_values_are_what_the_layer_attends_to():
    """With an identity for values and output, a layer without residual gives its probabilities."""
    model, params = tiny_model("BertModel", num_layers=1, hidden_size=8, num_heads=1)
    mask = np.array([[1, 1, 1, 1, 0, 0]], np.int32)
    inputs = {"input_ids": IDS, "attention_mask": mask}
    probabilities = attention_probabilities(model, params, **inputs)["attention"][0, 0, 0]
    assert probabilities[:, 4:].max() == 0.0
    attend = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name in ("value", "output"):
            attend[context.module.name] = (args[0], result)
        return result

    scanless = model.clone(compute=model.compute.__class__(scan_layers=False))
    with jax.disable_jit(), attention.nn.intercept_methods(record):
        scanless.apply({"params": params}, **inputs)
    values, attended = attend["value"][1][0, :, 0], attend["output"][0][0, :, 0]
    np.testing.assert_allclose(probabilities @ np.asarray(values), attended, atol=1e-6)


def test_a_model_without_attention_is_refused():
    class Nothing(attention.nn.Module):
        def __call__(self, x):
            return x

    with pytest.raises(UserError, match="Nothing has no attention"):
        attention_probabilities(Nothing(), {}, x=np.zeros(1))


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
    model = SimpleNamespace(config=None, inputs=("input_ids", "segment_ids"))
    batch = {"input_ids": ids, "segment_ids": segments}
    (maps,) = attention_maps(model, {}, MaskedLM(), batch, ByteTokenizer())
    assert maps.queries == maps.keys == tuple("abcdefg") and maps.layers == (0,)


def test_over_an_image_the_class_token_or_all_patches_attend(monkeypatch):
    weights = np.arange(25.0).reshape(1, 1, 1, 5, 5)
    batch = {"pixel_values": np.full((1, 3, 8, 8), 255, np.uint8)}
    model, _ = tiny_model("ViTModel", image_size=8, patch_size=4)
    monkeypatch.setattr(attention, "attention_probabilities", given(attention=weights))
    (maps,) = attention_maps(model, {}, ImageClassification(), batch, None)
    assert maps.probabilities.tolist() == [[[[1, 2], [3, 4]]]] and maps.picture.min() == 1.0
    monkeypatch.setattr(attention, "attention_probabilities", given(attention=weights[..., 1:, 1:]))
    (maps,) = attention_maps(model, {}, ImageClassification(), batch, None)
    assert maps.probabilities.tolist() == [[[[13.5, 14.5], [15.5, 16.5]]]]


@pytest.mark.parametrize(
    ("keys", "size", "grid"),
    [
        (197, (224, 224), (14, 14)),
        (50, (28, 28), (7, 7)),
        (13, (16, 32), (2, 5)),
        (1, (4, 4), (1, 1)),
    ],
)
def test_the_grid_of_patches_has_the_shape_of_the_image(keys, size, grid):
    assert attention._grid(keys, size) == grid


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
