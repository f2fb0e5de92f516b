"""Mixtral against Hugging Face's, through tests/golden/mixtral.npz; its configuration."""

from __future__ import annotations

from functools import partial

import jax
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.mixtral import JSON, SIZES, MixtralConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.models.layers.mixture_of_experts import balance_loss
from flax_transformers.testing import relative_difference
from tests.families.parity import (
    TOLERANCE,
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import mixtral as golden
from tests.golden.hub import read_golden

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)


@pytest.mark.slow
@pytest.mark.parametrize("scan", first_by_default([True, False]), ids=["scanned", "unrolled"])
def test_the_load_balancing_loss_of_a_padded_batch_is_that_of_hugging_face(scan):
    _, model, params, _ = load_case(golden.BALANCE, scan_layers=scan)
    output = jax.jit(partial(model.apply, {"params": params}))(**golden.BALANCE.inputs)
    expected = read_golden(golden.__file__, golden.BALANCE)["aux_loss"]
    total = jax.tree.map(lambda leaf: leaf.sum(axis=(0, 1)), output.auxiliary)
    assert relative_difference(balance_loss(total), expected) < TOLERANCE


def test_a_missing_expert_is_named():
    case = CASES["mixtral_two"]
    tensors = drawn_tensors(case)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing.*layers.1.*experts.3.w2"):
        import_case(case, tensors)


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert JSON.read(config_json(config)) == config


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "mixtral"}) == MixtralConfig()
    rope = MixtralConfig().rope
    assert rope is not None and rope.theta == 1e6


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("num_experts_per_tok", 9, "experts_per_token is 9"),
        ("num_local_experts", "8", "num_local_experts '8'"),
        ("router_jitter_noise", 0.1, "router_jitter_noise 0.1"),
        ("model_type", "mistral", "model_type 'mistral'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


PUBLISHED = {"mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
