"""VideoMAE against Hugging Face's, through tests/golden/videomae.npz; masks, targets and sizes."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families.videomae import (
    CLASSIFIER,
    SIZES,
    VideoMaeConfig,
    cut_tubelets,
    from_huggingface,
    sinusoid_table,
    tubelet_targets,
    weights,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.images import IMAGENET_MEAN, IMAGENET_STD
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE, first_by_default, load_case, some_by_default
from tests.families.test_vit import in_file
from tests.families.vision import published_count
from tests.golden import videomae as golden
from tests.golden.hub import read_golden
from tests.huggingface.tensors import export_weights


def masked_loss(model, params, videos, mask):
    """The mean squared error over masked tubelets; the original normalises the pixels back."""
    predicted = model.apply({"params": params}, videos, mask).logits
    scale, shift = (
        jnp.asarray(v)[None, None, :, None, None] for v in (IMAGENET_STD, IMAGENET_MEAN)
    )
    targets = model.apply({"params": params}, videos * scale + shift, method="targets")
    return jnp.square(predicted - targets[mask].reshape(predicted.shape)).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    some_by_default(golden.PRETRAINING, [golden.NORMED]),
    ids=lambda case: case.name,
)
@pytest.mark.full
def test_the_loss_and_its_gradients_are_those_of_torch(case):
    _, model, params, table = load_case(case)
    loss = partial(
        masked_loss, model, videos=case.inputs["pixel_values"], mask=case.inputs["bool_masked_pos"]
    )
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = read_golden(golden.__file__, case)
    assert relative_difference(value, expected["loss"]) < TOLERANCE
    ours = export_weights(table, grads, 0)
    theirs = {
        in_file(name.removeprefix("gradients/"), table): gradient
        for name, gradient in expected.items()
        if name.startswith("gradients/")
    }
    assert ours.keys() == theirs.keys()
    far = {name: relative_difference(ours[name], theirs[name]) for name in theirs}
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}


def test_a_tubelet_holds_the_same_patch_of_consecutive_frames():
    videos = np.random.default_rng(0).standard_normal((2, 4, 3, 8, 12), np.float32)
    tubelets = np.asarray(cut_tubelets(videos, 2, 4))
    assert tubelets.shape == (2, 2 * 2 * 3, 3, 2, 4, 4)
    # The second row and third column of patches, in the second pair of frames.
    expected = videos[1, 2:4, :, 4:8, 8:12].swapaxes(0, 1)
    np.testing.assert_array_equal(tubelets[1, 6 + 5], expected)


def test_normed_targets_have_mean_zero_and_unbiased_variance_one_in_each_channel():
    config = from_huggingface(golden.NORMED.config)
    videos = 0.5 + 0.2 * np.random.default_rng(0).standard_normal((2, 6, 3, 12, 12), np.float32)
    targets = np.asarray(tubelet_targets(config, videos)).reshape(2, 27, -1, 3)
    np.testing.assert_allclose(targets.mean(axis=2), np.zeros((2, 27, 3)), atol=1e-5)
    np.testing.assert_allclose(targets.std(axis=2, ddof=1), np.ones((2, 27, 3)), rtol=1e-4)


def test_a_tube_is_masked_at_all_times_and_as_many_as_the_ratio_says():
    config = VideoMaeConfig(image_size=64, num_frames=8, mask_ratio=0.7)
    model = build_model(config, ComputeConfig())
    noise = np.random.default_rng(0).random((5, config.tubelets), np.float32)
    mask = np.asarray(model.apply({}, noise, method="tube_mask")).reshape(5, 4, 16)
    assert (mask == mask[:, :1]).all()
    assert (mask[:, 0].sum(axis=1) == 11).all()  # 0.7 of 16, rounded down
    assert (np.where(mask[:, 0], noise[:, :16], 1).min(axis=1) >= 0.2).all()
    assert (np.where(mask[:, 0], 0, noise[:, :16]).max(axis=1) <= noise[:, :16].max(axis=1)).all()
    assert config.tubelets - config.visible == 4 * 11


def test_positions_are_the_sinusoids_of_the_first_transformer():
    table = sinusoid_table(5, 8)
    np.testing.assert_allclose(table[3, :2], [np.sin(3.0), np.cos(3.0)], rtol=1e-6)
    np.testing.assert_allclose(table[3, 4:6], [np.sin(0.03), np.cos(0.03)], rtol=1e-6)


def test_a_mask_of_another_number_of_tubelets_and_a_video_of_another_size_are_refused():
    _, model, params, _ = load_case(golden.ENCODER)
    videos, mask = golden.ENCODER.inputs.values()
    apply = partial(model.apply, {"params": params})
    with pytest.raises(UserError, match=r"masks \[27\] of 27 tubelets, but model.mask_ratio 0.9"):
        apply(videos, np.ones_like(mask))
    with pytest.raises(UserError, match=r"bool_masked_pos has shape \[2, 26\]"):
        apply(videos, mask[:, 1:])
    with pytest.raises(UserError, match=r"\[2, 4, 3, 12, 12\]; .* \[batch, 6, 3, 12, 12\]"):
        apply(videos[:, :4], mask)


@pytest.mark.slow
def test_fine_tuning_takes_the_encoder_of_a_pretrained_file_and_starts_a_classifier(
    tmp_path, caplog
):
    _, model, params, _ = load_case(golden.NORMED)
    save_pretrained(tmp_path / "saved", model, params)
    with caplog.at_level(logging.WARNING):
        classifier, loaded = load_pretrained(
            tmp_path / "saved", architecture=CLASSIFIER, num_labels=5
        )
    assert "classification_head" in caplog.text and "decoder" not in caplog.text
    assert loaded.keys() == {"embeddings", "stack", "pooled_norm", "classification_head"}
    for name in ("embeddings", "stack"):
        jax.tree.map(np.testing.assert_array_equal, loaded[name], params[name])
    output = jax.jit(classifier.apply)({"params": loaded}, golden.NORMED.inputs["pixel_values"])
    assert output.logits.shape == (2, 5)
    assert output.last_hidden_state.shape[1] == 27


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.CASES:
        assert config_json(from_huggingface(case.config)).items() >= case.config.items()
    for size in SIZES.values():
        assert from_huggingface(config_json(size)) == size


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "videomae"}) == VideoMaeConfig()
    assert from_huggingface({"use_mean_pooling": False}) == SIZES["videomae-base"]
    assert from_huggingface({"qkv_bias": False}).qkv_bias is False


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_ratio", 1.0, "model.mask_ratio is 1.0"),
        ("num_frames", 1, "model.num_frames 1 is less than one tubelet"),
        ("decoder_hidden_size", 32, "of the decoder, model.hidden_size 32 does not divide"),
        ("model_type", "vivit", "model_type 'vivit'"),
        ("use_mean_pooling", "no", "use_mean_pooling"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, message):
    with pytest.raises(UserError, match=message):
        from_huggingface({field: value})


# Parameters of VideoMAEForPreTraining in transformers, and of its classifier of the 400 classes of
# Kinetics; the repository of the paper gives 22, 87, 305 and 633 M.
PUBLISHED = {
    "videomae-small": (24_029_376, 22_033_936),
    "videomae-base": (94_210_944, 86_534_800),
    "videomae-large": (342_996_992, 304_270_736),
    "videomae-huge": (692_487_296, 632_119_440),
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name][0]
    classifier = replace(SIZES[name], architecture=CLASSIFIER, num_labels=400)
    assert published_count(classifier, weights) == PUBLISHED[name][1]
