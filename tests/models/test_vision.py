"""Vision models as a whole: positions, pooling, stochastic depth, resolution, names of axes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families import vit
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.models.config import ComputeConfig, VisionConfig
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.layers.patches import resize_positions, sincos_table
from flax_transformers.models.vision import (
    VISION_PARTS,
    Positions,
    VisionBlock,
    VisionForClassification,
    VisionModel,
    VisionWithPooler,
    change_image_size,
)
from flax_transformers.optim.optimizers import LAMB, AdamW, Lion, Muon
from flax_transformers.optim.schedules import Schedule
from flax_transformers.optim.selection import logical_axes
from flax_transformers.parallel.rules import mesh_axes
from tests.huggingface.tensors import parameter_shapes

SIZES = {
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 8,
    "image_size": (4, 6),
    "patch_size": 2,
    "num_labels": 5,
    "norm_eps": 1e-6,
}
CONFIG = VisionConfig(**SIZES)
IN_TWO_HALVES = ViTConfig(**SIZES, rows_and_columns=True)
POSITIONS = pytest.mark.parametrize("config", [CONFIG, IN_TWO_HALVES], ids=["one", "two_halves"])


def images(*shape):
    return np.random.default_rng(7).standard_normal(shape, np.float32)


def random_like(shapes):
    """Random numbers in the place of shapes; none of them zero or one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def parts_of(config):
    return vit.FAMILY.parts if isinstance(config, ViTConfig) else VISION_PARTS


def start(config, kind=VisionForClassification, **compute):
    """A model and parameters for it, all of them random."""
    model = kind(config, ComputeConfig(**compute), parts_of(config))
    return model, random_like(parameter_shapes(model))


def run(model, params, x, rngs=None, **options):
    """The model's output, compiled."""
    return jax.jit(lambda params, x: model.apply({"params": params}, x, rngs=rngs, **options))(
        params, x
    )


@pytest.mark.parametrize("kind", [VisionForClassification, VisionWithPooler])
@POSITIONS
def test_every_parameter_has_axes_that_the_rules_know(kind, config):
    model = kind(config, parts=parts_of(config))
    boxed = jax.eval_shape(partial(model.init, **model.example_inputs()), jax.random.key(0))
    specs, shapes = nn.get_partition_spec(boxed["params"]), nn.meta.unbox(boxed["params"])

    def check(shape, spec):
        assert len(mesh_axes(spec)) == len(shape.shape)

    jax.tree.map(check, shapes, specs)


@pytest.mark.slow
def test_a_class_token_stands_before_the_patches_and_average_pooling_has_none():
    for pooling, tokens in (("class", 1), ("average", 0)):
        model, params = start(replace(CONFIG, pooling=pooling))
        output = run(model, params, images(2, 3, 4, 6))
        assert output.last_hidden_state.shape == (2, tokens + 6, 12)
        assert params["embeddings"]["position"]["embedding"].shape == (tokens + 6, 12)
        assert ("class_token" in params["embeddings"]) == (tokens == 1)


def test_a_classifier_looks_at_the_class_token_or_at_the_mean_of_all_patches():
    hidden = np.asarray(images(2, 7, 12))
    for pooling, pooled in (("class", hidden[:, 0]), ("average", hidden.mean(axis=1))):
        model, params = start(replace(CONFIG, pooling=pooling))
        head = params["classification_head"]
        logits = jax.jit(partial(model.apply, method="classify"))({"params": params}, hidden)
        expected = pooled @ head["kernel"] + head["bias"][None]
        np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.slow
def test_two_dimensional_positions_are_a_row_vector_beside_a_column_vector():
    config = replace(IN_TWO_HALVES, pooling="average")
    model, params = start(config, VisionModel)
    table = params["embeddings"]["position"]
    rows, columns = table["rows"]["embedding"], table["columns"]["embedding"]
    assert rows.shape == (2, 6) and columns.shape == (3, 6)
    joined = [[np.concatenate([row, column]) for column in columns] for row in rows]
    params["embeddings"]["position"] = {"embedding": np.reshape(joined, (6, 12))}
    plain = VisionModel(replace(CONFIG, pooling="average"))
    x = images(1, 3, 4, 6)
    expected = run(plain, params, x).last_hidden_state
    params["embeddings"]["position"] = table
    np.testing.assert_array_equal(run(model, params, x).last_hidden_state, expected)


def test_fixed_positions_start_from_their_table():
    config = replace(CONFIG, positions="sincos_2d")
    positions = Positions(config, jnp.dtype(jnp.float32))
    params = nn.meta.unbox(positions.init(jax.random.key(0), config.grid)["params"])
    np.testing.assert_array_equal(params["embedding"], sincos_table((2, 3), 12, tokens=1))


@pytest.mark.slow
def test_fixed_positions_have_no_gradient():
    model, params = start(replace(CONFIG, positions="sincos_2d", num_layers=1))

    def loss(params):
        return model.apply({"params": params}, images(2, 3, 4, 6)).logits.sum()

    grads = jax.jit(jax.grad(loss))(params)["embeddings"]
    assert not np.any(grads["position"]["embedding"]) and np.any(grads["class_token"]["embedding"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [AdamW, LAMB, Lion, Muon])
def test_fixed_positions_do_not_decay(optimizer):
    boxed = boxed_shapes(VisionModel(replace(CONFIG, positions="sincos_2d")))
    shapes, axes = nn.meta.unbox(boxed), logical_axes(boxed)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    rule = optimizer(
        weight_decay=0.5, no_decay=("bias", "scale"), schedule=Schedule("constant")
    ).make(9, axes)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(gradients, rule.init(params), params)
    assert not np.any(updates["embeddings"]["position"]["embedding"])
    assert np.all(updates["embeddings"]["patches"]["kernel"])


@pytest.mark.slow
@POSITIONS
def test_changing_the_image_size_is_interpolating_positions_ahead(config):
    model, params = start(config)
    x = images(2, 3, 8, 6)
    expected = run(model, params, x, interpolate_pos_encoding=True).logits
    config, resized = change_image_size(model.config, params, (8, 6))
    assert config.image_size == (8, 6)
    found = run(VisionForClassification(config, parts=parts_of(config)), resized, x).logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_changing_the_image_size_changes_positions_alone():
    _, params = start(CONFIG)
    _, resized = change_image_size(CONFIG, params, 8)
    old = params["embeddings"].pop("position")["embedding"]
    new = resized["embeddings"].pop("position")["embedding"]
    np.testing.assert_array_equal(new, resize_positions(old, (2, 3), (4, 4)))
    jax.tree.map(np.testing.assert_array_equal, resized, params)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 6), "are 8 x 6 pixels, but the model has positions for 4 x 6"),
        ((1, 1, 4, 6), r"shape \[1, 1, 4, 6\]; they must be \[batch, 3, height, width\]"),
        ((3, 4, 6), r"shape \[3, 4, 6\]"),
    ],
)
def test_images_of_another_shape_are_refused(shape, message):
    model, params = start(CONFIG)
    with pytest.raises(UserError, match=message):
        model.apply({"params": params}, images(*shape))


@pytest.mark.slow
def test_an_image_skips_a_sub_layer_or_gets_more_of_it():
    block = VisionBlock(CONFIG, ComputeConfig(), deterministic=False)
    x = images(64, 2, 12)
    init = jax.eval_shape(block.init, jax.random.key(0), x, LayerInputs(), None)
    params = random_like(nn.meta.unbox(init["params"]))
    params["mlp"]["down"] = jax.tree.map(jnp.zeros_like, params["mlp"]["down"])
    apply = jax.jit(block.apply)
    whole = np.asarray(apply({"params": params}, x, LayerInputs(), None)[0] - x)
    rngs = {"dropout": jax.random.key(3)}
    dropped = apply({"params": params}, x, LayerInputs(), jnp.float32(0.25), rngs=rngs)[0]
    added = np.asarray(dropped - x)
    skipped = ~np.any(added, axis=(1, 2))
    assert 8 <= skipped.sum() <= 24
    np.testing.assert_allclose(added[~skipped], whole[~skipped] / 0.75, rtol=1e-4, atol=1e-6)


def test_drop_rates_rise_evenly_over_the_layers():
    config = replace(CONFIG, num_layers=5, drop_path=0.5)
    np.testing.assert_allclose(config.drop_path_rates(), [0, 0.125, 0.25, 0.375, 0.5])


@pytest.mark.slow
def test_each_layer_has_its_own_drop_rate():
    config = replace(CONFIG, drop_path=0.999)
    np.testing.assert_allclose(config.drop_path_rates(), [0, 0.999])
    model, params = start(config)
    block = params["stack"]["layers"]["block_0"]
    for layer in (block["attention"]["output"], block["mlp"]["down"]):
        for leaf in layer.values():
            leaf[1] = 0  # the second layer adds nothing, so that dropping it changes nothing
    x = images(8, 3, 4, 6)
    rngs = {"dropout": jax.random.key(5)}
    dropped = run(model, params, x, rngs, deterministic=False).logits
    np.testing.assert_allclose(dropped, run(model, params, x).logits, rtol=1e-5)


@pytest.mark.slow
def test_stochastic_depth_is_for_training_and_the_same_scanned_or_written_out():
    config = replace(CONFIG, drop_path=0.6, num_layers=3)
    x = images(8, 3, 4, 6)
    runs = {}
    for scan in (True, False):
        model, params = start(config, scan_layers=scan)
        rngs = {"dropout": jax.random.key(5)}
        runs[scan] = run(model, params, x, rngs, deterministic=False).logits
    still = run(model, params, x).logits
    plain = VisionForClassification(replace(config, drop_path=0.0), parts=parts_of(config))
    np.testing.assert_allclose(still, run(plain, params, x).logits, rtol=1e-5)
    assert np.abs(np.asarray(still - runs[True])).max() > 0.1
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_half_precision_activations_give_float32_logits():
    model, params = start(replace(CONFIG, pooling="average"), dtype="bfloat16")
    output = run(model, params, images(2, 3, 4, 6))
    assert output.last_hidden_state.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "model.patch_size is 0"),
        ({"image_size": 1}, "model.image_size 1 is less than one patch"),
        ({"drop_path": 1.0}, "model.drop_path is 1.0"),
        ({"hidden_size": 6, "positions": "sincos_2d"}, "model.hidden_size 6 does not divide by 4"),
    ],
)
def test_a_config_that_describes_no_model_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)
