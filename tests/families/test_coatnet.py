"""CoAtNet against timm's, through tests/golden/coatnet.npz; its configuration and its sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families._maps import BatchNormConfig
from flax_transformers.families.coatnet import SIZES, CoAtNetConfig, from_huggingface, weights
from flax_transformers.huggingface.family import build_model, config_json, identify
from flax_transformers.huggingface.weights import tensor_shapes
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.vision import change_image_size
from flax_transformers.monitoring.model_flops import vision_flops
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.pretrained import initial_parameters
from flax_transformers.testing import relative_difference
from flax_transformers.training.setup import shapes_and_axes
from tests.families.parity import TOLERANCE, assert_parity, first_by_default, load_case
from tests.golden import coatnet as golden
from tests.huggingface.tensors import export_weights, parameter_shapes


@pytest.mark.slow
@pytest.mark.full  # test_modernbert.py and test_albert.py have examples
def test_layers_that_are_written_out_and_recomputed_compute_the_same():
    assert_parity(golden.TRAINED, golden.__file__, scan_layers=False, remat="full")


@pytest.mark.slow
def test_gradients_and_statistics_of_training_are_those_of_torch():
    case = golden.PAPER
    config, _, params, table = load_case(case)
    config = replace(config, batch_norm=BatchNormConfig(rows=3))
    model = build_model(config, ComputeConfig())

    def loss(params):
        logits = model.apply({"params": params}, **case.inputs, deterministic=False).logits
        labels = jnp.asarray(golden.TARGETS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    with np.load(golden.__file__.replace(".py", ".npz")) as file:
        expected = {
            name.removeprefix("training/"): file[name]
            for name in file.files
            if name.startswith("training/")
        }
    assert relative_difference(value, expected.pop("loss")) < TOLERANCE
    moved = jax.tree.map(np.add, params, grads)  # the gradient of a statistic is its movement
    ours = {f"gradients/{name}": value for name, value in export_weights(table, grads, 0).items()}
    ours |= {f"running/{name}": value for name, value in export_weights(table, moved, 0).items()}
    assert expected.keys() <= ours.keys()
    gradients = {name: value for name, value in expected.items() if name.startswith("gradients")}
    norm = math.sqrt(sum(np.square(grad).sum() for grad in gradients.values()))
    # What all keys of a query have in common, or what a norm takes out again, has gradient 0.
    zero = {name for name, value in expected.items() if np.abs(value).max() < 1e-7 * norm}
    assert max(np.abs(ours[name]).max() for name in zero) < 1e-6 * norm
    far = {name: relative_difference(ours[name], expected[name]) for name in expected.keys() - zero}
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}


def test_the_configuration_survives_the_way_out_and_back():
    for config in SIZES.values():
        written = config_json(config)
        assert from_huggingface(json.loads(json.dumps(written))) == config
        assert "model_args" not in written
    ours = CoAtNetConfig(
        stem_widths=(8, 12), stage_widths=(12, 16, 24, 40), stage_depths=(1, 2, 3, 4), head_dim=8,
        image_size=(32, 96), num_channels=1, expand_input=True, hidden_head=False, num_labels=2,
        label_names=("cat", "dog"), norm_eps=0.5, batch_norm_eps=0.25,
        qkv_bias=False, output_bias=False,
    )  # fmt: skip
    trained_otherwise = replace(ours, batch_norm=BatchNormConfig(rows=8, momentum=0.5))
    assert config_json(trained_otherwise) == config_json(ours)
    assert from_huggingface(json.loads(json.dumps(config_json(ours)))) == ours
    assert config_json(SIZES["coatnet-0-rw"])["architecture"] == "coatnet_0_rw_224"


PUBLISHED_CONFIG = {
    "architecture": "coatnet_0_rw_224",
    "num_classes": 1000,
    "num_features": 768,
    "global_pool": "avg",
    "pretrained_cfg": {"tag": "sw_in1k", "input_size": [3, 224, 224], "classifier": "head.fc"},
}


def test_the_config_json_of_timm_is_read():
    found = identify(PUBLISHED_CONFIG)
    assert found.family.from_huggingface(found.wanted) == SIZES["coatnet-0-rw"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "coatnet_rmlp_1_rw2_224"}, "for 'coatnet_rmlp_1_rw2_224'; of timm's"),
        ({"model_args": {"conv_group_size": 2}}, "model_args conv_group_size, not supported"),
        ({"model_args": {"conv_stride_mode": "1x1"}}, "conv_stride_mode '1x1'"),
        ({"model_args": {"transformer_expand_first": True}}, "transformer_expand_first True"),
        ({"model_args": {"head_hidden_size": 5}}, "head_hidden_size 5"),
        ({"model_args": {"embed_dim": 64}}, "embed_dim 64; it must be a list"),
        ({"model_args": {"depths": [2, 2]}}, "model.stage_depths is .2, 2.; it must have 4"),
        ({"model_args": {"img_size": 100}}, "model.image_size is 100.*multiple of 32"),
        ({"model_args": {"conv_act_layer": "elu"}}, "convolution_activation is 'elu'"),
        ({"model_args": {"transformer_dim_head": 36}}, "heads of attention are model.head_dim 36"),
        ({"global_pool": "max"}, "global_pool 'max', which is not supported"),
    ],
)
def test_other_models_of_timm_are_refused_by_name(changes, said):
    described = PUBLISHED_CONFIG | changes
    with pytest.raises(UserError, match=said):
        identify(described).family.from_huggingface(described)


def test_what_timm_cannot_be_is_not_written():
    with pytest.raises(UserError, match=r"model.strides is .*checkpoint format"):
        config_json(CoAtNetConfig(strides=(1, 2, 2, 2, 2)))


def test_images_of_another_size_are_refused():
    config, model, params, _ = load_case(golden.TRAINED)
    with pytest.raises(UserError, match=r"must be \[batch, 1, 64, 64\]"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 1, 32, 32), np.float32))
    with pytest.raises(UserError, match="relative positions of CoAtNet are not resized"):
        change_image_size(config, params, 96)


@pytest.mark.slow
def test_a_folder_of_timm_is_read_and_written_back(tmp_path):
    case = golden.TRAINED
    _, model, params, table = load_case(case)
    tensors = export_weights(table, params, 0)
    tensors["stem.norm1.num_batches_tracked"] = np.array(7)
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    published = {name: value for name, value in case.config.items() if name != "architectures"}
    (folder / "config.json").write_text(json.dumps(published))
    loaded, back = load_pretrained(folder)
    assert replace(loaded.config, hub_fields=()) == model.config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    save_pretrained(tmp_path / "again", loaded, back)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    read = from_huggingface(again)
    assert replace(read, hub_fields=()) == model.config


@pytest.mark.slow
def test_a_run_starts_from_weights_for_images_of_its_size(tmp_path):
    config, model, params, _ = load_case(golden.TRAINED)
    save_pretrained(tmp_path / "timm", model, params)
    square = replace(config, image_size=config.image_shape)
    started = initial_parameters(tmp_path / "timm", square, make_mesh(MeshConfig()), seed=0)
    jax.tree.map(np.testing.assert_array_equal, started, params)


# Parameters without running statistics, of timm's models of 1000 labels; the paper states 25, 42,
# 75, 168, 275 and 688 millions (tables 3 and 4).
PUBLISHED = {
    "coatnet-0": 25_036_820,
    "coatnet-1": 42_225_776,
    "coatnet-2": 74_684_744,
    "coatnet-3": 166_966_264,
    "coatnet-4": 275_425_288,
    "coatnet-5": 687_472_008,
    "coatnet-0-rw": 27_435_562,
}
MILLIONS = {"0": 25, "1": 42, "2": 75, "3": 168, "4": 275, "5": 688}


@pytest.mark.parametrize("name", first_by_default(PUBLISHED))
def test_sizes_have_the_published_number_of_parameters(name):
    config = SIZES[name]
    model = build_model(config, ComputeConfig())
    shapes = parameter_shapes(model)
    tensors = tensor_shapes(weights(config), shapes, 0)
    count = sum(math.prod(shape) for key, shape in tensors.items() if ".running_" not in key)
    assert count == PUBLISHED[name]
    of_paper = MILLIONS.get(name.removeprefix("coatnet-"))
    assert of_paper is None or abs(count / 1e6 - of_paper) < 1.1  # CoAtNet-3 has 167.0 for 168


def test_flops_are_those_of_the_paper():
    # Table 4 has 4.2 G multiplications and additions, with the stride in the first convolution of a
    # layer: as many as after pooling. timm and the default here have it in the second.
    config = replace(SIZES["coatnet-0"], pool_first=True)
    flops = vision_flops(config.flops_groups((7, 7)), *shapes_and_axes(config))
    assert flops / 6e9 == pytest.approx(4.2, abs=0.1)  # training computes three times as much
