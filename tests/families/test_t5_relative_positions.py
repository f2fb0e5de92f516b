"""Relative positions of T5, and what its parameters start from."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_transformers.families.t5 import T5Config, buckets_by_distance
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import body_names
from flax_transformers.models.config import ComputeConfig
from tests.families.parity import first_by_default

TINY = T5Config(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    head_dim=5,
    intermediate_size=8,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=9,
)


def test_near_distances_have_buckets_of_their_own_and_far_ones_share():
    assert buckets_by_distance(8, 16).tolist() == [
        *(0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7),
    ]


def test_a_ratio_that_is_met_exactly_begins_the_next_bucket():
    # 8 * 2 ** k for a quarter of the ratio of 16 each: two buckets to every doubling.
    buckets = buckets_by_distance(16, 128)
    assert [buckets[distance] for distance in (8, 15, 16, 31, 32, 63, 64, 127, 128)] == [
        *(8, 9, 10, 11, 12, 13, 14, 15, 15),
    ]


def test_kernels_start_at_the_size_that_each_needs():
    config = dataclasses.replace(TINY, init_std=2.0)
    stds = {
        "words": 2.0,
        "query": 2.0 / math.sqrt(12 * 5),
        "key": 2.0 / math.sqrt(12),
        "value": 2.0 / math.sqrt(12),
        "output": 2.0 / math.sqrt(15),
        "up": 2.0 / math.sqrt(12),
        "down": 2.0 / math.sqrt(8),
        "logits": 2.0 / math.sqrt(12),
    }
    assert {name: config.initial_std(name) for name in stds} == pytest.approx(stds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    first_by_default(
        ["T5ForSequenceClassification", "T5ForQuestionAnswering", "T5ForTokenClassification"]
    ),
)
def test_classifiers_start_at_the_size_that_the_width_asks_for(architecture):
    config = dataclasses.replace(
        TINY, architecture=architecture, num_heads=2, hidden_size=400, num_labels=300
    )
    model = build_model(config, ComputeConfig())

    def init():
        params = model.init(jax.random.key(0), **model.example_inputs())["params"]
        sides = [params[side] for side in ("encoder", "decoder") if side in params]
        biases = [side["relative_bias"]["table"]["embedding"] for side in sides]
        body = body_names(model)
        head = {name: tree for name, tree in params.items() if name not in body}
        return nn.meta.unbox((head, biases))

    head, _ = jax.jit(init)()
    kernels = [leaf for leaf in jax.tree.leaves(head) if leaf.ndim == 2]
    assert len(kernels) == (2 if "Sequence" in architecture else 1)
    for kernel in kernels:
        # Cut at two standard deviations, a normal has 0.88 of its own.
        assert np.std(kernel) * 20 == pytest.approx(0.88, rel=0.1)


def test_the_factor_on_initial_sizes_counts_for_relative_positions_too():
    config = dataclasses.replace(TINY, init_std=0.0)
    model = build_model(config, ComputeConfig())

    def init():
        params = nn.meta.unbox(model.init(jax.random.key(0), **model.example_inputs())["params"])
        return params["encoder"]["relative_bias"]

    assert not np.any(jax.jit(init)()["table"]["embedding"])
