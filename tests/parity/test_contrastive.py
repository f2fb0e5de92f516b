"""Contrastive losses and their gradients against the original, live."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.testing import relative_difference
from flax_transformers.training.step import model_functions, total_loss
from tests.families.parity import TOLERANCE, load_case
from tests.golden import clip, siglip
from tests.golden.hub import full_precision_softmax, load_original
from tests.huggingface.tensors import export_weights

PAIRS = 3
CASES = {"softmax": clip.END_ID, "sigmoid": siglip.PLAIN}


class Pixels(ImageTextContrastive):
    """Images are given as the model takes them."""

    def normalized(self, pixels_BCHW):
        return pixels_BCHW


@pytest.mark.parametrize("loss", CASES)
def test_the_loss_and_its_gradients_are_those_of_torch(loss, tmp_path):
    case = CASES[loss]
    inputs = {name: value[:PAIRS] for name, value in case.inputs.items()}
    original = load_original(case, tmp_path)
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    given = {"input_ids": given["input_ids"].long(), "pixel_values": given["pixel_values"].double()}
    with full_precision_softmax():
        expected = original(**given, return_loss=True).loss
    expected.backward()
    theirs = {name: value.grad.numpy() for name, value in original.named_parameters()}

    config, model, params, table = load_case(case)
    objective, functions = Pixels(loss=loss), model_functions(model)
    batch = inputs | {"weights": np.ones(PAIRS, np.float32)}
    value, gradients = jax.jit(
        jax.value_and_grad(lambda p: total_loss(objective.terms(functions, p, batch, {})))
    )(params)
    assert relative_difference(value, expected.detach().numpy()) < TOLERANCE
    ours = export_weights(table, gradients, config.vocab_size)
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in theirs.values()))
    # Softmax does not see what a key bias adds to all scores alike: its true gradient is zero.
    zero = {name for name in theirs if name.endswith("k_proj.bias")}
    fused = {name for name in theirs if name.endswith("in_proj_bias")}
    assert max(np.abs(ours[name]).max() for name in zero) < 1e-7 * norm
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - zero - fused:
        assert relative_difference(ours[name], theirs[name]) < TOLERANCE, name
    for name in fused:
        assert np.abs(ours[name] - theirs[name]).max() < TOLERANCE * np.abs(theirs[name]).max()
