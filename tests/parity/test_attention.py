"""Attention probabilities against those of transformers, which its eager attention returns."""

from __future__ import annotations

import numpy as np
import pytest

import flax_transformers as ft
from tests.families.parity import TOLERANCE
from tests.golden import albert, bart, bert, clip, deberta_v2, gpt2, llama, modernbert, t5, vit
from tests.golden.hub import full_precision_softmax, load_original, torch_inputs

OUTPUTS = {
    "attention": "attentions",
    "encoder/attention": "encoder_attentions",
    "decoder/attention": "decoder_attentions",
    "decoder/cross_attention": "cross_attentions",
}
FAMILIES = (albert, bart, bert, deberta_v2, gpt2, llama, modernbert, t5, vit)
CASES = {case.name: case for case in (*(module.CASES[0] for module in FAMILIES), clip.TOWERS[0])}


@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_those_of_the_original(name, tmp_path):
    case = CASES[name]
    original = load_original(case, tmp_path)
    with full_precision_softmax():
        output = original(**torch_inputs(case), **case.extra, output_attentions=True)
    model, params = ft.load_pretrained(tmp_path)
    for stack, found in ft.attention_probabilities(model, params, **case.inputs).items():
        expected = np.stack([layer.detach().numpy() for layer in output[OUTPUTS[stack]]])
        mask = case.inputs.get("decoder_attention_mask" if "decoder" in stack else "attention_mask")
        real = np.ones(found.shape[1::2][:1] + found.shape[3:4]) if mask is None else mask
        rows = np.broadcast_to(real[None, :, None, :] == 1, found.shape[:4])
        assert found.shape == expected.shape
        assert np.abs(found[rows] - expected[rows]).max() < TOLERANCE, stack
