"""MAE against Hugging Face's ViTMAE, through tests/golden/mae.npz; masks, targets and sizes."""

from __future__ import annotations

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families.mae import (
    JSON,
    SIZES,
    MaeConfig,
    hide_patches,
    patch_targets,
    weights,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE, first_by_default, load_case, some_by_default
from tests.families.test_vit import in_file
from tests.families.vision import published_count, without_prefix
from tests.golden import mae as golden
from tests.golden.hub import read_golden
from tests.huggingface.tensors import drawn_model, export_weights, import_weights


def masked_loss(model, params, images, noise):
    """The mean squared error over hidden patches."""
    output = model.apply({"params": params}, images, noise)
    targets = model.apply({"params": params}, images, method="targets")
    errors_BT = jnp.square(output.logits - targets).mean(axis=-1)
    return (errors_BT * output.mask).sum() / output.mask.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    some_by_default(golden.PRETRAINING, [golden.NORMED]),
    ids=lambda case: case.name,
)
def test_the_loss_and_its_gradients_are_those_of_torch(case):
    _, model, params, table = load_case(case)
    loss = partial(
        masked_loss, model, images=case.inputs["pixel_values"], noise=case.inputs["noise"]
    )
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = read_golden(golden.__file__, case)
    assert relative_difference(value, expected["loss"]) < TOLERANCE
    theirs = {
        in_file(name.removeprefix("gradients/"), table): value
        for name, value in expected.items()
        if name.startswith("gradients/")
    }
    ours = export_weights(table, grads, 0)
    fixed = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert ours.keys() - theirs.keys() == fixed
    assert not any(np.any(ours[name]) for name in fixed)
    # Softmax does not see what a key bias adds to all scores alike: its true gradient is zero.
    far = {
        name: relative_difference(ours[name], theirs[name])
        for name in theirs
        if not name.endswith("key.bias")
    }
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}


def test_the_patches_with_the_least_noise_are_visible_and_in_that_order():
    noise = np.array([[0.5, 0.1, 0.9, 0.2]], np.float32)
    visible, mask, restore = hide_patches(noise, 0.5)
    np.testing.assert_array_equal(visible, [[1, 3]])
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0]])
    np.testing.assert_array_equal(restore, [[2, 0, 3, 1]])


@pytest.mark.slow
def test_without_noise_a_key_draws_the_mask_and_without_either_it_is_refused():
    case = golden.ENCODER
    _, model, params, _ = load_case(case)
    images = case.inputs["pixel_values"]
    apply = jax.jit(lambda key: model.apply({"params": params}, images, rngs={"dropout": key}).mask)
    first, second = (np.asarray(apply(jax.random.key(seed))) for seed in (0, 1))
    assert np.any(first != second)
    np.testing.assert_array_equal(first.sum(axis=1), [5, 5, 5])
    with pytest.raises(UserError, match=r"give noise \[batch, patches\], or rngs="):
        model.apply({"params": params}, images)


def test_targets_are_the_pixels_of_each_patch_with_channels_last():
    config = JSON.read(golden.PLAIN.config | {"num_channels": 3})
    images = np.random.default_rng(0).standard_normal((2, 3, 12, 12), np.float32)
    targets = np.asarray(patch_targets(config, images))
    np.testing.assert_array_equal(
        targets[1, 5].reshape(4, 4, 3), images[1, :, 4:8, 8:12].transpose(1, 2, 0)
    )


def test_normed_targets_have_mean_zero_and_unbiased_variance_one_in_each_patch():
    config = JSON.read(golden.NORMED.config)
    images = 5 + 3 * np.random.default_rng(0).standard_normal((2, 3, 16, 16), np.float32)
    targets = np.asarray(patch_targets(config, images))
    np.testing.assert_allclose(targets.mean(axis=-1), np.zeros((2, 16)), atol=1e-6)
    np.testing.assert_allclose(targets.var(axis=-1, ddof=1), np.ones((2, 16)), rtol=1e-5)


@pytest.mark.parametrize("saved", ["decoder.decoder_encoder.layer.", "decoder.decoder_layers."])
def test_both_names_of_the_decoders_layers_are_read(saved):
    _, _, params, table = load_case(golden.NORMED)
    tensors = {
        name.replace("decoder.decoder_layers.", saved): value
        for name, value in export_weights(table, params, 0).items()
    }
    assert f"{saved}1.intermediate.dense.bias" in tensors
    read = import_weights(table, tensors, params, 0)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_an_encoder_reads_a_file_without_prefix():
    _, _, params, table = load_case(golden.ENCODER)
    tensors = {f"vit.{name}": value for name, value in export_weights(table, params, 0).items()}
    for named in (tensors, without_prefix(tensors, "vit.")):
        read = import_weights(table, named, params, 0)
        jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.slow
def test_fine_tuning_takes_the_encoder_of_a_pretrained_file_and_starts_a_classifier(
    tmp_path, caplog
):
    _, model, params, _ = load_case(golden.NORMED)
    save_pretrained(tmp_path / "saved", model, params)
    with caplog.at_level(logging.WARNING):
        classifier, loaded = load_pretrained(
            tmp_path / "saved", architecture="ViTMAEForImageClassification", num_labels=3
        )
    assert "classification_head" in caplog.text and "decoder" not in caplog.text
    assert loaded.keys() == {"embeddings", "stack", "final_norm", "classification_head"}
    for name in ("embeddings", "stack", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, loaded[name], params[name])
    apply = jax.jit(classifier.apply)
    output = apply({"params": loaded}, golden.NORMED.inputs["pixel_values"])
    assert output.logits.shape == (3, 3)
    assert output.last_hidden_state.shape[1] == 1 + 16


def test_a_classifier_looks_at_the_mean_of_the_patches_without_the_class_token():
    config = JSON.read(golden.ENCODER.config | {"architectures": ["ViTMAEForImageClassification"]})
    hidden = np.random.default_rng(0).standard_normal((2, 10, config.hidden_size), np.float32)
    rng = np.random.default_rng(1)
    head = {
        "kernel": rng.standard_normal((config.hidden_size, 7), np.float32),
        "bias": rng.standard_normal(7, np.float32),
    }
    logits = build_model(config, ComputeConfig()).apply(
        {"params": {"classification_head": head}}, hidden, method="classify"
    )
    expected = hidden[:, 1:].mean(axis=1) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.CASES:
        assert config_json(JSON.read(case.config)).items() >= case.config.items()


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert JSON.read({"model_type": "vit_mae"}) == MaeConfig() == SIZES["mae-base"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_ratio", 1.0, "model.mask_ratio is 1.0"),
        ("decoder_hidden_size", 30, "of the decoder, model.hidden_size 30 does not divide"),
        ("model_type", "vit", "model_type 'vit'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, message):
    with pytest.raises(UserError, match=message):
        JSON.read({field: value})


# Parameters of ViTMAEForPreTraining, fixed positions included.
PUBLISHED = {"mae-base": 111_907_840, "mae-large": 329_541_888, "mae-huge": 657_074_508}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name]


def test_a_classifier_that_transformers_does_not_have_is_not_written(tmp_path):
    model, params = drawn_model("ViTMAEForImageClassification")
    with pytest.raises(UserError, match="transformers has no class ViTMAEForImageClassification"):
        save_pretrained(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()
