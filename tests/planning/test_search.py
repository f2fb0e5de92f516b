"""What a search compiles, and how it ranks that; nothing is compiled here."""

import dataclasses

import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.mixtral import MixtralConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.monitoring.device_specs import device_spec
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.planning import search as module
from flax_transformers.planning.plan import GIB, Roofline
from flax_transformers.planning.search import candidates, search, tokens_of_row
from flax_transformers.planning.topology import devices_of
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config
from flax_transformers.training.config import Evaluation
from flax_transformers.training.setup import checked_mesh
from tests.planning.test_plan import a_plan


@pytest.fixture
def config():
    return tiny_config("text.txt", "store", batch_size=64, compute=ComputeConfig("auto"))


def found_for(config, topology="v5e:4x4"):
    devices = devices_of(topology)
    return candidates(config, config.phases[-1], devices, device_spec(devices[0].device_kind))


def test_every_candidate_is_the_same_run_on_all_devices(config):
    found = found_for(config)
    assert found
    for one in found:
        mesh, phase = one.config.mesh, one.phase
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.expert == 16
        assert 4 % mesh.tensor == 0  # of four heads
        assert (phase.batch_size, phase.steps) == (64, config.phases[-1].steps)
        assert 64 % (mesh.data * mesh.fsdp * phase.micro_batches) == 0
        assert dataclasses.replace(
            one.config, phases=config.phases, mesh=config.mesh, compute=config.compute
        ) == dataclasses.replace(config)
        assert one.config.phases == (phase,)
    assert found == sorted(found, key=lambda one: one.seconds)


def test_a_small_model_is_replicated_and_a_large_one_is_sharded(config):
    assert found_for(config)[0].config.mesh == MeshConfig(data=16)
    large = tiny_bert(hidden_size=4096, num_layers=40, num_heads=32, intermediate_size=16384)
    found = found_for(dataclasses.replace(config, model=large))
    # 8.1 billion parameters, 16 bytes each with gradients and two moments: 121 GiB.
    assert all(one.config.mesh.fsdp * one.config.mesh.tensor >= 8 for one in found)


def test_the_expert_axis_is_used_only_with_experts(config):
    assert {one.config.mesh.expert for one in found_for(config)} == {1}
    mixtral = MixtralConfig(
        architecture="MixtralForCausalLM", vocab_size=262, hidden_size=64, num_layers=2,
        num_heads=4, num_key_value_heads=2, intermediate_size=64, experts=4,
    )  # fmt: skip
    mixture = dataclasses.replace(config, model=mixtral, objective=CausalLM())
    found = found_for(mixture)
    assert {one.config.mesh.expert for one in found} == {1, 2, 4}
    assert {one.config.mesh.tensor for one in found} == {1, 2}  # of two heads of keys


def test_the_best_candidates_are_compiled_and_the_fastest_that_fits_is_first(config, monkeypatch):
    """Of four, one is refused and not counted, one does not fit, and the later one is faster."""
    seen = []

    def planned(config, phase, devices, topology, teacher=None):
        seen.append((config.mesh, config.compute.remat, phase.micro_batches))
        if len(seen) == 1:
            raise UserError("this dimension does not divide")
        fits = len(seen) != 2
        times = Roofline(compute=10.0 - len(seen), memory=0.0, interconnect={})
        plan = a_plan(state=GIB, rest=GIB)
        return dataclasses.replace(plan, fits=fits, roofline=times if fits else None)

    monkeypatch.setattr(module, "plan", planned)
    shown = []
    ranked = search(
        config, config.phases[-1], devices_of("v5e:4x4"), "v5e:4x4", limit=3, on_plan=shown.append
    )
    likeliest = found_for(config)[:4]
    assert seen == [
        (one.config.mesh, one.config.compute.remat, one.phase.micro_batches) for one in likeliest
    ]
    assert [one.fits for one in shown] == [False, True, True]
    assert ranked == [shown[2], shown[1], shown[0]]


def test_a_search_passes_over_meshes_that_train_would_refuse(config, monkeypatch):
    """Held-out batches of 4 divide over four devices, and over no sixteen."""

    def compile_nothing(config, phase, devices, topology, teacher=None):
        checked_mesh(config, devices)
        return a_plan(state=GIB, rest=GIB)

    monkeypatch.setattr(module, "plan", compile_nothing)
    four = dataclasses.replace(config, evaluation=Evaluation(batch_size=4))
    where = devices_of("v5e:4x4"), "v5e:4x4"
    likeliest = found_for(four)
    fitting = [one for one in likeliest if one.config.mesh.tensor == 4]
    assert likeliest[0] not in fitting
    assert len(search(four, four.phases[-1], *where, limit=1000)) == len(fitting)
    none = dataclasses.replace(config, evaluation=Evaluation(batch_size=1))
    with pytest.raises(UserError, match="evaluation.batch_size 1 does not divide"):
        search(none, none.phases[-1], *where, limit=1)


def test_devices_of_unknown_speed_are_refused(config):
    with pytest.raises(UserError, match="the speed of 'cpu' is unknown"):
        search(config, config.phases[-1], devices_of("cpu:8"), "cpu:8", limit=1)


@pytest.mark.parametrize(
    ("architecture", "tokens"),
    [
        ("ViTForImageClassification", 17),  # 4 x 4 patches of 8 pixels, and the class token
        ("VideoMAEForVideoClassification", 32),  # 2 x 16 tubelets
        ("ViTMAEForPreTraining", 17),  # in the decoder; the encoder sees a quarter
        ("BertForMaskedLM", 32),
    ],
)
def test_a_row_has_the_tokens_of_its_largest_attention(config, architecture, tokens):
    changed = dataclasses.replace(config, model=tiny_architecture(architecture))
    assert tokens_of_row(changed, changed.phases[-1]) == tokens
