"""Low-rank adapters: which kernels they are of, what they change, and what is trained."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig, base_of, is_adapter, merged
from flax_transformers.errors import UserError
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.testing import assert_bit_equal, relative_difference
from tests.adapters.adapted_models import adapted_model, untrained
from tests.huggingface.tensors import drawn_parameters, parameter_shapes
from tests.training.test_trainer import batches, trainer

LORA = LoraConfig(rank=4, targets=("all-linear",))


def adapted(architecture, **fields):
    """The adapted kernels of a tiny model, without the names of layers."""
    _, adapters = adapted_shapes(untrained(architecture), LoraConfig(rank=2, **fields))
    return {"/".join(name[:-1]).rpartition("block_0/")[2] for name in adapters.kernels}


def test_names_groups_and_patterns_say_which_layers_are_adapted():
    assert adapted("LlamaForCausalLM") == {"attention/query", "attention/value"}
    assert adapted("LlamaForCausalLM", targets=("feed-forward", "key")) == {
        "mlp/gate", "mlp/up", "mlp/down", "attention/key",
    }  # fmt: skip
    assert adapted("LlamaForCausalLM", targets=("lm_head/words",)) == {"lm_head/words"}
    assert adapted("T5ForConditionalGeneration", targets=("*/cross_attention/query",)) == {
        "cross_attention/query"
    }
    everything = adapted("MixtralForCausalLM", targets=("all-linear",))
    assert "mlp/router" not in everything and {"mlp/gate", "attention/output"} < everything


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("querry",)}, "there are down, key, output, query, up, value, the groups"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"fully_trained": ("*",)}, "lora.fully_trained has every linear layer"),
        ({"targets": ("classification_head",)}, "no linear layer that is not fully trained"),
        ({"fully_trained": ("classifier",)}, "there are classification_head, embeddings, pooler"),
    ],
)
def test_a_target_that_is_not_there_is_refused_with_what_is(fields, message):
    with pytest.raises(UserError) as raised:
        adapted("BertForSequenceClassification", **fields)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_heads_of_labels_are_trained_in_full_and_those_of_language_models_are_not():
    def whole(architecture, **fields):
        _, adapters = adapted_shapes(untrained(architecture), LoraConfig(rank=2, **fields))
        return {name[0] for name in adapters.fully_trained}

    assert whole("BertForSequenceClassification") == {"pooler", "classification_head"}
    assert whole("BertForMaskedLM") == whole("LlamaForCausalLM") == set()
    assert whole("BertForMaskedLM", fully_trained=("mlm_head",)) == {"mlm_head"}
    assert whole("LlamaForCausalLMWithValueHead") == {"value_head"}
    assert whole("BertForPreTraining") == {"pooler", "next_sentence_head"}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2Model"])
def test_merged_kernels_are_the_sum_of_kernel_and_product_in_every_layer(architecture):
    _, _, both = adapted_model(architecture, LORA)
    found, leaves = flatten_dict(merged(both, 0.5)), flatten_dict(both)
    for name, kernel in flatten_dict(base_of(both)).items():
        if (*name[:-1], f"{name[-1]}_lora_a") not in leaves:
            assert found[name] is leaves[name]
            continue
        a, b = (np.asarray(leaves[(*name[:-1], f"kernel_lora_{x}")], np.float64) for x in "ab")
        batch = a.shape[: a.ndim + b.ndim - 2 - kernel.ndim]
        a, b = a.reshape(*batch, -1, 4), b.reshape(*batch, 4, -1)
        expected = np.asarray(kernel, np.float64) + 0.5 * (a @ b).reshape(kernel.shape)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6)


def beside(next_function, args, kwargs, context):
    """A layer and its adapter as PEFT computes them, ``x W + scale * (x A) B``."""
    result, layer = next_function(*args, **kwargs), context.module
    if context.method_name != "__call__" or not layer.has_variable("params", "kernel_lora_a"):
        return result
    a, b = (layer.get_variable("params", f"kernel_lora_{one}") for one in "ab")
    return result + 0.5 * jnp.tensordot(jnp.tensordot(args[0], a, a.ndim - 1), b, 1)


@pytest.mark.parametrize("architecture", ["BertModel", "LlamaModel"])
def test_merged_adapters_give_the_outputs_of_adapters_beside_their_layers(architecture):
    model, _, both = adapted_model(architecture, LORA)
    ids = jnp.asarray([[5, 9, 3, 7]], jnp.int32)

    def output(params):
        return model.apply({"params": params}, ids).last_hidden_state

    plain, found = map(jax.jit(output), (base_of(both), merged(both, 0.5)))
    with nn.intercept_methods(beside):
        expected = jax.jit(output)(both)
    assert relative_difference(found, expected) < 1e-6 < 0.01 < relative_difference(found, plain)


def test_a_is_kaiming_uniform_differs_between_layers_and_follows_the_seed():
    model = untrained("LlamaForCausalLM")
    boxed = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    _, adapters = adapted_shapes(model, LoraConfig(rank=64, targets=("query", "output")))

    def draw(seed):
        both = nn.meta.unbox(adapters.added(boxed, jax.random.key(seed)))
        return both["stack"]["layers"]["block_0"]["attention"]

    first, again, other = draw(0), draw(0), draw(1)
    a = np.asarray(first["query"]["kernel_lora_a"])
    bound = 1 / np.sqrt(a.shape[1])
    assert np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert not np.array_equal(a[0], a[1])
    inputs = first["output"]["kernel"].shape[1:3]
    assert np.abs(first["output"]["kernel_lora_a"]).max() <= 1 / np.sqrt(np.prod(inputs))
    assert_bit_equal(first, again)
    assert not np.array_equal(a, other["query"]["kernel_lora_a"])


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoraConfig(rank=16, alpha=8).scale == 0.5
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale == 2


ADAMW = {"optimizer": AdamW(learning_rate=1e-2), "total_steps": 4}


@pytest.fixture(scope="module")
def with_lora():
    return trainer(lora=LORA, **ADAMW)


@pytest.mark.slow
def test_adapters_begin_as_the_model_without_them(with_lora):
    plain, batch = trainer(**ADAMW), next(batches(1))
    state, expected = with_lora.init(seed=3), plain.init(seed=3)
    assert_bit_equal(base_of(state.params), expected.params)
    assert with_lora.evaluate(state, [batch]) == plain.evaluate(expected, [batch])
    found, expected = (
        one.step(start, batch)[1]["train/loss"]
        for one, start in ((with_lora, state), (plain, expected))
    )
    assert float(found) == float(expected)


@pytest.mark.slow
@pytest.mark.parametrize("of_optax", [False, pytest.param(True, marks=pytest.mark.full)])
def test_only_adapters_change_and_only_they_have_a_state(of_optax, with_lora):
    one = trainer(lora=LORA, optimizer=optax.adamw(1e-2)) if of_optax else with_lora
    state, batch = one.init(seed=3), next(batches(1))
    frozen = jax.tree.map(np.asarray, state.params)
    kept = [np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf)]
    adapters = [leaf for name, leaf in flatten_dict(state.params).items() if is_adapter(name)]
    assert sorted(kept) == sorted(2 * [leaf.shape for leaf in adapters])
    for _ in range(2):  # in the first, A has no gradient yet
        state, _ = one.step(state, batch)
    for name, leaf in flatten_dict(state.params).items():
        assert np.array_equal(leaf, flatten_dict(frozen)[name]) is not is_adapter(name), name


@pytest.mark.slow
def test_an_average_is_merged_for_evaluation_and_given_parameters_keep_the_adapters():
    with_lora = trainer(lora=LORA, ema=EMAConfig(0.5), optimizer=optax.sgd(1e-2))
    given = drawn_parameters(with_lora.model, parameter_shapes(with_lora.model))
    state = with_lora.init(seed=3, params=given)
    assert_bit_equal(base_of(state.params), given)
    state, _ = with_lora.step(state, next(batches(1)))
    expected = merged(state.ema, LORA.scale)
    found = with_lora.model_params(state)
    assert jax.tree.structure(found) == jax.tree.structure(given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(base_of(state.ema)), strict=True)
    )


def decoder_on(mesh):
    model = untrained("LlamaForCausalLM", num_heads=4, num_key_value_heads=4).config
    return ft.Trainer(
        model=model, objective=CausalLM(), optimizer=optax.sgd(0.5), lora=LORA, mesh=mesh
    )


def test_adapters_are_divided_over_a_mesh_like_their_kernels():
    state = decoder_on(ft.make_mesh(data=2, fsdp=2, tensor=2)).abstract
    query = state.params["stack"]["layers"]["block_0"]["attention"]["query"]
    assert query["kernel_lora_a"].sharding.spec == P(None, "fsdp", None)
    assert query["kernel_lora_b"].sharding.spec == P(None, None, "tensor", None)


@pytest.mark.slow
@pytest.mark.full  # tests/multi_device/test_families.py has a decoder on a mesh
def test_a_mesh_of_eight_devices_trains_the_adapters_of_a_decoder_as_one_does():
    meshes = (
        ft.make_mesh(devices=jax.devices()[:1]),
        ft.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()),
    )
    random = np.random.default_rng(0)
    batch = {
        "input_ids": random.integers(5, 50, (8, 12)).astype(np.int32),
        "labels": random.integers(5, 50, (8, 12)).astype(np.int32),
        "segment_ids": np.ones((8, 12), np.int32),
        "label_weights": np.ones((8, 12), np.float32),
    }
    ends = []
    for mesh in meshes:
        one = decoder_on(mesh)
        state = one.init(seed=1)
        for _ in range(3):
            state, metrics = one.step(state, batch)
        ends.append((float(metrics["train/loss"]), jax.device_get(state.params)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ends[0][1], ends[1][1])


@pytest.mark.slow
def test_a_head_of_labels_is_trained_beside_the_adapters():
    model = untrained("BertForSequenceClassification").config
    one = ft.Trainer(
        model=model, objective=SequenceClassification(), optimizer=optax.adam(1e-2),
        lora=LoraConfig(rank=2), mesh=ft.make_mesh(devices=jax.devices()[:1]),
    )  # fmt: skip
    state = one.init()
    before = jax.tree.map(np.asarray, state.params)
    batch = {
        "input_ids": np.full((4, 6), 7, np.int32) + np.arange(4, dtype=np.int32)[:, None],
        "attention_mask": np.ones((4, 6), np.int32),
        "labels": np.array([0, 1, 0, 1], np.int32),
        "weights": np.ones(4, np.float32),
        "truncated": np.zeros(4, np.float32),
    }
    for _ in range(2):
        state, _ = one.step(state, batch)
    changed = {
        name[0]
        for name, leaf in flatten_dict(state.params).items()
        if not np.array_equal(leaf, flatten_dict(before)[name])
    }
    assert changed == {"stack", "pooler", "classification_head"}
