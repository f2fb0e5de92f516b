"""Names that wrappers have changed, and sizes that no tensor of the file has."""

from __future__ import annotations

import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.huggingface.weights import Weight, WeightTable, unwrapped
from tests.families.tiny_bert import assert_same, change_json, change_tensors, make_model
from tests.huggingface.tensors import drawn_model

TABLE = WeightTable(
    weights=(
        Weight("words/embedding", "model.words.weight"),
        Weight("stack/{layer}/up/kernel", "model.layers.{layer}.up.weight"),
        Weight("lm_head/kernel", "lm_head.weight"),
    ),
    prefix="model.",
)
OWN = ("model.words.weight", "model.layers.0.up.weight", "model.layers.11.up.weight")
HEAD = "lm_head.weight"


def names(tensors):
    return tuple(unwrapped(dict.fromkeys(tensors), TABLE))


def test_names_that_are_known_stay_as_they_are():
    for tensors in (OWN, (*OWN, HEAD), tuple(name.removeprefix("model.") for name in OWN)):
        assert names(tensors) == tensors


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "state_dict.net."]
)
def test_what_all_names_begin_with_is_left_out(wrapper):
    assert names(wrapper + name for name in (*OWN, HEAD)) == (*OWN, HEAD)
    assert names(wrapper + name.removeprefix("model.") for name in OWN)[1].endswith(
        "layers.0.up.weight"
    )


@pytest.mark.parametrize(
    "inner", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrappers_inside_a_name_are_left_out(inner):
    tensors = [f"model.layers.{i}.{inner}.up.weight" for i in (0, 11)]
    assert names([OWN[0], *tensors]) == OWN


def test_names_that_nothing_makes_known_stay_as_they_are():
    assert names(["a.b.c", "a.b.d"]) == ("a.b.c", "a.b.d")


def test_tensors_with_and_without_a_wrapper_are_refused():
    with pytest.raises(UserError, match=r"with and without a wrapper's name, such as _orig_mod.m"):
        names([OWN[0], f"_orig_mod.{OWN[0]}"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["module.", "model.", "_orig_mod."])
@pytest.mark.parametrize(
    "architecture",
    [
        "BertForMaskedLM",
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
        "MBartModel",
        "GPT2Model",
    ],
)
def test_weights_of_a_wrapped_model_are_read(tmp_path, architecture, wrapper):
    model, params = drawn_model(architecture)
    save_pretrained(tmp_path / "saved", model, params)
    change_tensors(
        tmp_path / "saved", lambda tensors: {wrapper + name: t for name, t in tensors.items()}
    )
    assert_same(load_pretrained(tmp_path / "saved")[1], params)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 9999, "num_layers 9999, but the file holds only 42 tensors"),
        ("vocab_size", 10**7, "vocab_size 10000000, but the file has no axis longer than 37"),
        ("intermediate_size", 10**6, "intermediate_size 1000000, but the file has no axis longer"),
        ("hidden_size", 2**20, "hidden_size 1048576, but the file has no axis longer than 37"),
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_built(tmp_path, field, value, said):
    save_pretrained(tmp_path / "saved", *make_model())
    change_json(tmp_path / "saved" / "config.json", **{field: value})
    with pytest.raises(UserError, match=said):
        load_pretrained(tmp_path / "saved")


def test_fewer_layers_than_the_file_has_are_refused_too(tmp_path):
    save_pretrained(tmp_path / "saved", *make_model())
    change_json(tmp_path / "saved" / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"16 tensor\(s\) in the file but not in the model: bert."):
        load_pretrained(tmp_path / "saved")
