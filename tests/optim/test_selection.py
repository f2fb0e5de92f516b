"""What names say: patterns, matrices, depths; and what the optimizer makes of it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.optim.optimizers import (
    LAMB,
    Adafactor,
    AdamW,
    Lion,
    rate_factors,
)
from flax_transformers.optim.schedules import Schedule
from flax_transformers.optim.selection import (
    depths,
    kind_of,
    layer_stacks,
    logical_axes,
    map_named,
    matches,
    matrix_axes,
    merge,
    name_of,
    partition,
)
from flax_transformers.testing import assert_bit_equal, tiny_architecture


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def block(layers):
    return {"attention": {"query": {"kernel": leaf(layers, 4, 2, 2), "bias": leaf(layers, 2, 2)}}}


ENCODER = {
    "words": {"embedding": leaf(8, 4)},
    "embeddings": {"norm": {"scale": leaf(4)}},
    "stack": {
        "first": {"block_0": block(1)},
        "layers": {"block_0": block(2), "block_1": block(2)},
        "remainder": {"block_0": block(1)},
    },
    "final_norm": {"scale": leaf(4)},
    "mlm_head": {"bias": leaf(8)},
}
BOTH = {
    "words": {"embedding": leaf(8, 4)},
    "encoder": {
        "relative_bias": {"table": {"embedding": leaf(32, 2)}},
        "stack": {"layers": {"block_0": block(2)}},
        "norm": {"scale": leaf(4)},
    },
    "decoder": {
        "relative_bias": {"table": {"embedding": leaf(32, 2)}},
        "stack": {"layers": {"block_0": block(3)}},
        "norm": {"scale": leaf(4)},
    },
}


@pytest.mark.parametrize(
    ("pattern", "means"),
    [
        ("words", False),
        ("stack", True),
        ("stack/layers/block_0", True),
        ("*/attention", True),
        ("*/bias", True),
        ("*_0", True),
        ("block_0", False),
        ("stack/layers/block", False),
    ],
)
def test_a_pattern_means_a_parameter_or_a_folder_it_lies_in(pattern, means):
    assert matches(("stack", "layers", "block_0", "attention", "query", "bias"), pattern) == means


@pytest.mark.parametrize(
    ("named", "kind", "batch", "rows", "columns"),
    [
        ("layers embed heads head_dim", "kernel", (0,), (1,), (2, 3)),
        ("layers heads head_dim embed", "kernel", (0,), (1, 2), (3,)),
        ("layers embed mlp", "kernel", (0,), (1,), (2,)),
        ("layers expert embed mlp", "kernel", (0, 1), (2,), (3,)),
        ("layers heads head_dim", "bias", (0,), (), ()),
        ("layers norm", "scale", (0,), (), ()),
        ("channels patch_height patch_width embed", "kernel", (), (0, 1, 2), (3,)),
        ("vocab embed", "embedding", (), (0,), (1,)),
        ("embed vocab", "kernel", (), (0,), (1,)),
        ("positions heads", "embedding", (), (0,), (1,)),
        ("fixed_positions embed", "fixed", (), (0,), (1,)),
        ("embed", "bias", (), (), ()),
    ],
)
def test_what_a_parameter_is_follows_from_its_axes(named, kind, batch, rows, columns):
    name, named = ("anything", "w"), tuple(named.split())
    rank, logical = len(named), {name: named}
    assert kind_of(name, logical) == kind
    axes = matrix_axes(name, rank, logical)
    assert axes.batch == batch
    if rows:
        assert (axes.rows, axes.columns) == (rows, columns)
    else:
        assert not axes.rows and axes.own == tuple(range(len(batch), rank))


def test_depths_rise_from_the_embeddings_through_each_kind_of_layer_to_the_heads():
    found, head = depths(ENCODER)
    assert head == 7
    assert found["words"]["embedding"] == found["embeddings"]["norm"]["scale"] == 0
    blocks = {
        f"{part}/{name}": tree["attention"]["query"]["bias"].tolist()
        for part, names in found["stack"].items()
        for name, tree in names.items()
    }
    assert blocks == {
        "first/block_0": [1],
        "layers/block_0": [2, 4],
        "layers/block_1": [3, 5],
        "remainder/block_0": [6],
    }
    assert found["final_norm"]["scale"] == found["mlm_head"]["bias"] == 7


def test_a_decoder_lies_on_its_encoder():
    found, head = depths(BOTH)
    assert head == 6
    query = {
        k: found[k]["stack"]["layers"]["block_0"]["attention"]["query"]["kernel"].tolist()
        for k in ("encoder", "decoder")
    }
    assert query == {"encoder": [1, 2], "decoder": [3, 4, 5]}
    bias = [found[k]["relative_bias"]["table"]["embedding"] for k in ("encoder", "decoder")]
    assert [int(d) for d in bias] == [1, 3]
    assert (found["encoder"]["norm"]["scale"], found["decoder"]["norm"]["scale"]) == (2, 6)
    assert found["words"]["embedding"] == 0


OWN_MODEL = {
    "tokens": {"table": ("vocab", "embed"), "offset": ("embed",)},
    "reader": {"body": {"keys": ("layers", "embed", "key_heads", "head_dim")}, "out": ("norm",)},
    "writer": {
        "body": {
            "keys": ("layers", "embed", "key_heads", "head_dim"),
            "keys_of_source": ("layers", "embed", "key_heads", "head_dim"),
        },
        "distance": ("positions", "heads"),
        "out": ("norm",),
    },
    "answer": {"w": ("embed", "vocab")},
}
"""Logical axes of an encoder-decoder whose modules have names of their own."""


def test_depths_of_a_model_of_the_users_own_follow_from_logical_axes():
    axes = {
        name_of(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(
            OWN_MODEL, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    layers = {"reader": 2, "writer": 3}
    shapes = {
        name: tuple(layers[name[0]] if axis == "layers" else 4 for axis in named)
        for name, named in axes.items()
    }
    params = unflatten_dict({name: leaf(*shape) for name, shape in shapes.items()})
    found, head = depths(params, axes)
    assert list(layer_stacks(shapes, axes)) == [("reader", "body"), ("writer", "body")]
    assert jax.tree.map(np.ndarray.tolist, found) == {
        "tokens": {"table": 0, "offset": 0},
        "reader": {"body": {"keys": [1, 2]}, "out": 2},
        "writer": {
            "body": {"keys": [3, 4, 5], "keys_of_source": [3, 4, 5]},
            "distance": 3,
            "out": 6,
        },
        "answer": {"w": 6},
    }
    assert head == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "layers", "head"),
    [
        ("CLIPModel", {"image_tower/stack": [1, 2], "text_tower/stack": [1, 2]}, 3),
        ("ViTMAEForPreTraining", {"stack": [1, 2], "reconstruction_head/stack": [3]}, 4),
        ("VideoMAEForPreTraining", {"stack": [1, 2], "reconstruction_head/stack": [3]}, 4),
        ("MultimodalMaeForPreTraining", {"stack": [1, 2], "decoder_image/stack": [3]}, 4),
        ("ElectraWithGenerator", {"stack": [1, 2], "generator/stack": [1, 2]}, 3),
        ("T5ForConditionalGeneration", {"encoder/stack": [1, 2], "decoder/stack": [3, 4]}, 5),
        ("BartForConditionalGeneration", {"encoder/stack": [1, 2], "decoder/stack": [3, 4]}, 5),
    ],
)
def test_towers_end_at_the_heads_and_decoders_lie_on_encoders(architecture, layers, head):
    boxed = boxed_shapes(build_model(tiny_architecture(architecture)))
    found, depth_of_head = depths(nn.meta.unbox(boxed), logical_axes(boxed))
    blocks = {
        stack: flatten_dict(found, sep="/")[f"{stack}/layers/block_0/mlp/down/kernel"].tolist()
        for stack in layers
    }
    assert (blocks, depth_of_head) == (layers, head)


def test_the_shorter_of_two_towers_starts_higher_with_its_embeddings_just_below():
    towers = {
        "image_tower": {
            "stage_0": {"layers": {"block_0": block(2)}},
            "stage_1": {"layers": {"block_0": block(1)}},
            "final_norm": {"scale": leaf(4)},
        },
        "text_tower": {
            "words": {"embedding": leaf(8, 4)},
            "stack": {"layers": {"block_0": block(2)}},
            "final_norm": {"scale": leaf(4)},
        },
        "text_projection": {"kernel": leaf(4, 4)},
    }
    found, head = depths(towers)
    shown = {name: depth.tolist() for name, depth in flatten_dict(found, sep="/").items()}
    query = "layers/block_0/attention/query/bias"
    assert head == shown["text_projection/kernel"] == 4
    assert shown[f"image_tower/stage_0/{query}"] == [1, 2]
    assert shown[f"image_tower/stage_1/{query}"] == [3]
    assert shown[f"text_tower/stack/{query}"] == [2, 3]
    assert shown["text_tower/words/embedding"] == 1
    assert shown["image_tower/final_norm/scale"] == shown["text_tower/final_norm/scale"] == 4


def real(tree, value=1.0):
    return jax.tree.map(lambda x: jnp.full(x.shape, value, jnp.float32), tree)


def move(config, params, grads):
    """How far each parameter moves in one update."""
    optimizer = config.make(10)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


@pytest.mark.slow
def test_the_rate_falls_by_the_decay_from_layer_to_layer():
    config = AdamW(
        learning_rate=1.0,
        eps=1e-30,
        weight_decay=0.0,
        layer_decay=0.5,
        schedule=Schedule("constant"),
    )
    params = real(ENCODER)
    moved = move(config, params, params)
    assert (moved["mlm_head"]["bias"] == -1).all()
    assert (moved["words"]["embedding"] == -(0.5**7)).all()
    kernel = moved["stack"]["layers"]["block_1"]["attention"]["query"]["kernel"]
    assert (kernel == -np.array([0.5**4, 0.5**2]).reshape(2, 1, 1, 1)).all()


def test_the_first_pattern_that_fits_gives_the_rate_and_the_depth_its_share():
    config = AdamW(rate_factors=(("*_head", 10.0), ("*/bias", 2.0)), layer_decay=0.5)
    factors = rate_factors(config, ENCODER)
    assert factors["mlm_head"]["bias"] == 10
    query = factors["stack"]["remainder"]["block_0"]["attention"]["query"]
    assert (query["bias"].tolist(), query["kernel"].tolist()) == ([1.0], [0.5])


@pytest.mark.slow
@pytest.mark.parametrize("config", [AdamW, LAMB, Lion, Adafactor])
def test_frozen_parameters_have_no_statistics_and_do_not_move(config):
    config = config(
        frozen=("words", "stack/layers"), schedule=Schedule("constant"), layer_decay=0.9
    )
    params = real(ENCODER)
    optimizer = config.make(10)
    state = optimizer.init(params)
    kept = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("words" in path or "layers" in path for path in kept)
    assert any("mlm_head" in path for path in kept)
    update = jax.jit(optimizer.update)
    updates, _ = update(params, state, params)
    frozen = [updates["words"], updates["stack"]["layers"]]
    assert not any(leaf.any() for leaf in jax.tree.leaves(frozen))
    assert all(leaf.all() for leaf in jax.tree.leaves(updates["mlm_head"]))
    partial, _ = update(partition(params, config.frozen)[0], state, params)
    assert_bit_equal(partial, partition(updates, config.frozen)[0])


@pytest.mark.slow
def test_gradients_of_frozen_parameters_do_not_count_in_the_clipped_norm():
    params = {"words": {"embedding": jnp.zeros(2)}, "head": {"kernel": jnp.zeros(1)}}
    grads = {"words": {"embedding": jnp.full(2, 1e6)}, "head": {"kernel": jnp.full(1, 0.5)}}
    config = Lion(frozen=("words",), max_grad_norm=1.0)
    optimizer = config.make(10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    [momentum] = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    np.testing.assert_allclose(momentum, [0.005], rtol=1e-6)


def test_what_is_left_out_can_be_filled_in_again():
    params = real(ENCODER)
    partial = partition(params, ("*/attention", "words"))[0]
    assert len(jax.tree.leaves(partial)) == 3
    doubled = jax.tree.map(lambda x: 2 * x, partial)
    whole = merge(doubled, params)
    expected = map_named(lambda name, x: x if {"attention", "words"} & set(name) else 2 * x, params)
    assert_bit_equal(whole, expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"frozen": ("word",)}, "optimizer.frozen: 'word' matches no parameter .* 'words'"),
        ({"rate_factors": (("head", 2.0),)}, "optimizer.rate_factors: 'head' matches no parameter"),
        ({"frozen": ("*",)}, "optimizer.frozen matches every parameter"),
        ({"layer_decay": 0.0}, "optimizer.layer_decay is 0.0"),
        (
            {"rate_factors": (("words", -1.0),)},
            "optimizer.rate_factors is -1.0; it must not be neg",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, says):
    with pytest.raises(UserError, match=says):
        AdamW(**settings).make(10).init(real(ENCODER))


def test_switching_factors_off_keeps_the_tree_of_the_state():
    def structure(**settings):
        return jax.tree.structure(AdamW(**settings).make(10).init(real(ENCODER)))

    assert structure() == structure(layer_decay=0.5, rate_factors=(("words", 2.0),))
