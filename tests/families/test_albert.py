"""ALBERT against Hugging Face's, through tests/golden/albert.npz; its shared layers, its sizes."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.albert import JSON, SIZES, AlbertConfig, make_shared_stack
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.layers.block import LayerInputs
from flax_transformers.monitoring.model_flops import step_flops
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.selection import logical_axes
from flax_transformers.testing import tiny_model
from tests.families.parity import assert_parity, count_parameters, first_by_default
from tests.golden import albert as golden

CASES = {case.name: case for case in golden.CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert JSON.read(config_json(config)) == config


def test_fields_that_a_file_leaves_out_are_those_of_transformers():
    assert JSON.read({"model_type": "albert"}) == SIZES["albert-xxlarge-v2"]


PUBLISHED = {
    "albert-base-v2": 11_683_584,
    "albert-large-v2": 17_683_968,
    "albert-xlarge-v2": 58_724_864,
    "albert-xxlarge-v2": 222_595_584,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(replace(SIZES[name], architecture="AlbertModel")) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "tanh"}, "activation 'tanh'"),
        ({"num_hidden_layers": 5, "num_hidden_groups": 2}, "num_layers 5 .*num_groups 2"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(fields, names):
    with pytest.raises(UserError, match=names):
        JSON.read(fields)


@pytest.mark.slow
def test_layers_that_are_written_out_or_recomputed_compute_the_same():
    case = CASES["albert_groups"]
    assert_parity(case, golden.__file__, scan_layers=False, remat="full")


@pytest.mark.slow
@pytest.mark.full
def test_gradients_of_recomputed_layers_are_equal():
    ids = np.array([[5, 9, 7, 3], [4, 8, 8, 6]], np.int32)
    grads = []
    for compute in (ComputeConfig(), ComputeConfig(remat="full"), ComputeConfig(scan_layers=False)):
        model, params = tiny_model("AlbertModel", num_layers=4, num_groups=2)
        model = build_model(model.config, compute)

        def loss(params, model=model):
            return (model.apply({"params": params}, ids).last_hidden_state ** 3).sum()

        grads.append(jax.jit(jax.grad(loss))(params)["stack"])
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), grads[0], other)
    assert grads[0]["layers"]["block_0"]["mlp"]["up"]["kernel"].shape[0] == 2


class CoinTosses(nn.Module):
    """A layer that adds 0 or 1 to each element, at random."""

    config: object
    compute: object
    deterministic: bool

    def __call__(self, x, inputs, cache):
        return x + jax.random.bernoulli(self.make_rng("dropout"), shape=x.shape), None


def test_each_use_of_a_layer_has_dropout_masks_of_its_own():
    config = AlbertConfig(hidden_size=8, num_heads=2, num_layers=4, num_groups=2)
    stack = make_shared_stack(config, ComputeConfig(), CoinTosses)
    rngs = {"dropout": jax.random.key(0)}
    total, _ = stack.apply({}, jax.numpy.zeros((1, 50, 8)), LayerInputs(), rngs=rngs)
    assert np.unique(total).tolist() == [0, 1, 2, 3, 4]


def test_flops_count_every_use_of_a_layer():
    def flops(config):
        boxed = boxed_shapes(build_model(config))
        return step_flops(
            config, MaskedLM(), nn.meta.unbox(boxed), logical_axes(boxed),
            batch_size=1, sequence_length=128,
        )  # fmt: skip

    base = AlbertConfig(architecture="AlbertModel")
    one = flops(replace(base, num_layers=1))
    assert flops(replace(base, num_layers=3)) - one == pytest.approx(
        2 * (flops(replace(base, num_layers=2)) - one)
    )
    layer = 12 * 768 * 768 * 6 * 128 + 12 * 128 * 128 * 768
    assert flops(replace(base, num_layers=2)) - one == pytest.approx(layer)
