"""Copied preprocessor files of models with another image size than before."""

from __future__ import annotations

import json

import pytest

from flax_transformers import load_pretrained, save_pretrained
from tests.huggingface.tensors import drawn_model

CLIP = {"do_center_crop": True, "size": {"shortest_edge": 16}, "crop_size": 16, "image_mean": [0.5]}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"size": {"height": 4, "width": 4}}, {"size": {"height": 8, "width": 8}}),
        ({"size": 4, "do_center_crop": False}, {"size": 8, "do_center_crop": False}),
        (CLIP, {**CLIP, "size": {"shortest_edge": 8}, "crop_size": 8}),
        (
            {"size": {"height": 5, "width": 5}, "crop_size": {"height": 4, "width": 4}},
            {"size": {"height": 10, "width": 10}, "crop_size": {"height": 8, "width": 8}},
        ),
        ({"size": {"shortest_edge": 9}, "crop_size": 8}, None),
        ({"size": {"shortest_edge": 4}}, None),
        ({"image_mean": [0.5]}, None),
    ],
)
def test_images_have_the_size_of_the_model_that_is_written(tmp_path, given, written):
    model, params = drawn_model("ViTForImageClassification", image_size=8)
    assert model.config.image_shape == (8, 8)
    for name, content in (
        ("preprocessor_config.json", lambda inner: inner),
        ("processor_config.json", lambda inner: {"image_processor": inner, "other": 1}),
    ):
        source, target = tmp_path / name / "source", tmp_path / name / "target"
        source.mkdir(parents=True)
        (source / name).write_text(json.dumps(content(given)))
        save_pretrained(target, model, params, tokenizer_from=source)
        assert json.loads((target / name).read_text()) == content(written or given)
        if written is None:
            assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_images_of_pairs_have_the_size_of_the_image_encoder(tmp_path):
    save_pretrained(tmp_path / "clip", *drawn_model("CLIPModel"))
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(CLIP))
    model, params = load_pretrained(tmp_path / "clip", image_size=24)
    assert model.config.vision.image_size == 24
    save_pretrained(tmp_path / "larger", model, params, tokenizer_from=tmp_path / "clip")
    written = json.loads((tmp_path / "larger" / "preprocessor_config.json").read_text())
    assert written == CLIP | {"size": {"shortest_edge": 24}, "crop_size": 24}
