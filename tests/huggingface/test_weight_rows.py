"""Rows of a weight table that are not one parameter to one tensor, and files that are not whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.huggingface.weights import (
    Weight,
    WeightTable,
    known_names,
    linear,
    read_parameters,
    tensor_shapes,
)
from tests.huggingface.tensors import export_weights, import_weights

VOCAB, D, N, K, H, E, F = 5, 6, 4, 2, 3, 3, 8
HEADS = tuple(f"encoder/{{layer}}/{name}" for name in ("query", "key", "value"))
TABLE = WeightTable(
    weights=(
        Weight("word", "model.words.weight", "VD"),
        Weight(tuple(f"{h}/kernel" for h in HEADS), "model.e.{layer}.qkv.weight", "DNH->(NH)D"),
        Weight(tuple(f"{h}/bias" for h in HEADS), "model.e.{layer}.qkv.bias", "NH->(NH)"),
        Weight(
            ("decoder/{layer}/up", "decoder/{layer}/gate"), "model.d.{layer}.in", "DF->DF", axis=1
        ),
        Weight("decoder/{layer}/experts", "model.d.{layer}.experts.{expert}.w", "DF->FD"),
        *linear("classification_head", "score", "D", "C"),
        *linear("pooler", "model.pooler", "D", "E"),
    ),
    copies={"lm_head.weight": "model.words.weight"},
    ignorable=(r"model\.e\.\d+\.mask", r"scratch"),
    prefix="model.",
)


def make_shapes(labels=4):
    def heads(*size):
        sizes = {"query": N, "key": K, "value": K}
        return {
            name: {"kernel": (*size, D, n, H), "bias": (*size, n, H)} for name, n in sizes.items()
        }

    decoder = {"up": (2, D, F), "gate": (2, D, F), "experts": (2, E, D, F)}
    tree = {
        "word": (8, D),
        "encoder": {"layers": {"block_0": heads(3)}},
        "decoder": {"layers": {"block_0": decoder}},
        "classification_head": {"kernel": (D, labels), "bias": (labels,)},
        "pooler": {"kernel": (D, D), "bias": (D,)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


SHAPES = make_shapes()
HEADS = ("classification_head", "pooler")


def make_tensors(table=TABLE, shapes=SHAPES):
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in tensor_shapes(table, shapes, VOCAB).items()
    }


def read(tensors, table=TABLE, shapes=SHAPES, **how):
    return import_weights(table, tensors, shapes, VOCAB, **how)


def without(tree, *names):
    return {name: leaf for name, leaf in tree.items() if name not in names}


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_all_rows_come_back_bit_equal():
    tensors = make_tensors()
    back = export_weights(TABLE, read(tensors), VOCAB)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)


@pytest.mark.slow
def test_arrays_of_jax_are_exported_alike():
    tensors = make_tensors()
    back = export_weights(TABLE, jax.tree.map(jnp.asarray, read(tensors)), VOCAB)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)


def test_fused_parts_of_different_sizes_lie_in_order_along_the_axis_of_theirs():
    tensors = make_tensors()
    assert tensors["model.e.1.qkv.weight"].shape == ((N + 2 * K) * H, D)
    block = jax.tree.map(lambda leaf: leaf[1], read(tensors)["encoder"]["layers"]["block_0"])
    x = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    theirs = tensors["model.e.1.qkv.weight"] @ x + tensors["model.e.1.qkv.bias"]
    ours = [
        (np.einsum("D,DNH->NH", x, block[name]["kernel"]) + block[name]["bias"]).ravel()
        for name in ("query", "key", "value")
    ]
    np.testing.assert_allclose(np.concatenate(ours), theirs, rtol=1e-5, atol=1e-6)


def test_fused_parts_may_lie_along_the_second_axis():
    tensors = make_tensors()
    block = read(tensors)["decoder"]["layers"]["block_0"]
    np.testing.assert_array_equal(block["up"][1], tensors["model.d.1.in"][:, :F])
    np.testing.assert_array_equal(block["gate"][1], tensors["model.d.1.in"][:, F:])


def test_each_expert_is_a_tensor_of_its_own():
    tensors = make_tensors()
    experts = read(tensors)["decoder"]["layers"]["block_0"]["experts"]
    np.testing.assert_array_equal(experts[1, 2], tensors["model.d.1.experts.2.w"].T)


def test_a_fused_tensor_of_another_size_is_refused_by_name():
    tensors = make_tensors()
    tensors["model.e.2.qkv.bias"] = tensors["model.e.2.qkv.bias"][1:]
    with pytest.raises(UserError, match=r"model.e.2.qkv.bias is \[23\], not \[24\]"):
        read(tensors)


def test_a_missing_expert_is_refused_by_name():
    tensors = without(make_tensors(), "model.d.0.experts.1.w")
    with pytest.raises(UserError, match=r"missing from the file: model.d.0.experts.1.w"):
        read(tensors)


def test_what_is_missing_and_what_is_extra_is_said_together():
    tensors = make_tensors()
    tensors["score.weights"] = tensors.pop("score.weight")
    with pytest.raises(
        UserError, match=r"score.weight; 1 tensor.* not in the model: score.weights"
    ):
        read(tensors)


def test_a_row_of_which_the_model_has_only_a_part_is_an_error_in_the_family():
    shapes = make_shapes()
    del shapes["decoder"]["layers"]["block_0"]["gate"]
    with pytest.raises(ValueError, match="which the model does not have"):
        tensor_shapes(TABLE, shapes, VOCAB)


def test_a_table_may_have_rows_for_a_stack_that_the_model_lacks():
    names = tensor_shapes(TABLE, without(SHAPES, "decoder"), VOCAB)
    assert not any(name.startswith("model.d.") for name in names)


def test_files_without_the_prefix_are_read():
    tensors = make_tensors()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert "e.0.qkv.weight" in bare
    assert_equal(read(bare | {"e.0.mask": np.ones(2)}), read(tensors))


def test_the_bare_table_reads_files_with_and_without_the_prefix_and_writes_none():
    shapes = without(SHAPES, "classification_head")
    tensors = make_tensors(TABLE.bare(), shapes)
    assert "e.0.qkv.weight" in tensors and "model.words.weight" not in tensors
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    mask = {"model.e.1.mask": np.ones(2), "lm_head.weight": tensors["words.weight"]}
    params = read(tensors, TABLE.bare(), shapes)
    assert_equal(read(prefixed | mask, TABLE.bare(), shapes), params)
    assert export_weights(TABLE.bare(), params, VOCAB).keys() == tensors.keys()


def test_a_tensor_with_and_without_the_prefix_is_refused():
    tensors = make_tensors()
    with pytest.raises(UserError, match=r"as well: words.weight"):
        read(tensors | {"words.weight": tensors["model.words.weight"]})


def test_heads_that_the_file_lacks_are_left_out_only_if_they_may_be_fresh():
    tensors = make_tensors()
    bare = without(
        tensors, "score.weight", "score.bias", "model.pooler.weight", "model.pooler.bias"
    )
    with pytest.raises(UserError, match=r"4 tensor\(s\) missing .*score.weight"):
        read(bare)
    assert_equal(read(bare, fresh=HEADS), without(read(tensors), "classification_head", "pooler"))


def test_a_head_of_another_shape_is_left_out_only_if_it_may_be_fresh():
    tensors, shapes = make_tensors(), make_shapes(labels=2)
    with pytest.raises(UserError, match=r"score.weight is \[4, 6\], not \[2, 6\]"):
        read(tensors, shapes=shapes)
    with pytest.raises(UserError, match=r"score.weight is \[4, 6\], not \[2, 6\]"):
        read(tensors, shapes=shapes, fresh=HEADS)
    params = read(tensors, shapes=shapes, fresh=HEADS, resized_heads=True)
    assert_equal(params, without(read(tensors), "classification_head"))


def test_a_head_that_is_required_may_not_be_absent():
    bare = without(make_tensors(), "model.pooler.weight", "model.pooler.bias")
    assert_equal(read(bare, fresh=HEADS), without(read(make_tensors()), "pooler"))
    with pytest.raises(UserError, match=r"2 tensor\(s\) missing from the file: model.pooler"):
        read(bare, fresh=HEADS, required=("pooler",))


@pytest.mark.parametrize("name", ["score.bias", "model.e.0.qkv.bias"])
def test_half_a_head_or_a_gap_elsewhere_is_refused_all_the_same(name):
    with pytest.raises(UserError, match=f"missing from the file: {name}"):
        read(without(make_tensors(), name), fresh=HEADS)


def test_names_to_pass_over_can_be_given():
    tensors = make_tensors() | {"other.weight": np.ones((2, 2), np.int8)}
    assert_equal(read(tensors, ignored={"other.weight"}), read(make_tensors()))


def test_the_names_that_mean_something_are_known():
    names = ["words.weight", "model.e.0.mask", "lm_head.weight", "other.weight", "scratch"]
    assert known_names(TABLE, names, SHAPES) == set(names) - {"other.weight"}


class Lazy:
    """An array that counts how often it is read."""

    def __init__(self, value):
        self.shape, self.dtype, self.reads, self._value = value.shape, value.dtype, 0, value

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return self._value


def test_a_parameter_is_read_when_its_turn_comes_and_every_tensor_once():
    tensors = {name: Lazy(tensor) for name, tensor in make_tensors().items()}
    read = read_parameters(TABLE, tensors, SHAPES, VOCAB)
    assert next(read)[0] == "word"
    assert [name for name, tensor in tensors.items() if tensor.reads] == ["model.words.weight"]
    paths = {"word", *(path for path, _ in read)}
    assert paths == set(flatten_dict(SHAPES, sep="/"))
    assert {tensor.reads for tensor in tensors.values()} == {1}


def test_what_is_wrong_is_said_before_anything_is_read():
    tensors = {name: Lazy(tensor) for name, tensor in make_tensors().items()}
    del tensors["model.pooler.bias"]
    with pytest.raises(UserError, match=r"model.pooler.bias"):
        next(read_parameters(TABLE, tensors, SHAPES, VOCAB))
    assert not any(tensor.reads for tensor in tensors.values())


def test_a_tensor_that_is_ignored_may_have_any_shape():
    tensors = make_tensors()
    assert_equal(read(tensors | {"scratch": np.ones((7, 0, 3))}), read(tensors))
