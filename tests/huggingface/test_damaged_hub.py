"""Directories in Hugging Face format that are not whole, and what is said of each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from tests.families.tiny_bert import assert_same, change_json, change_tensors, make_model, without


@pytest.fixture
def saved(tmp_path):
    """A directory that a BertForMaskedLM was saved to."""
    save_pretrained(tmp_path / "saved", *make_model())
    return tmp_path / "saved"


@pytest.fixture
def sharded(tmp_path):
    """The same in three shards."""
    save_pretrained(tmp_path / "sharded", *make_model(), max_shard_bytes=3000)
    return tmp_path / "sharded"


def no_config(directory):
    (directory / "config.json").unlink()


def bad_json(directory):
    (directory / "config.json").write_text('{"model_type": "bert",')


def json_list(directory):
    (directory / "config.json").write_text("[]")


def odd_field(directory):
    change_json(directory / "config.json", layer_norm_eps="small")


def unknown_architecture(directory):
    change_json(directory / "config.json", architectures=["BertForPoetry"])


def unknown_activation(directory):
    change_json(directory / "config.json", hidden_act="mish")


def only_a_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty(directory):
    (directory / "model.safetensors").write_bytes(b"")


def not_finite(directory):
    def change(tensors):
        tensors["cls.predictions.bias"][3] = np.inf

    change_tensors(directory, change)


def missing(directory):
    change_tensors(directory, lambda tensors: without(tensors, "cls.predictions.bias"))


def extra(directory):
    change_tensors(directory, lambda tensors: tensors | {"bert.gate.bias": np.ones(2)})


def extra_head(directory):
    change_tensors(directory, lambda tensors: tensors | {"router.bias": np.ones(2)})


def misshaped(directory):
    change_json(directory / "config.json", vocab_size=36)


def quantised(directory):
    bias = np.ones(37, np.int8)
    change_tensors(directory, lambda tensors: tensors | {"cls.predictions.bias": bias})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_config, r"saved/config.json is missing"),
        (bad_json, r"saved/config.json cannot be read \(.*\); it should be JSON"),
        (json_list, r"saved/config.json holds no JSON object"),
        (odd_field, r"saved: config.json has layer_norm_eps 'small'; it must be a number"),
        (unknown_architecture, r"saved: config.json names architecture 'BertForPoetry'"),
        (unknown_activation, r"saved: config.json asks for activation 'mish'"),
        (only_a_pickle, r"saved/pytorch_model.bin is a pickle.*model.safetensors"),
        (no_weights, r"saved has neither model.safetensors nor model.safetensors.index.json"),
        (truncated, r"saved/model.safetensors is damaged"),
        (empty, r"saved/model.safetensors is damaged"),
        (not_finite, r"cls.predictions.bias in .*saved/model.safetensors has values that are not"),
        (missing, r"saved: 1 tensor\(s\) missing from the file: cls.predictions.bias"),
        (extra, r"saved: 1 tensor\(s\) in the file but not in the model: bert.gate.bias"),
        (extra_head, r"saved: 1 tensor\(s\) in the file but not in the model: router.bias"),
        (misshaped, r"word_embeddings.weight is \[37, 8\], not \[36, 8\]"),
        (quantised, r"tensor cls.predictions.bias is int8"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused_by_name(saved, spoil, said):
    spoil(saved)
    with pytest.raises(UserError, match=said) as raised:
        load_pretrained(saved)
    assert "\n" not in str(raised.value)


def missing_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def unheld(directory):
    places = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    first = "model-00001-of-00003.safetensors"
    change_json(
        directory / "model.safetensors.index.json", weight_map=places | {"ghost.weight": first}
    )


def twice(directory):
    tensors = load_file(directory / "model-00001-of-00003.safetensors")
    more = load_file(directory / "model-00002-of-00003.safetensors")
    name = next(iter(tensors))
    save_file(more | {name: tensors[name]}, directory / "model-00002-of-00003.safetensors")


def no_map(directory):
    change_json(directory / "model.safetensors.index.json", weight_map=None)


def outside(directory):
    change_json(directory / "model.safetensors.index.json", weight_map={"a": "../config.json"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            missing_shard,
            r"index.json names the shard 'model-00002-of-00003.safetensors', of 3, which is",
        ),
        (unheld, r"says that tensor ghost.weight is in model-00001-of-00003.safetensors, but it"),
        (twice, r"is in the shard model-00002-of-00003.safetensors as well as in model-00001"),
        (no_map, r"index.json has no weight_map"),
        (outside, r"names the shard '../config.json'"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused_by_name(sharded, spoil, said):
    spoil(sharded)
    with pytest.raises(UserError, match=said):
        load_pretrained(sharded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flips", [(30, 10), pytest.param((150, 50), marks=pytest.mark.full)], ids=str
)
def test_no_flipped_bit_goes_unnoticed(saved, flips):
    file = saved / "model.safetensors"
    whole, params = file.read_bytes(), make_model()[1]
    header = 8 + int.from_bytes(whole[:8], "little")
    random, (of_header, of_tensors) = np.random.default_rng(0), flips
    places = [
        random.integers(0, header, of_header),
        random.integers(header, len(whole), of_tensors),
    ]
    harmless = 0
    for place in np.concatenate(places).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        file.write_bytes(changed)
        try:
            back = load_pretrained(saved)[1]
        except UserError:
            continue
        harmless += 1
        assert place < header  # such as the name under which the digest stands
        assert_same(back, params)
    assert harmless < 5


def test_an_architecture_of_another_family_is_refused(saved):
    with pytest.raises(UserError, match=r"architecture 'GPT2LMHeadModel' is not one of this"):
        load_pretrained(saved, architecture="GPT2LMHeadModel")
