"""What is planned is what runs, and the figures of a plan are those of hand counts."""

import dataclasses
import functools
import hashlib
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.cli.plan import teacher_of
from flax_transformers.data.dataset import prepare
from flax_transformers.distillation.objectives import DistilledSequenceClassification
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.monitoring.device_specs import device_spec
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.planning import plan as module
from flax_transformers.planning.hlo_cost import SLICES, Collective, HloCost, KernelCall, account
from flax_transformers.planning.hlo_text import Array
from flax_transformers.planning.plan import (
    GIB,
    Memory,
    StepPlan,
    advice,
    attention_kernel_flops,
    flops_of,
    grouped_product_flops,
    lower_train_step,
    plan,
)
from flax_transformers.planning.topology import devices_of
from flax_transformers.post_training.problems import Problems
from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config, write_corpus
from flax_transformers.training import setup
from flax_transformers.training.config import Evaluation, Phase
from flax_transformers.training.dummy_batch import abstract_batch
from flax_transformers.training.loop import train_prepared
from flax_transformers.training.setup import make_trainer
from flax_transformers.training.trainer import Trainer
from tests.families.parity import first_by_default


def planned(config, topology="cpu:8"):
    devices = devices_of(topology)
    return plan(config, config.phases[-1], devices, topology, teacher=teacher_of(config))


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "text.txt")
    return tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=2)


def main_function(text):
    """The lines of a lowered program, each helper that it calls named by what that does.

    JAX numbers helpers, and writes some down twice, by what was traced before.
    """
    functions = re.split(r"^  func\.func (?=\w+ @)", text, flags=re.MULTILINE)
    bodies = {re.search(r"@(\w+)\(", body)[1]: body for body in functions[1:]}

    @functools.cache
    def named(name):
        body = bodies[name].replace(f"@{name}(", "(")
        return re.sub(r"@(\w+)\(", lambda call: f"@{digest(call[1])}(", body)

    def digest(name):
        return hashlib.sha256(named(name).encode()).hexdigest()

    return [functions[0], *named("main").splitlines()]


class Lowered(Exception):
    """Ends a run where its first step would be compiled."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", first_by_default([LoraConfig(), LoraConfig(rank=2)]), ids=["whole", "lora"]
)
def test_the_step_that_is_planned_is_the_one_that_train_runs(config, tmp_path, monkeypatch, lora):
    mesh, compute = MeshConfig(data=2, fsdp=2, tensor=2), ComputeConfig("auto", remat="full")
    config = dataclasses.replace(config, mesh=mesh, compute=compute, lora=lora)
    original = Trainer.train_step

    def lowering(trainer, micro_batches):
        def step(state, batch):
            raise Lowered(original(trainer, micro_batches).lower(state, batch).as_text())

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lowering)
        with pytest.raises(Lowered) as ran:
            train_prepared(config, prepare(config.data), tmp_path / "run")
    trainer = make_trainer(config, make_mesh(config.mesh))
    planned = lower_train_step(config, trainer, config.phases[0]).as_text()
    assert main_function(planned) == main_function(str(ran.value))


@pytest.mark.slow
def test_a_plan_agrees_with_counts_by_hand(config):
    found = planned(dataclasses.replace(config, mesh=MeshConfig(data=4, fsdp=2)))
    tokens = 16 * 32 / 8  # of one device
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 64) * tokens
    attention = 2 * 2 * 32 * 32 * tokens  # scores and values
    head = (32 * 32 + 384 * 32) * config.objective.predictions(32) * 16 / 8
    assert found.model_flops == 6 * (layers + attention + head)
    assert found.program_flops == pytest.approx(found.model_flops, rel=0.03)
    parameters = 4 * sum(
        leaf.size
        for leaf in jax.tree.leaves(make_trainer(config, make_mesh(MeshConfig())).abstract.params)
    )
    # All are halved but for what the axis "embed" is not in.
    assert parameters / 2 < found.memory.parameters < 0.55 * parameters
    assert found.memory.optimizer == pytest.approx(2 * found.memory.parameters, abs=16)
    assert found.memory.batch == 2 * (2 * 32 + 3 * config.objective.predictions(32)) * 4
    assert found.fits
    assert found.mesh == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": Evaluation(batch_size=12)}, "evaluation.batch_size 12 does not divide"),
        ({"phases": (Phase(1, 32, 12), Phase(1, 32, 16))}, "^batch_size 12 does not divide"),
    ],
)
def test_a_batch_that_train_refuses_is_not_planned(config, changes, said):
    with pytest.raises(UserError, match=said):
        planned(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(("topology", "dtype"), [("cpu:1", "bfloat16"), ("cpu:2", "auto")])
def test_one_cpu_is_planned_in_the_dtype_that_a_new_run_takes(config, monkeypatch, topology, dtype):
    def lowering(config, trainer, phase):
        raise Lowered(config.compute.dtype)

    monkeypatch.setattr(setup, "bfloat16_instructions", lambda: ["amx_bf16"])
    monkeypatch.setattr(module, "lower_train_step", lowering)
    compute = ComputeConfig("auto")
    with pytest.raises(Lowered, match=dtype):
        planned(dataclasses.replace(config, compute=compute), topology)


@pytest.mark.slow
@pytest.mark.full
def test_a_student_is_planned_with_its_teacher_and_the_logits_of_it(config, tmp_path):
    objective = DistilledSequenceClassification(teacher="runs/teacher")
    model = tiny_bert(architecture="BertForSequenceClassification", num_labels=3)
    config = dataclasses.replace(config, model=model, objective=objective)
    phase = config.phases[0]
    logits = abstract_batch(config, phase)["teacher_logits"]
    assert (logits.shape, logits.dtype) == ((phase.batch_size, 3), "float32")
    found = planned(config, "cpu:1")
    assert found.memory.other_models is None
    assert found.notes == ("the parameters of runs/teacher and its own step need further memory",)
    # A wider model than the student.
    theirs = build_model(dataclasses.replace(model, hidden_size=64))
    params = theirs.init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
    ft.save_pretrained(tmp_path / "teacher", theirs, nn.meta.unbox(params))
    there = dataclasses.replace(objective, teacher=str(tmp_path / "teacher"))
    counted = planned(dataclasses.replace(config, objective=there), "cpu:1")
    assert counted.memory.other_models == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert counted.memory.total == found.memory.total + counted.memory.other_models
    assert counted.notes == ("the teacher's own step needs further memory",)


@pytest.mark.slow
def test_the_memory_of_a_reference_is_counted(config):
    rollouts = Rollouts(rewards=(ExactAnswer(),), completion_length=4)
    objective = GroupRelativePolicy(rollouts=rollouts, kl_coefficient=0.1)
    config = dataclasses.replace(
        config,
        model=tiny_architecture("LlamaForCausalLM", vocab_size=262, max_positions=64),
        objective=objective,
        data=Problems(),
    )
    found = planned(config, "cpu:1").memory
    assert found.other_models == found.parameters > 0
    assert found.state == found.other_models + found.parameters + found.optimizer
    parts = [found.batch, found.padding, found.temporaries, found.output, found.program]
    assert found.total == pytest.approx(found.state + sum(parts), rel=0.01)


def test_a_program_that_jax_cannot_parse_is_read_from_the_compilers_dump(config, monkeypatch):
    as_text, read = jax.stages.Compiled.as_text, []

    def unreadable(compiled):
        read.append(account(as_text(compiled), {}))
        raise jax.errors.JaxRuntimeError("async-update instruction should have 1 operands")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    dumped = planned(config, "cpu:1")
    assert dumped.program_flops == flops_of(read[0], config.model) > 0
    # A little is still done to a program of a CPU after it is dumped.
    assert dumped.instructions == pytest.approx(read[0].num_instructions, rel=0.05)
    assert not dumped.notes


@pytest.fixture(scope="module")
def on_tpu(tmp_path_factory):
    """A small model's plan for four TPU chips, its program by the real compiler."""
    folder = tmp_path_factory.mktemp("tpu")
    config = tiny_config(folder / "text.txt", folder / "store")
    # The kernel with dropout is compiled in tests/models/kernels/test_flash_attention.py.
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    model = tiny_bert(hidden_size=256, intermediate_size=1024, **none)
    compute = ComputeConfig("auto", remat="full")
    config = dataclasses.replace(config, model=model, compute=compute, mesh=MeshConfig(1, 4))
    return planned(config, "v5e:2x2")


@pytest.mark.slow
def test_the_compiler_for_tpus_runs_on_this_machine(on_tpu):
    assert (on_tpu.devices, on_tpu.chip, on_tpu.mesh) == (4, "TPU v5 lite", {"fsdp": 4})
    assert on_tpu.fits and on_tpu.memory.available == int(15.75 * GIB)
    assert on_tpu.memory.total > on_tpu.memory.state + on_tpu.memory.temporaries > 0
    assert {row.axes for row in on_tpu.traffic} == {("fsdp",)}
    assert 0 < on_tpu.mfu_bound < 1
    assert on_tpu.roofline.step == max(
        on_tpu.roofline.compute, on_tpu.roofline.memory, on_tpu.roofline.interconnect["fsdp"]
    )
    assert not on_tpu.notes


@pytest.mark.slow
def test_what_does_not_fit_a_chip_is_a_plan_that_says_so(config):
    large = dataclasses.replace(
        config,
        model=tiny_bert(hidden_size=4096, num_layers=24, intermediate_size=16384),
        mesh=MeshConfig(data=4),
    )
    found = planned(large, "v5e:2x2")
    assert not found.fits and found.program_flops is None and found.roofline is None
    assert found.memory.total > found.memory.state > found.memory.available
    assert "with --mesh.fsdp" in advice(found)


def a_plan(*, state, rest, remat="full", fsdp=4, rows=64, devices=16):
    memory = Memory(
        state // 3, state - state // 3, None, 0, None, None, None, None, state + rest, 16 * GIB
    )
    return StepPlan(
        topology="v5e:4x4", devices=devices, chip="TPU v5 lite",
        mesh={"data": devices // fsdp, "fsdp": fsdp},
        remat=remat, batch_shape=(rows * 4 * fsdp, 128), micro_batches=1, memory=memory, fits=False,
        model_flops=1.0, program_flops=None, memory_bytes=None, traffic=(), roofline=None,
        mfu_bound=None, instructions=None, lower_seconds=0.0, compile_seconds=0.0,
    )  # fmt: skip


def test_a_state_that_is_too_large_is_to_be_sharded_further():
    said = advice(a_plan(state=20 * GIB, rest=GIB))
    assert said.startswith(
        "it does not fit: 21.0 GiB of 16.00 on each device, 20.0 of it parameters"
    )
    assert said.endswith("with --mesh.fsdp 16 --mesh.data -1")
    assert "use 8 times as many devices" in advice(a_plan(state=50 * GIB, rest=GIB))
    said = advice(a_plan(state=20 * GIB, rest=GIB, fsdp=1, devices=6))  # 4 does not divide 6
    assert said.endswith("with --mesh.fsdp 6 --mesh.data -1")


def test_activations_that_are_too_large_need_remat_or_gradient_accumulation():
    assert advice(a_plan(state=4 * GIB, rest=30 * GIB, remat="none")).endswith("remat full")
    said = advice(a_plan(state=4 * GIB, rest=30 * GIB))  # which is 2.5 times what there is
    assert said.endswith("use phases.*.micro_batches 4, or 16 rows on each device instead of 64")


def test_attention_kernels_are_counted_by_their_shapes():
    queries, keys = Array("bf16", (8, 12, 1024, 64)), Array("bf16", (8, 4, 512, 64))
    one = 2 * 8 * 12 * 1024 * 512 * 64

    def flops(name, results, causal=False):
        operands = (Array("s32", (1, 2, 2)), queries, keys, keys)
        call = KernelCall(name, "attention", operands, results, estimate=None, runs=1)
        return attention_kernel_flops(call, causal=causal)

    saved = Array("f32", (1, 512, 128)), queries, queries
    assert flops("splash_mha_fwd_segmented_residuals.2", saved) == 2 * one
    assert flops("splash_mha_fwd_segmented_residuals.2", saved, causal=True) == one
    assert flops("splash_mha_dq_no_residuals.1", (queries,)) == 3 * one
    assert flops("splash_mha_dkv_no_residuals", (keys, keys)) == 4 * one
    assert flops("splash_mha_dkv_no_residuals", (queries, keys, keys)) == 5 * one
    assert flops("attention_fwd.3", (queries,)) == 2 * one
    assert flops("attention_dq", (queries,)) == 3 * one
    assert flops("attention_dkv", (keys, keys, Array("f32", (12, 3, 128, 128)))) == 4 * one
    assert flops("some_other_matter", (queries,)) == 0


def test_what_is_advised_is_a_mesh_that_there_can_be():
    full = a_plan(state=50 * GIB, rest=GIB)
    found = dataclasses.replace(full, devices=16, mesh={"data": 1, "fsdp": 2, "tensor": 8})
    assert "as many devices" in advice(found)


@pytest.mark.parametrize(
    ("axes", "per_host", "gigabytes"),
    [(("data",), 1, 50), (("data",), 2, 100), (("data",), 16, 450), (("data",), None, 450),
     ((SLICES,), None, 50)],
)  # fmt: skip
def test_gpus_of_several_hosts_send_through_their_network_adapters(axes, per_host, gigabytes):
    sum_ = Collective("all-reduce", axes, 2, 1, (Array("bf16", (2**20,)),), "", per_host)
    found = module.roofline(HloCost(collectives=[sum_]), 0.0, device_spec("NVIDIA H100 80GB"))
    assert found.step == pytest.approx(2 * 2**20 / (gigabytes * 1e9))


def test_the_hosts_of_gpus_are_those_of_the_mesh_and_tpus_have_none():
    def mesh(platform):
        devices = [SimpleNamespace(platform=platform, process_index=n // 2) for n in range(4)]
        return SimpleNamespace(devices=np.array(devices).reshape(2, 2))

    assert module.hosts_of(mesh("gpu")) == [0, 0, 1, 1]
    assert module.hosts_of(mesh("tpu")) == []


@pytest.mark.slow
def test_the_collectives_of_a_plan_are_counted_with_the_hosts_of_its_devices(config, monkeypatch):
    def counting(text, mesh, hosts):
        raise Lowered(hosts)

    monkeypatch.setattr(module, "hosts_of", lambda mesh: ["a host", *mesh.axis_names])
    monkeypatch.setattr(module, "account", counting)
    with pytest.raises(Lowered, match="'a host', 'data'"):
        planned(config)


def test_grouped_products_are_counted_by_rows_whatever_the_number_of_groups():
    rows, other = Array("bf16", (96, 32)), Array("bf16", (96, 80))
    kernels, gradient = Array("bf16", (4, 32, 80)), Array("f32", (4, 32, 80))
    sizes = Array("s32", (4,))

    def flops(name, operands, result):
        return grouped_product_flops(KernelCall(name, "", operands, (result,), None, 1))

    assert flops("ragged-dot-none.7", (sizes, rows, kernels), other) == 2 * 96 * 32 * 80
    assert flops("ragged-dot-none.7", (sizes, rows, other), gradient) == 2 * 96 * 32 * 80
    assert flops("ragged-dot-metadata", (sizes,), sizes) == 0
    assert flops("attention_fwd", (sizes, rows, kernels), other) == 0


def test_an_unknown_topology_is_refused():
    for name in ("v5e", "v9:4x4", "v5e:2x2x2", "v5e:3x5"):
        with pytest.raises(UserError, match="name"):
            devices_of(name)
    with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=9"):
        devices_of("cpu:9")


def test_slices_are_given_in_the_name_or_as_an_option():
    for devices in (devices_of("2xv5e:2x2"), devices_of("v5e:2x2", slices=2)):
        assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", ["v5litepod-1", "v6e:1x1"])
def test_a_tpu_can_be_a_single_chip(name):
    assert len(devices_of(name)) == 1
