"""Exported programs: the outputs of the modules, for batches of any size, without them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.testing import relative_difference
from tests.families.parity import some_by_default
from tests.huggingface.tensors import drawn_model

LENGTH = 6
ARCHITECTURES = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BartForSequenceClassification",
    "T5ForQuestionAnswering",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "ViTMAEForPreTraining",
)


def drawn(model, rows):
    """Inputs of so many rows; the last row of texts is padded."""
    random = np.random.default_rng(rows)
    if "pixel_values" in model.example_inputs():
        shapes = {name: value.shape[1:] for name, value in model.example_inputs().items()}
        return {
            name: random.standard_normal((rows, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
    ids = random.integers(3, model.config.vocab_size, (rows, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[-1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.token_types:
        inputs["token_type_ids"] = np.arange(LENGTH, dtype=np.int32)[None] // 3 * mask
    if model.config.architecture == "T5ForConditionalGeneration":
        inputs["decoder_input_ids"] = ids[:, ::-1].copy()
    return inputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The first model, its parameters and its folder."""
    model, params = drawn_model(ARCHITECTURES[0])
    folder = tmp_path_factory.mktemp("exported") / "bert"
    ft.export_program(folder, model, params, sequence_length=LENGTH)
    return model, params, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    some_by_default(
        ARCHITECTURES,
        [
            "BertForSequenceClassification",
            "T5ForConditionalGeneration",
            "ViTForImageClassification",
        ],
    ),
)
def test_outputs_are_those_of_the_model_for_batches_of_any_size(architecture, tmp_path):
    model, params = drawn_model(architecture)
    length = None if architecture.startswith("ViT") else LENGTH
    ft.export_program(tmp_path / "out", model, params, sequence_length=length)
    program = ft.load_program(tmp_path / "out")
    for rows in (1, 3):
        inputs = drawn(model, rows)
        found = program(**inputs)
        expected = jax.jit(model.apply)({"params": params}, **inputs)
        assert all(found[name].shape == getattr(expected, name).shape for name in found)
        assert found.keys() == program.signature["outputs"].keys()
        for name, value in found.items():
            assert relative_difference(value, getattr(expected, name)) < 1e-5


def test_parameters_in_fortran_order_are_those_that_are_loaded(tmp_path):
    model, params = drawn_model(ARCHITECTURES[0])
    transposed = jax.tree.map(np.asfortranarray, params)
    ft.export_program(tmp_path / "out", model, transposed, sequence_length=LENGTH)
    loaded = ft.load_program(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(params))


@pytest.mark.slow
def test_a_program_for_several_platforms_has_no_kernel_of_one_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("flax_transformers.models.kernels.splash.on_cpu", lambda: False)
    model, params = drawn_model("BertModel", max_positions=128)
    on_tpu = model.clone(compute=dataclasses.replace(model.compute, attention="splash or xla"))
    ft.export_program(tmp_path / "out", on_tpu, params, sequence_length=128)
    assert ft.load_program(tmp_path / "out").signature["platforms"] == ["cpu", "cuda", "tpu"]


def test_a_program_runs_without_the_modules(exported):
    model, params, folder = exported
    inputs = drawn(model, 2)
    np.savez(folder.parent / "inputs.npz", **inputs)
    code = f"""
import sys, numpy as np, jax, jax.export, safetensors.numpy
from flax.traverse_util import unflatten_dict
program = jax.export.deserialize(bytearray(open({str(folder / "program.bin")!r}, "rb").read()))
flat = safetensors.numpy.load_file({str(folder / "parameters.safetensors")!r})
params = unflatten_dict({{tuple(name.split("/")): value for name, value in flat.items()}})
inputs = dict(np.load({str(folder.parent / "inputs.npz")!r}))
np.save({str(folder.parent / "logits.npy")!r}, program.call(params, inputs)["logits"])
assert "flax_transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = jax.jit(model.apply)({"params": params}, **inputs).logits
    assert relative_difference(np.load(folder.parent / "logits.npy"), expected) < 1e-5


ONES = dict.fromkeys(
    ("input_ids", "attention_mask", "token_type_ids"), np.ones((2, LENGTH), np.int32)
)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "takes attention_mask, input_ids, token_type_ids, not nothing"),
        ({"input_ids": np.ones((2, LENGTH), np.int32)}, "not input_ids"),
        (
            dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), np.ones((2, 5), "i4")),
            r"input_ids is int32 \[2, 5\]; the program takes int32 \['B', 6\]",
        ),
        ({**ONES, "input_ids": np.ones((2, LENGTH))}, "input_ids is float64"),
        ({**ONES, "attention_mask": np.ones((3, LENGTH), np.int32)}, "with one B for all inputs"),
    ],
)
def test_inputs_that_the_program_does_not_take_are_refused(exported, inputs, said):
    with pytest.raises(UserError, match=said):
        ft.load_program(exported[2])(**inputs)


@pytest.mark.parametrize("length", [None, 0, 10_000])
def test_a_length_that_the_model_does_not_take_is_refused(exported, tmp_path, length):
    model, params, _ = exported
    with pytest.raises(UserError, match=f"sequence_length is {length}; give the number of tokens"):
        ft.export_program(tmp_path / "out", model, params, sequence_length=length)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept(exported):
    model, params, folder = exported
    with pytest.raises(UserError, match="already"):
        ft.export_program(folder, model, params, sequence_length=LENGTH)


def test_a_program_for_another_platform_or_a_damaged_one_is_refused(exported, tmp_path):
    for name in ("program.bin", "parameters.safetensors", "signature.json"):
        (tmp_path / name).write_bytes((exported[2] / name).read_bytes())
    (tmp_path / "program.bin").write_bytes(b"no program")
    with pytest.raises(UserError, match="is damaged"):
        ft.load_program(tmp_path)
    signature = json.loads((tmp_path / "signature.json").read_text()) | {"platforms": ["tpu"]}
    (tmp_path / "signature.json").write_text(json.dumps(signature))
    with pytest.raises(UserError, match="was exported for tpu, and this is cpu"):
        ft.load_program(tmp_path)
    (tmp_path / "program.bin").unlink()
    with pytest.raises(UserError, match="program.bin is missing"):
        ft.load_program(tmp_path)
