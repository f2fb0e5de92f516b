"""The reader of weight tables, on a small made-up family that has one of everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.huggingface.weights import (
    Weight,
    WeightTable,
    layer_places,
    linear,
    norm,
    tensor_shapes,
)
from tests.huggingface.tensors import export_weights, import_weights

VOCAB, PADDED, D, N, H = 5, 8, 6, 3, 2
TABLE = WeightTable(
    weights=(
        Weight("word", "words.weight", "VD"),
        Weight("bias", "words.bias", "V"),
        *linear("stack/{layer}/in", "h.{layer}.query", "D", "NH"),
        *linear("stack/{layer}/out", "h.{layer}.dense", "NH", "D"),
        *norm("stack/{layer}/norm", "h.{layer}.norm"),
        Weight("stack/{layer}/conv/kernel", "h.{layer}.conv.weight", "DF->DF"),
    ),
    renames=((r"\.gamma$", ".weight"), (r"^old\.", "")),
    copies={"head.weight": "words.weight"},
    ignorable=(r"h\.\d+\.mask",),
)


def block(repeats):
    return {
        "in": {"kernel": (repeats, D, N, H), "bias": (repeats, N, H)},
        "out": {"kernel": (repeats, N, H, D)},
        "norm": {"scale": (repeats, D)},
        "conv": {"kernel": (repeats, D, 4)},
    }


def make_shapes():
    """One layer first (without its norm), a pattern of two three times over, one remaining."""
    first = block(1)
    del first["norm"]
    tree = {
        "word": (PADDED, D),
        "bias": (PADDED,),
        "stack": {
            "first": {"block_0": first},
            "layers": {"block_0": block(3), "block_1": block(3)},
            "remainder": {"block_0": block(1)},
        },
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


SHAPES = make_shapes()


def make_tensors():
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in tensor_shapes(TABLE, SHAPES, VOCAB).items()
    }


def read(tensors, table=TABLE):
    return import_weights(table, tensors, SHAPES, VOCAB)


def test_layers_are_counted_over_first_pattern_and_remainder():
    assert layer_places(SHAPES["stack"]) == [
        ("first", "block_0", 0),
        ("layers", "block_0", 0),
        ("layers", "block_1", 0),
        ("layers", "block_0", 1),
        ("layers", "block_1", 1),
        ("layers", "block_0", 2),
        ("layers", "block_1", 2),
        ("remainder", "block_0", 0),
    ]


def test_every_published_tensor_comes_back_bit_equal():
    tensors = make_tensors()
    back = export_weights(TABLE, read(tensors), VOCAB)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)


def test_parameters_have_the_shapes_and_dtypes_of_the_model():
    ours, wanted = flatten_dict(read(make_tensors())), flatten_dict(SHAPES)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in ours.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in wanted.items()
    }


def test_a_linear_layer_with_heads_computes_what_torch_computes():
    tensors = make_tensors()
    layer = jax.tree.map(lambda leaf: leaf[2], read(tensors)["stack"]["layers"]["block_1"])
    x = np.random.default_rng(1).standard_normal((4, D)).astype(np.float32)
    theirs = x @ tensors["h.6.query.weight"].T + tensors["h.6.query.bias"]
    ours = np.einsum("BD,DNH->BNH", x, layer["in"]["kernel"]) + layer["in"]["bias"]
    np.testing.assert_allclose(ours.reshape(4, N * H), theirs, rtol=1e-5, atol=1e-6)
    heads = theirs.reshape(4, N, H)
    np.testing.assert_allclose(
        np.einsum("BNH,NHD->BD", heads, layer["out"]["kernel"]),
        theirs @ tensors["h.6.dense.weight"].T,
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_kernel_stored_input_first_is_not_transposed():
    tensors = make_tensors()
    kernel = read(tensors)["stack"]["remainder"]["block_0"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0], tensors["h.7.conv.weight"])


def test_matrices_larger_than_a_block_are_transposed_whole():
    """Read in blocks, of which the last ones are smaller; with heads and a padded vocabulary."""
    rows, heads, size, vocab = 130, 300, 2, 97
    table = WeightTable(
        weights=(
            linear("in", "query", "D", "NH")[0],
            Weight("unembed", "decoder.weight", "DV->VD"),
        )
    )
    shapes = {
        "in": {"kernel": jax.ShapeDtypeStruct((rows, heads, size), np.float32)},
        "unembed": jax.ShapeDtypeStruct((rows, 128), np.float32),
    }
    rng = np.random.default_rng(0)
    query = rng.standard_normal((heads * size, rows), np.float32)
    decoder = rng.standard_normal((vocab, rows), np.float32)
    params = import_weights(
        table, {"query.weight": query, "decoder.weight": decoder}, shapes, vocab
    )
    np.testing.assert_array_equal(params["in"]["kernel"].reshape(rows, -1), query.T)
    np.testing.assert_array_equal(params["unembed"][:, :vocab], decoder.T)
    assert not params["unembed"][:, vocab:].any()


def test_padded_vocabulary_rows_are_zero_inside_and_gone_outside():
    params = read(make_tensors())
    assert not params["word"][VOCAB:].any()
    assert not params["bias"][VOCAB:].any()
    params["word"][VOCAB:] = 7
    assert export_weights(TABLE, params, VOCAB)["words.weight"].shape == (VOCAB, D)


def test_the_pieces_of_a_layer_that_a_model_lacks_are_not_asked_for():
    names = tensor_shapes(TABLE, SHAPES, VOCAB)
    assert "h.0.norm.weight" not in names
    assert "h.1.norm.weight" in names
    assert not any(name.endswith(("dense.bias", "norm.bias")) for name in names)


def test_half_precision_files_become_float32_without_loss():
    tensors = make_tensors()
    for name, dtype in (("words.weight", ml_dtypes.bfloat16), ("words.bias", np.float16)):
        tensors[name] = tensors[name].astype(dtype)
    params = read(tensors)
    np.testing.assert_array_equal(
        params["word"][:VOCAB], tensors["words.weight"].astype(np.float32), strict=True
    )
    assert params["bias"].dtype == np.float32


def test_each_tensor_is_read_once_and_in_the_order_of_the_file():
    tensors, asked = make_tensors(), []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    names = sorted(tensors, reverse=True)
    read(Lazy((name, tensors[name]) for name in names))
    assert asked == names


def test_older_names_are_understood():
    tensors = make_tensors()
    new = read(tensors)
    renamed = {"old." + name.replace("norm.weight", "norm.gamma"): t for name, t in tensors.items()}
    assert "old.h.3.norm.gamma" in renamed
    jax.tree.map(np.testing.assert_array_equal, read(renamed), new)


def test_a_tied_copy_is_accepted_and_can_stand_in_for_the_original():
    tensors = make_tensors()
    both = tensors | {"head.weight": tensors["words.weight"]}
    alone = {name: tensor for name, tensor in both.items() if name != "words.weight"}
    for file in (both, alone):
        jax.tree.map(np.testing.assert_array_equal, read(file), read(tensors))


def test_a_copy_with_other_numbers_is_not_dropped_silently():
    tensors = make_tensors()
    tensors["head.weight"] = tensors["words.weight"] + np.float32(1e-6)
    with pytest.raises(UserError, match=r"head.weight differs from words.weight.*not tied"):
        read(tensors)


def test_tensors_without_a_use_are_passed_over_only_if_listed():
    tensors = make_tensors()
    read(tensors | {"h.3.mask": np.ones((2, 2), np.uint8)})
    with pytest.raises(UserError, match=r"1 tensor\(s\) in the file but not .*: h.3.mask2;"):
        read(tensors | {"h.3.mask2": np.ones((2, 2), np.float32)})


def drop(tensors):
    del tensors["h.3.norm.weight"]


def drop_a_layer(tensors):
    for name in [name for name in tensors if name.startswith("h.7.")]:
        del tensors[name]


def add(tensors):
    tensors["h.0.norm.weight"] = np.ones(D, np.float32)


def reshape(tensors):
    tensors["h.4.query.weight"] = tensors["h.4.query.weight"][:-1]


def pad(tensors):
    tensors["words.weight"] = np.zeros((PADDED, D), np.float32)


def quantise(tensors):
    tensors["words.bias"] = tensors["words.bias"].astype(np.int8)


def name_twice(tensors):
    tensors["h.3.norm.gamma"] = tensors["h.3.norm.weight"]


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (drop, r"^1 tensor\(s\) missing from the file: h.3.norm.weight;"),
        (drop_a_layer, r"^5 tensor\(s\) missing.*: h.7.query.weight, .* and 1 more;"),
        (add, r"^1 tensor\(s\) in the file but not in the model: h.0.norm.weight;"),
        (
            reshape,
            r"^1 tensor\(s\) do not have the shape.*h.4.query.weight is \[5, 6\], not \[6, 6",
        ),
        (pad, r"words.weight is \[8, 6\], not \[5, 6\]"),
        (quantise, r"words.bias is int8"),
        (name_twice, r"under an older name as well: h.3.norm.gamma"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(spoil, names):
    tensors = make_tensors()
    spoil(tensors)
    with pytest.raises(UserError, match=names):
        read(tensors)


def test_a_table_with_a_gap_is_an_error_in_the_family_and_not_in_the_file():
    gap = WeightTable(TABLE.weights[1:])
    with pytest.raises(ValueError, match="no row for word"):
        tensor_shapes(gap, SHAPES, VOCAB)
