"""Weights that the Flax classes of transformers 4 saved, through tests/golden/flax_files.tar.xz."""

from __future__ import annotations

import tarfile

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.testing import relative_difference
from tests.families.parity import some_by_default
from tests.golden.flax_files import ARCHIVE, CASES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flax")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", some_by_default(CASES, ["bert", "gpt2", "t5", "vit"]))
def test_outputs_are_those_of_the_flax_class(folders, name):
    *_, inputs, output = CASES[name]
    model, params = load_pretrained(folders / name)
    found = getattr(jax.jit(model.apply)({"params": params}, **inputs), output)
    assert relative_difference(found, np.load(folders / name / "output.npy")) < 1e-5


def test_what_is_saved_again_are_safetensors_with_equal_parameters(folders, tmp_path):
    model, params = load_pretrained(folders / "t5")
    save_pretrained(tmp_path / "t5", model, params)
    assert (tmp_path / "t5" / "model.safetensors").is_file()
    _, again = load_pretrained(tmp_path / "t5")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


@pytest.fixture
def bert(folders, tmp_path):
    """A folder of its own, and the tree of its weights."""
    (tmp_path / "config.json").write_bytes((folders / "bert" / "config.json").read_bytes())
    return tmp_path, msgpack_restore((folders / "bert" / "flax_model.msgpack").read_bytes())


def test_shards_are_read_as_one_file(bert):
    folder, tree = bert
    for number, part in enumerate(tree):
        name = f"flax_model-{number + 1:05}-of-00002.msgpack"
        (folder / name).write_bytes(msgpack_serialize({part: tree[part]}))
    _, params = load_pretrained(folder)
    assert params["words"]["embedding"].any()


@pytest.mark.parametrize("part", ["half", "nothing", "one byte"])
def test_a_damaged_file_is_refused(bert, part):
    folder, tree = bert
    raw = msgpack_serialize(tree)
    left = {"half": raw[: len(raw) // 2], "nothing": b"", "one byte": b"\x81"}[part]
    (folder / "flax_model.msgpack").write_bytes(left)
    with pytest.raises(UserError, match="flax_model.msgpack is damaged or was not written by"):
        load_pretrained(folder)


def test_values_that_are_not_finite_are_refused(bert):
    folder, tree = bert
    table = tree["bert"]["embeddings"]["word_embeddings"]
    table["embedding"] = np.full_like(table["embedding"], np.nan)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    with pytest.raises(UserError, match="word_embeddings/embedding .* not finite"):
        load_pretrained(folder)


def test_a_missing_tensor_is_named(bert):
    folder, tree = bert
    del tree["bert"]["embeddings"]["word_embeddings"]
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    with pytest.raises(UserError, match="missing from the file: bert.embeddings.word_embeddings"):
        load_pretrained(folder)
