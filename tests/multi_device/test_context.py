"""Flash attention over a mesh that divides the positions of a sequence."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.families.llama import LlamaConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from flax_transformers.planning.plan import plan
from flax_transformers.planning.topology import devices_of
from flax_transformers.testing import assert_parity, tiny_config
from flax_transformers.training.config import Phase
from tests.huggingface.tensors import drawn_model

pytestmark = pytest.mark.slow

MODEL = LlamaConfig(
    vocab_size=384,
    hidden_size=256,
    num_layers=8,
    num_heads=4,
    num_key_value_heads=1,
    intermediate_size=512,
    max_positions=2048,
)
LENGTH = 2048


ROWS = 32


def planned(folder, context):
    """What a step of long rows comes to on each chip, if all activations are kept."""
    config = dataclasses.replace(
        tiny_config(folder / "text.txt", folder / "store"),
        model=MODEL,
        objective=CausalLM(),
        compute=ComputeConfig("bfloat16", attention="splash"),
        phases=(Phase(4, LENGTH, ROWS),),
        mesh=MeshConfig(data=1, context=context),
    )
    # The compiler refuses splash attention of bfloat16 at the precision that tests are set to.
    with jax.default_matmul_precision("default"):
        return plan(config, config.phases[0], devices_of("v5e:2x2")[:context], "v5e:2x2")


@pytest.mark.full
def test_each_chip_holds_its_part_of_the_activations_and_gathers_keys_and_values(tmp_path):
    whole, part = planned(tmp_path, 1), planned(tmp_path, 4)
    assert not whole.traffic
    assert whole.memory.temporaries / part.memory.temporaries == pytest.approx(4, rel=0.1)
    sent = {one.kind: one.sent_bytes for one in part.traffic if one.axes == ("context",)}
    # Keys and values of every layer, bfloat16, three quarters of which are another chip's.
    keys_and_values = 2 * MODEL.num_layers * ROWS * LENGTH * MODEL.head_width * 2 * 3 / 4
    assert sent["reduce-scatter"] == keys_and_values, "gradients do not go back to their parts"
    assert sent["all-gather"] > keys_and_values
    assert sum(sent.values()) < 3.1 * keys_and_values, "something else is gathered too"


@pytest.mark.full
def test_a_model_with_relative_position_bias_has_equal_losses_if_positions_are_divided():
    model, params = drawn_model("T5ForConditionalGeneration")
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 80, (4, 256)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, ids.shape), axis=1).astype(np.int32)
    rows = {"input_ids": ids, "segment_ids": segments}
    rows |= {f"decoder_{name}": row for name, row in rows.items()}

    def gradients(**compute):
        network = build_model(model.config, ComputeConfig(**compute))

        def loss(params):
            states = network.apply({"params": params}, **rows, method="hidden_states")
            return jnp.sum(jnp.sin(states.last_hidden_state))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    plain = gradients()
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    params = jax.device_get(params)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        found = gradients(attention="splash", remat="full")
    jax.tree.map(lambda ours, theirs: assert_parity(ours, theirs), found, plain)
