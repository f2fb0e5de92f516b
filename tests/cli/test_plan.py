"""``plan``: printed tables, written files, and refusals."""

import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.cli.parsing import override
from flax_transformers.cli.plan import _with_initial_model, settings, write_json
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.planning.hlo_cost import account
from flax_transformers.planning.topology import EXAMPLES, devices_of
from flax_transformers.testing import tiny_bert, tiny_config
from tests.huggingface.tensors import drawn_model

LACKING = ("h100", "tpu7x")
"""What compilers are not for, or not in every version, that tests install."""
TINY = str(Path(__file__).parents[2] / "configs" / "bert_tiny.py")
SMALL = [
    *("--model.num-layers", "1", "--model.hidden-size", "32", "--model.intermediate-size", "32"),
    *("--phases.0.sequence-length", "32", "--compute.remat", "full"),
]


@pytest.mark.slow
def test_a_plan_is_printed_and_written(capsys, tmp_path):
    file = tmp_path / "plan.json"
    command = ["plan", TINY, "--topology", "v5e:2x2", "--json", str(file), *SMALL]
    command += ["--hlo", str(tmp_path / "plan.hlo")]
    assert main([*command, "--mesh.fsdp", "4"]) == 0
    printed = capsys.readouterr().out
    for part in ("v5e:2x2: 4 devices (TPU v5 lite), mesh fsdp=4", "parameters", "MFU at most"):
        assert part in printed
    found = json.loads(file.read_text())
    assert found["fits"] and found["mesh"] == {"fsdp": 4} and found["remat"] == "full"
    counted = account((tmp_path / "plan.hlo").read_text(), {"data": 1, "fsdp": 4})
    assert counted.num_instructions == found["instructions"]
    assert counted.memory_bytes == found["memory_bytes"]
    assert found["recomputation"] == found["program_flops"] / found["model_flops"]
    assert found["roofline"]["step"] * found["mfu_bound"] * 197e12 == pytest.approx(
        found["model_flops"]
    )


@pytest.mark.slow
def test_a_plan_that_does_not_fit_exits_with_2_and_a_remedy(capsys):
    rows = ["--phases.0.batch-size", str(2**20)]
    assert main(["plan", TINY, "--topology", "v5e:2x2", *SMALL, *rows]) == 2
    streams = capsys.readouterr()
    said = streams.err.strip().splitlines()[-1]
    assert said.startswith("flax-transformers: it does not fit: ")
    assert "of 15.75 on each device" in said and "use phases.*.micro_batches" in said
    assert "available" in streams.out


def refused(capsys, *arguments):
    assert main(["plan", TINY, *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_missing_phase_is_refused(capsys):
    assert "there is no phase 3; the config has 1" in refused(
        capsys, "--topology", "cpu:8", "--phase", "3"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--topology", "cpu:0"), "has no device"),
        (("--topology", "cpu:1", "--slices", "0"), "--slices is 0; it must be at least 1"),
        (
            ("--topology", "cpu:1", "--search-limit", "0"),
            "--search-limit is 0; it must be at least 1",
        ),
        (
            ("--topology", "cpu:1", "--json", "no/such/plan.json"),
            "create the folder of",
        ),
        (
            ("--topology", "cpu:1", "--hlo", "no/such/step.hlo"),
            "create the folder of",
        ),
        (("--topology", "cpu:1", "--compute.feed-forward-chunk", "0"), "must be at least 1"),
    ],
)
def test_invalid_arguments_are_refused_before_compiling(capsys, arguments, says):
    assert says in refused(capsys, *arguments)


def test_every_example_topology_has_a_known_device_kind():
    for example in EXAMPLES.split(", "):
        if not example.startswith(LACKING):
            assert len(devices_of(example)) > 1


def test_a_compiler_that_is_known_to_crash_is_not_started(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.42.1")
    said = refused(capsys, "--topology", "tpu7x:2x2x1")
    assert "libtpu 0.0.42.1, the compiler for TPUs that is installed here, crashes on tpu7x" in said


def test_without_the_compiler_the_command_that_installs_it_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    said = refused(capsys, "--topology", "v5e:2x2")
    assert said.endswith("with: pip install 'flax-transformers[plan]'")


def test_hlo_and_search_exclude_each_other(capsys, tmp_path):
    said = refused(capsys, "--topology", "cpu:8", "--search", "--hlo", str(tmp_path / "x"))
    assert "--hlo writes one program and --search compiles many" in said


@pytest.mark.parametrize("shape", ["8x64", "8x0x8", "many"])
def test_what_is_no_shape_of_prompts_is_refused(capsys, shape):
    said = refused(capsys, "--topology", "cpu:8", "--decode", shape)
    assert f"--decode {shape} is not three numbers from 1, as in 8x1024x128" in said


def test_without_the_compiler_for_gpus_the_command_that_installs_it_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "jax_cuda" in name else find(name)
    )
    said = refused(capsys, "--topology", "h100:8")
    assert "the compiler for NVIDIA GPUs, which needs no GPU, is not installed" in said
    assert "pip install jax-cuda12-plugin jax-cuda12-pjrt" in said


def test_settings_of_a_search_are_those_that_make_the_config_the_plan():
    config = tiny_config("text.txt", "store", steps=2)
    config = replace(config, mesh=MeshConfig(data=1, tensor=8))
    config = replace(config, phases=(replace(config.phases[0], micro_batches=2),))
    found = SimpleNamespace(mesh={"data": 2, "fsdp": 4}, remat="none", micro_batches=1)
    shown = settings(config, 0, found)
    assert shown == (
        "--mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 --compute.remat none "
        "--phases.0.micro-batches 1"
    )
    again = override(config, shown.split())
    assert again.mesh == MeshConfig(data=2, fsdp=4) and again.phases[0].micro_batches == 1


def test_the_model_of_init_from_is_planned(tmp_path, capsys):
    config = tiny_config("text.txt", "store", steps=2, model=tiny_bert())
    model, params = drawn_model("BertForMaskedLM", num_layers=3)
    ft.save_pretrained(tmp_path / "hf", model, params)
    found = _with_initial_model(replace(config, init_from=str(tmp_path / "hf")), ())
    assert found.model.num_layers == 3 != config.model.num_layers
    absent = replace(config, init_from=str(tmp_path / "absent"))
    assert _with_initial_model(absent, ()).model == config.model
    assert "the model of the config is planned: there is no" in capsys.readouterr().err


def test_a_plan_may_be_written_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(Path("~/plan.json"), {"fits": True})
    assert json.loads((tmp_path / "plan.json").read_text()) == {"fits": True}


def test_a_figure_that_is_not_finite_is_null_in_the_file(tmp_path):
    write_json(tmp_path / "plan.json", [{"share": float("nan")}])
    assert json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail) == [
        {"share": None}
    ]
