"""Configs as JSON, and which of two runs is which."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flax_transformers.cli.config_file import load_config
from flax_transformers.config_json import from_json, to_json
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.models.config import Rope
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.testing import tiny_bert, tiny_config
from flax_transformers.training.config import Phase, check_resumable, differences

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
SAVED = to_json(tiny_config("text.txt", "store"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_reads_back_from_json(path):
    config = load_config(str(path), ())
    text = json.dumps(to_json(config), allow_nan=False)
    assert from_json(json.loads(text)) == config


def test_every_section_names_its_type():
    model = to_json(tiny_bert())
    assert model["type"] == "bert"
    assert model["hidden_size"] == 32
    assert to_json((Phase(1, 2, 3),))[0]["type"] == "phase"


def refused(saved):
    with pytest.raises(UserError) as caught:
        from_json(saved)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "flax_transformers_evil.Config",
        "flax_transformers.testing.write_corpus",  # ours, but no config
        "flax_transformers.data.store.token_store.np.save",
        "flax_transformers.errors.UserError",
        "flax_transformers.families.no_such_family.Config",
        "flax_transformers.families.bert.NoSuchConfig",
        "no_such_id",
        ":",
        "module:",
        "",
        None,
    ],
)
def test_a_type_that_is_no_config_of_this_package_is_refused(kind, tmp_path):
    said = refused({"type": kind, "path": str(tmp_path / "made")})
    assert f"the saved config names {kind!r}, which this version of flax_transformers" in said
    assert not list(tmp_path.iterdir())


def test_other_code_is_not_even_imported(tmp_path, monkeypatch):
    made = tmp_path / "made"
    (tmp_path / "other_code.py").write_text(f"open({str(made)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    refused({"type": "other_code.Config"})
    assert not made.exists()


def test_a_dict_without_a_type_is_refused():
    assert "the saved config names None" in refused({"hidden_size": 3})


def test_a_field_that_this_version_lacks_is_refused_by_name():
    said = refused(SAVED | {"model": SAVED["model"] | {"rotary": True}})
    assert "BertConfig" in said and "'rotary'" in said and "use the version that wrote it" in said


def test_a_field_that_is_missing_takes_its_default():
    older = {key: value for key, value in SAVED.items() if key != "seed"}
    assert from_json(older) == from_json(SAVED)


def test_differences_are_named_by_their_path():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": [1], "f": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": "y"}, "e": [1, 2], "f": {"g": 0}, "h": 5}
    assert differences(old, new) == {
        "b.c.1": (2, 3),
        "b.d": ("x", "y"),
        "e": ([1], [1, 2]),
        "f": (None, {"g": 0}),
        "h": (None, 5),
    }
    assert differences(old, old) == {}


def check(**changes):
    return check_resumable(SAVED, tiny_config("text.txt", "store", **changes), "the checkpoint")


def test_a_field_that_is_newer_than_the_checkpoint_has_its_default():
    older = json.loads(json.dumps(SAVED))
    del older["data"]["filters"], older["logging"]["hang_dump_s"], older["limits"]
    assert check_resumable(older, from_json(SAVED), "here") == []


def test_the_path_of_the_same_data_may_be_spelt_otherwise():
    config = from_json(SAVED)
    data = dataclasses.replace(config.data, source=TextSource("./text.txt"))
    changed = check_resumable(SAVED, dataclasses.replace(config, data=data), "here")
    assert changed == ["data.source.path 'text.txt' -> './text.txt'"]


def test_the_fields_that_a_config_json_had_beside_the_model_may_change():
    first = dataclasses.replace(from_json(SAVED["model"]), hub_fields=(("seq_length", "1"),))
    saved = to_json(tiny_config("text.txt", "store", model=first))
    for value in ((), (("seq_length", "2"),)):
        model = dataclasses.replace(first, hub_fields=value)
        config = tiny_config("text.txt", "store", model=model)
        assert len(check_resumable(saved, config, "here")) == 1


def test_an_unchanged_run_goes_on_without_a_word():
    assert check() == []
    assert check_resumable(json.loads(json.dumps(SAVED)), from_json(SAVED), "here") == []


def test_what_may_change_in_a_run_is_told_line_by_line():
    config = from_json(SAVED)
    data = dataclasses.replace(config.data, store="other", workers=2, prepare_processes=None)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
    assert check(data=data, optimizer=optimizer, mesh=MeshConfig(1, -1, 2), micro_batches=2) == [
        "data.prepare_processes 1 -> None",
        "data.store 'store' -> 'other'",
        "data.workers 0 -> 2",
        "mesh.data -1 -> 1",
        "mesh.fsdp 1 -> -1",
        "mesh.tensor 1 -> 2",
        "optimizer.learning_rate 0.01 -> 0.5",
        "phases.0.micro_batches 1 -> 2",
    ]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.num_heads 4 -> 8", {"model": tiny_bert(num_heads=8)}),
        ("seed 0 -> 7", {"seed": 7}),
        (
            "objective.mask_fraction 0.15 -> 0.3",
            {"objective": dataclasses.replace(from_json(SAVED["objective"]), mask_fraction=0.3)},
        ),
        (
            f"data.validation_fraction {SAVED['data']['validation_fraction']} -> 0.4",
            {"data": dataclasses.replace(from_json(SAVED["data"]), validation_fraction=0.4)},
        ),
    ],
    ids=["model", "seed", "objective", "data"],
)
def test_another_run_is_refused_by_what_makes_it_another(field, changes):
    with pytest.raises(UserError) as caught:
        check(optimizer=AdamW(), **changes)
    assert str(caught.value) == (
        f"the checkpoint belongs to another run ({field}); nothing was changed: choose another "
        "--workdir, or the config it was started with"
    )


def test_of_many_differences_three_are_named():
    model = tiny_bert(hidden_size=64, num_heads=8, num_layers=4, dropout=0.0)
    with pytest.raises(UserError) as caught:
        check(model=model)
    shown = "model.dropout 0.1 -> 0.0; model.hidden_size 32 -> 64; model.num_heads 4 -> 8 ...)"
    assert shown in str(caught.value)


def test_phases_follow_one_another():
    phases = (Phase(90, 32, 16), Phase(10, 64, 8))
    config = dataclasses.replace(from_json(SAVED), phases=phases)
    assert config.total_steps == 100


@pytest.mark.parametrize("name", ["steps", "sequence_length", "batch_size", "micro_batches"])
def test_a_phase_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"phases.{name} is 0; it must be at least 1"):
        Phase(**({"steps": 1, "sequence_length": 8, "batch_size": 1} | {name: 0}))


def test_a_config_of_format_1_that_cannot_be_read_is_not_compared_as_it_is():
    config = tiny_config("text.txt", "store")
    saved = to_json(config)
    del saved["format"]
    saved["objective"] = {"type": "my_module.MyObjective"}
    with pytest.raises(UserError, match="names 'my_module.MyObjective', which this version"):
        check_resumable(saved, config, "the checkpoint")


def test_a_run_without_phases_is_refused():
    with pytest.raises(ValueError, match="phases is empty"):
        tiny_config("text.txt", "store", phases=())


def test_rows_longer_than_the_model_takes_are_refused():
    with pytest.raises(
        ValueError, match="a phase has sequence_length 65, but model.max_positions allows 64;"
    ):
        tiny_config("text.txt", "store", phases=(Phase(1, 32, 8), Phase(1, 65, 8)))


def test_rows_may_be_as_long_as_scaled_positions_allow():
    rope = Rope(scaling="yarn", factor=4.0, original_max_positions=16)
    model = LlamaConfig(max_positions=16, rope=rope)
    config = dataclasses.replace(
        tiny_config("text.txt", "store"), model=model, phases=(Phase(1, 64, 8),)
    )
    with pytest.raises(UserError, match="sequence_length 64, but model.max_positions allows 16"):
        dataclasses.replace(config, model=dataclasses.replace(model, rope=Rope()))


def test_a_model_too_short_for_a_phase_is_a_mistake_of_the_user_wherever_it_is_put():
    with pytest.raises(UserError, match="sequence_length 32, but model.max_positions allows 16;"):
        dataclasses.replace(
            tiny_config("text.txt", "store"),
            model=dataclasses.replace(tiny_bert(), max_positions=16),
        )
