"""CoAtNet against timm, live and through files: needs torch and timm."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import flax_transformers as ft
from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE
from tests.golden import coatnet as golden
from tests.golden.hub import read_golden

EACH = pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)


@EACH
def test_timm_s_outputs_are_those_here_and_files_go_both_ways_bit_for_bit(case, tmp_path):
    original = golden.load_original(case).float()
    saved = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
    for name in ("timm", "ours"):
        (tmp_path / name).mkdir()
    save_file(saved, tmp_path / "timm" / "model.safetensors")
    published = {name: value for name, value in case.config.items() if name != "architectures"}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(published))
    model, params = ft.load_pretrained(tmp_path / "timm")
    output = jax.jit(model.apply)({"params": params}, **case.inputs)
    expected = golden.run_original(case)["logits"]
    assert relative_difference(np.asarray(output.logits), expected) < TOLERANCE

    ft.save_pretrained(tmp_path / "ours", model, params)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    again = golden.import_timm().create_model(
        written["architecture"], num_classes=written["num_classes"], **written["model_args"]
    )
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    again.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    for name, tensor in again.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(tensor.numpy(), saved[name], err_msg=name)


@EACH
def test_the_goldens_are_what_timm_computes(case):
    found = golden.run_original(case)["logits"]
    assert relative_difference(found, read_golden(golden.__file__, case)["logits"]) < 1e-6
