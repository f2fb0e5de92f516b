"""The mesh and the number of micro-batches change where things are computed, not what."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.huggingface.family import build_model
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import batch_sharding
from flax_transformers.testing import relative_difference, tiny_bert, tiny_config, write_corpus
from flax_transformers.training.state import abstract_state
from flax_transformers.training.step import compile_train_step, make_train_step, model_functions
from tests.multi_device.states import placed_state

pytestmark = pytest.mark.slow

STEPS = 10
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
STILL = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A config, ten batches whose rows have different numbers of masked tokens, and parameters."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt")
    config = tiny_config(folder / "text.txt", folder / "store")
    # One document a row: rows are short and long, so masks are uneven.
    objective = dataclasses.replace(config.objective, cross_documents=False)
    config = dataclasses.replace(config, objective=objective)
    prepared = prepare(config.data)
    stream = TrainStream(
        TextExamples(prepared.train, objective.window_spec(32)),
        objective,
        prepared.tokenizer.vocabulary,
        sequence_length=32,
        batch_size=16,
        seed=0,
    )
    batches = [next(stream) for _ in range(STEPS)]
    for batch in batches:
        del batch["example_id"]
    assert len({int(row.sum()) for row in batches[0]["masked_weights"]}) > 1
    model = build_model(tiny_bert(), config.compute)
    init = jax.jit(lambda: model.init(jax.random.key(0), **model.example_inputs())["params"])
    return config, batches, nn.meta.unbox(init())


def losses(setting, mesh_config, micro_batches=1, generator="auto", devices=8, **model):
    config, batches, variables = setting
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    compute = dataclasses.replace(config.compute.resolve("cpu"), dropout_generator=generator)
    network = build_model(tiny_bert(**model), compute)
    optimizer = config.optimizer.make(STEPS)
    functions = model_functions(network)
    found = []
    with jax.set_mesh(mesh):
        abstract = abstract_state(network, optimizer, 0, mesh)
        state = placed_state(abstract, variables)
        step = compile_train_step(
            make_train_step(config.objective, functions, optimizer, micro_batches), abstract, mesh
        )
        for batch in batches:
            state, report = step(state, jax.device_put(batch, batch_sharding(mesh)))
            total, count = report.sums["loss"]
            found.append(float(total) / float(count))
    return np.array(found), state


@pytest.fixture(scope="module")
def by_data(setting):
    return losses(setting, MeshConfig(data=8))


@pytest.fixture(scope="module")
def fully_sharded(setting):
    return losses(setting, MeshConfig(data=1, fsdp=8))


@pytest.fixture(scope="module")
def mixed(setting):
    return losses(setting, MIXED)


@pytest.fixture(scope="module")
def without_dropout(setting):
    return losses(setting, MeshConfig(), devices=1, **STILL)


MESHES = [("mixed", 4), pytest.param("fully_sharded", 8, marks=pytest.mark.full)]


@pytest.mark.parametrize(("mesh", "parts"), MESHES)
def test_meshes_agree_with_dropout_on(request, by_data, mesh, parts):
    found, state = request.getfixturevalue(mesh)
    assert relative_difference(found, by_data[0]) < 1e-5
    kernel = state.params["stack"]["layers"]["block_0"]["attention"]["query"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    assert share == 1 / parts, "the parameter is not divided"


@pytest.mark.full
def test_meshes_agree_with_the_masks_of_threefry(setting, by_data):
    one, _ = losses(setting, MeshConfig(data=8), generator="threefry")
    other, _ = losses(setting, MIXED, generator="threefry")
    assert relative_difference(one, other) < 1e-5
    assert relative_difference(one, by_data[0]) > 1e-4  # other masks


@pytest.mark.parametrize(("mesh", "parts"), MESHES)
def test_optimizer_statistics_are_divided_like_their_parameters(request, mesh, parts):
    _, state = request.getfixturevalue(mesh)
    shares = {
        leaf.addressable_shards[0].data.size / leaf.size
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.ndim == 4
    }
    assert shares == {1 / parts}


@pytest.mark.full  # test_contrastive.py has micro-batches on a mesh
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_agree_with_dropout_off(setting, without_dropout, micro_batches):
    parts, _ = losses(setting, MIXED, micro_batches, **STILL)
    assert relative_difference(parts, without_dropout[0]) < 1e-5
