"""ViT against Hugging Face's, through tests/golden/vit.npz; its configuration and its sizes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.families._maps import BatchNormConfig
from flax_transformers.families.vit import JSON, SIZES, VIT_22B, ParallelBlock, ViTConfig, weights
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.models.vision import change_image_size
from flax_transformers.monitoring.model_flops import vision_flops
from flax_transformers.testing import relative_difference
from flax_transformers.training.setup import shapes_and_axes
from tests.families.parity import TOLERANCE, assert_parity, first_by_default, load_case
from tests.families.vision import published_count, without_prefix
from tests.golden import vit as golden
from tests.golden.hub import read_golden
from tests.huggingface.tensors import drawn_model, export_weights, import_weights, parameter_shapes


@pytest.mark.slow
@pytest.mark.full
def test_layers_that_are_written_out_compute_the_same():
    assert_parity(golden.CROPPED, golden.__file__, scan_layers=False)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in the forward pass"])
def test_images_larger_than_in_pretraining_find_interpolated_positions(ahead):
    case = golden.ENLARGED
    config, model, params, _ = load_case(case)
    images = case.inputs["pixel_values"]
    options = {"interpolate_pos_encoding": not ahead}
    if ahead:
        config, params = change_image_size(config, params, images.shape[2:])
        model = build_model(config, model.compute)
    output = jax.jit(partial(model.apply, {"params": params}, **options))(images)
    expected = read_golden(golden.__file__, case)["logits"]
    assert relative_difference(output.logits, expected) < TOLERANCE


@pytest.mark.slow
def test_the_gradients_of_the_loss_are_those_of_torch():
    case = golden.LABELLED
    _, model, params, table = load_case(case)

    def loss(params):
        logits = model.apply({"params": params}, **case.inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, case.labels).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = read_golden(golden.__file__, case)
    assert relative_difference(value, expected["loss"]) < TOLERANCE
    theirs = {
        in_file(name.removeprefix("gradients/"), table): value
        for name, value in expected.items()
        if name.startswith("gradients/")
    }
    ours = export_weights(table, grads, 0)
    assert ours.keys() == theirs.keys()
    norm = math.sqrt(sum(np.square(grad).sum() for grad in theirs.values()))
    # Softmax does not see what a key bias adds to all scores alike: its true gradient is zero.
    zero = {name for name in theirs if name.endswith("key.bias")}
    assert len(zero) == case.config["num_hidden_layers"]
    assert max(np.abs(ours[name]).max() for name in zero) < 1e-7 * norm
    far = {name: relative_difference(ours[name], theirs[name]) for name in theirs.keys() - zero}
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}


def in_file(name, table):
    """The name in a saved file of a parameter of the original in memory."""
    for pattern, replacement in table.renames:
        name = re.sub(pattern, replacement, name)
    return name


IN_MEMORY = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.slow
def test_the_names_that_transformers_has_in_memory_are_read():
    _, _, params, table = load_case(golden.LABELLED)
    tensors = export_weights(table, params, 0)
    in_memory = {}
    for name, value in tensors.items():
        for saved, renamed in IN_MEMORY.items():
            name = name.replace(saved, renamed)
        in_memory[name] = value
    assert "vit.layers.1.attention.q_proj.bias" in in_memory
    assert "vit.layers.1.mlp.fc2.weight" in in_memory
    read = import_weights(table, in_memory, params, 0)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_file_without_prefix_and_with_an_unused_pooler_is_read():
    _, _, params, table = load_case(golden.LABELLED)
    width = params["embeddings"]["class_token"]["embedding"].shape[0]
    tensors = without_prefix(export_weights(table, params, 0), "vit.")
    tensors |= {"pooler.dense.weight": np.ones((width, width)), "pooler.dense.bias": np.ones(width)}
    read = import_weights(table, tensors, params, 0)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.CASES:
        assert config_json(JSON.read(case.config)).items() >= case.config.items()
    ours = ViTConfig(
        hidden_size=6,
        num_layers=1,
        num_heads=3,
        head_dim=5,
        intermediate_size=5,
        image_size=(9, 12),
        patch_size=3,
        num_channels=2,
        norm_eps=0.5,
        qkv_bias=False,
        activation="gelu_tanh",
        dropout=0.25,
        attention_dropout=0.125,
        init_std=0.75,
        num_labels=2,
        label_names=("cat", "dog"),
    )
    assert JSON.read(config_json(ours)) == ours


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert JSON.read({"model_type": "vit"}) == ViTConfig()
    assert replace(ViTConfig(), num_labels=1000) == SIZES["vit-b16"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "elu", "activation 'elu'.*gelu_new"),
        ("pooler_act", "gelu", "pooler_act 'gelu'"),
        ("pooler_output_size", 7, "pooler_output_size 7"),
        ("patch_size", [16, 8], r"patch_size \[16, 8\].*square"),
        ("image_size", [16, 8, 3], r"image_size \[16, 8, 3\]"),
        ("image_size", "224", "image_size '224'"),
        ("image_size", 8, "model.image_size 8 is less than one patch"),
        ("model_type", "dinov2", "model_type 'dinov2'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, message):
    with pytest.raises(UserError, match=message):
        JSON.read({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "average"),
        ("positions", "sincos_2d"),
        ("rows_and_columns", True),
        ("norm", "rms"),
    ],
)
def test_a_model_that_hugging_face_has_no_vit_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(ViTConfig(**{field: value}))


# Parameters of ViTForImageClassification with 1000 labels.
PUBLISHED = {
    "vit-ti16": 5_717_416,
    "vit-ti16-384": 5_790_376,
    "vit-s16": 22_050_664,
    "vit-s16-384": 22_196_584,
    "vit-s32": 22_878_952,
    "vit-s32-384": 22_915_432,
    "vit-b16": 86_567_656,
    "vit-b16-384": 86_859_496,
    "vit-b32": 88_224_232,
    "vit-b32-384": 88_297_192,
    "vit-l16": 304_326_632,
    "vit-l16-384": 304_715_752,
    "vit-l32-384": 306_632_680,
    "vit-h14": 632_045_800,
}


@pytest.mark.parametrize("name", first_by_default(PUBLISHED))
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name]


def test_the_layers_of_vit_22b_have_the_published_number_of_weights():
    """Table 1 of arXiv:2302.05442 has 21,743 million: the matrices of the layers."""
    model = build_model(VIT_22B)
    layers = flatten_dict(parameter_shapes(model)["stack"])
    kernels = [math.prod(leaf.shape) for path, leaf in layers.items() if path[-1] == "kernel"]
    assert round(sum(kernels) / 1e6) == 21_743
    biases = {path[-2] for path in layers if path[-1] == "bias"}
    assert biases == {"output", "up", "down"}
    assert not any(path[-3:-1] == ("block_0", "mlp_norm") for path in layers)
    assert layers["layers", "block_0", "attention", "query_norm", "scale"].shape == (48, 128)


PARALLEL = {"parallel": True, "norm_of_heads": True, "norm": "rms", "qkv_bias": False}


@pytest.mark.slow
def test_a_parallel_layer_adds_attention_and_feed_forward_of_one_norm():
    model, params = drawn_model("ViTForImageClassification", num_layers=1, **PARALLEL)
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params["stack"]["layers"]["block_0"])
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    layer = ParallelBlock(model.config, model.compute)
    found, _ = jax.jit(layer.apply)({"params": block}, x, LayerInputs(), None)

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * scale

    def linear(name, spec, x, part):
        return np.einsum(spec, x, part[name]["kernel"]) + part[name].get("bias", 0)

    y, own = rms(x, block["attention_norm"]["scale"]), block["attention"]
    q, k, v = (linear(name, "btd,dnh->btnh", y, own) for name in ("query", "key", "value"))
    q, k = rms(q, own["query_norm"]["scale"]), rms(k, own["key_norm"]["scale"])
    probs = np.asarray(jax.nn.softmax(np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(8)))
    attended = linear("output", "btnh,nhd->btd", np.einsum("bnts,bsnh->btnh", probs, v), own)
    up = np.asarray(jax.nn.gelu(linear("up", "btd,df->btf", y, block["mlp"]), approximate=False))
    expected = x + attended + linear("down", "btf,fd->btd", up, block["mlp"])
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.slow
def test_attention_pooling_reads_all_patches_and_no_class_token():
    model, params = drawn_model("ViTForImageClassification", num_layers=1, pooling="attention")
    assert "class_token" not in params["embeddings"]
    images = jax.random.normal(jax.random.key(0), (1, 3, 32, 32))
    gradient = jax.jit(jax.grad(lambda x: model.apply({"params": params}, x).logits.sum()))
    assert np.abs(gradient(images)).reshape(3, 4, 8, 4, 8).max((0, 2, 4)).min() > 0
    with pytest.raises(UserError, match=r"model\.pooling is 'attention'"):
        config_json(model.config)


def test_parallel_layers_with_norms_after_them_are_refused():
    with pytest.raises(ValueError, match="parallel needs"):
        ViTConfig(parallel=True, norm_position="post")


# Millions of parameters of ViT_C, and billions of multiplications and additions at 224 pixels
# (table 3 of arXiv:2106.14881).
WITH_STEM = {
    "vitc-1gf": (4.6, 1.1),
    "vitc-4gf": (17.8, 4.0),
    "vitc-18gf": (81.6, 17.7),
    "vitc-36gf": (167.8, 35.0),
}


@pytest.mark.parametrize("name", first_by_default(WITH_STEM))
def test_sizes_with_a_stem_of_convolutions_are_those_of_the_paper(name):
    config = SIZES[name]
    shapes, axes = shapes_and_axes(config)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    trained = [leaf.size for path, leaf in leaves if path[-1].key not in ("mean", "variance")]
    parameters, flops = WITH_STEM[name]
    assert sum(trained) / 1e6 == pytest.approx(parameters, abs=0.06)
    found = vision_flops(config.flops_groups((14, 14)), shapes, axes) / 6e9
    assert found == pytest.approx(flops, rel=0.05)


def test_a_stem_that_makes_no_patch_is_refused():
    with pytest.raises(UserError, match=r"product of the strides model.patch_size 16"):
        ViTConfig(stem=((8, 2), (8, 2)))


@pytest.mark.slow
def test_a_stem_of_convolutions_sees_the_pixels_around_a_patch():
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=8, num_layers=1, num_heads=2,
        intermediate_size=8, stem=((4, 2), (6, 2)), batch_norm=BatchNormConfig(rows=1),
    )  # fmt: skip
    model = build_model(config)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    images = np.zeros((2, 3, 16, 16), np.float32)
    images[1, :, 3, 3] = 1.0  # the last pixel of the first patch

    def vectors(model, images, deterministic):
        return model.embeddings(images, deterministic=deterministic)[0]

    embed = partial(model.apply, {"params": params}, method=vectors)
    embed = jax.jit(embed, static_argnames="deterministic")
    seen = embed(images, deterministic=True)
    differs = np.any(np.asarray(seen[0] != seen[1]), axis=1).reshape(4, 4)
    assert differs[:2, :2].all() and not differs[2:].any() and not differs[:, 2:].any()
    trained = embed(images, deterministic=False)
    assert np.any(np.asarray(trained != seen))
