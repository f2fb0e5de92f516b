"""Folders of other kinds that are given as a model: read, or named with what to do about it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import config_json
from flax_transformers.huggingface.folder_kinds import inner_folder
from flax_transformers.huggingface.read import find_directory
from flax_transformers.pretrained import initial_model
from tests.families.tiny_bert import CONFIG, assert_same, change_json, make_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A directory that a BertForMaskedLM was saved to."""
    save_pretrained(tmp_path / "saved", *make_model())
    return tmp_path / "saved"


def refusal(directory):
    with pytest.raises(UserError) as raised:
        load_pretrained(directory)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 700
    return said


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_is_named_with_the_command_that_merges_it(saved, config, weights):
    (saved / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8})
    )
    if not config:
        (saved / "config.json").unlink()
    if not weights:
        (saved / WEIGHTS).unlink()
    (saved / "adapter_model.safetensors").write_bytes(b"")
    said = refusal(saved)
    assert f"{saved} holds an adapter (LORA) {'beside' if weights else 'and not'} the " in said
    assert ("or remove the adapter_* files" in said) is weights and "some/base" in said
    assert f"from_pretrained('{saved}').merge_and_unload().save_pretrained(" in said


def test_an_adapter_without_its_weights_does_not_hide_those_of_the_model(saved):
    (saved / "adapter_config.json").write_text("{}")
    (saved / WEIGHTS).rename(saved / "model.fp16.safetensors")
    assert "rename model.fp16.safetensors to model.safetensors" in refusal(saved)
    (saved / "model.fp16.safetensors").unlink()
    said = refusal(saved)
    assert "holds an adapter (PEFT) and not the weights" in said
    assert "(set its base, which adapter_config.json does not name, as base_model_name_or" in said


@pytest.mark.parametrize(
    ("described", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"group_size": 128}, "method not named"),
    ],
)
def test_quantised_weights_are_named_with_their_method(saved, described, method):
    change_json(saved / "config.json", quantization_config=described)
    assert f"holds quantised weights ({method}, by quantization_config of" in refusal(saved)


def test_quantised_weights_of_autogptq_say_so_in_a_file_of_their_own(saved):
    (saved / "quantize_config.json").write_text('{"bits": 4}')
    assert "quantised weights (method not named, by quantize_config.json)" in refusal(saved)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.fp16.safetensors", "variant 'fp16' alone; rename model.fp16.safetensors to model."),
        ("model.bf16-00001-of-00002.safetensors", "variant 'bf16' alone; rename model.bf16-00001-"),
        ("model-00001-of-00002.fp16.safetensors", "variant 'fp16' alone; rename model-00001-of-00"),
        ("model-00002-of-00003.safetensors", "holds 1 of 3 shards but no model.safetensors.index"),
        ("bert.safetensors", "but bert.safetensors; rename it to model.safetensors if"),
        ("pytorch_model.bin", "is a pickle, which can run any code and is never read; write model"),
        ("pytorch_model-00001-of-00002.bin", "is a pickle, which can run any code"),
        ("tf_model.h5", "is of TensorFlow; write model.safetensors with transformers 4 by"),
        ("checkpoint.pt", "checkpoint.pt is a pickle, which can run any code and is never read"),
        ("epoch=3.ckpt", "epoch=3.ckpt is a pickle"),
        ("model.Q4_K_M.gguf", "is a GGUF file of llama.cpp"),
        ("model.onnx", "holds model.onnx alone, a program and no weights to train"),
        ("training_args.bin", "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_other_files_of_weights_are_named_with_what_to_do(saved, file, said):
    (saved / WEIGHTS).rename(saved / file)
    assert said in refusal(saved)


def test_the_command_that_converts_a_pickle_names_class_and_folder(saved):
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    assert (
        'python -c "from transformers import BertForMaskedLM as M; '
        f"M.from_pretrained('{saved}').save_pretrained('safetensors')\"" in refusal(saved)
    )


def test_the_snapshots_of_a_repository_in_the_cache_are_named(saved, tmp_path):
    repository = tmp_path / "models--x--y"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(saved, snapshot)
    assert refusal(repository).endswith(f"in the hub's cache; give a snapshot in it: {snapshot}")


def test_a_subfolder_with_the_model_is_named(saved, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    saved.rename(outer / "checkpoint-500")
    assert f"{outer / 'config.json'} is missing; give the subfolder" in refusal(outer)
    assert refusal(outer).endswith(": checkpoint-500")
    (outer / "config.json").write_text('{"model_type": "bert"}')
    assert refusal(outer).endswith("give the subfolder that the weights are in: checkpoint-500")


def test_a_diffusers_pipeline_is_named_with_its_models(saved, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "model_index.json").write_text("{}")
    saved.rename(outer / "text_encoder")
    assert refusal(outer) == (
        f"{outer} is a diffusers pipeline; give the folder of one of its models: text_encoder"
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("params.json", "params.json is of Meta's or Mistral's own release"),
        ("bert_model.ckpt.index", "the weights are a TensorFlow checkpoint"),
        ("deit_3_base_224.pth", "deit_3_base_224.pth is a pickle"),
        ("model.safetensors", "is missing; copy the config.json of these weights to it"),
    ],
)
def test_layouts_without_config_json_are_named(tmp_path, file, said):
    (tmp_path / file).write_bytes(b"")
    assert said in refusal(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_the_folder_of_the_transformer_in_a_sentence_transformers_folder_is_read(
    saved, tmp_path, listed
):
    outer = tmp_path / "outer"
    outer.mkdir()
    if listed:
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        modules = [
            {"idx": i, "path": path or "0_Encoder", "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        (outer / "modules.json").write_text(json.dumps(modules))
        (outer / "1_Pooling").mkdir()
        (outer / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    inner = outer / ("0_Encoder" if listed else "0_Transformer")
    saved.rename(inner)
    assert find_directory(outer) == outer and inner_folder(outer) == inner
    assert_same(load_pretrained(outer)[1], make_model()[1])


@pytest.mark.parametrize("name", ["0_Transformer", "0_Encoder"])
def test_the_pooling_beside_an_inner_transformer_is_read(tmp_path, name):
    inner, pooling = tmp_path / name, tmp_path / "1_Pooling"
    inner.mkdir()
    pooling.mkdir()
    described = config_json(replace(CONFIG, architecture="BertModel"))
    (inner / "config.json").write_text(json.dumps(described))
    (inner / WEIGHTS).write_bytes(b"")
    (pooling / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = {name: "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"a.{kind}"} for path, kind in kinds.items()])
    )
    found = initial_model(tmp_path, replace(CONFIG, architecture="BertModel"))
    assert (found.pooling, found.normalize_embeddings) == ("mean", True)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_pointer_of_git_lfs_is_named(saved, file):
    (saved / file).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438\n"
    )
    assert f"{saved / file} is a pointer of git-lfs" in refusal(saved)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_what_is_no_regular_file_is_named_and_not_waited_for(saved, file):
    (saved / file).unlink()
    os.mkfifo(saved / file)
    assert f"{saved / file} is no regular file" in refusal(saved)
    (saved / file).unlink()
    (saved / file).mkdir()
    assert f"{saved / file} is no regular file" in refusal(saved)
    (saved / file).rmdir()
    (saved / file).symlink_to(saved / file)
    assert f"{saved / file} cannot be read (Too many levels of symbolic links)" in refusal(saved)
    (saved / file).unlink()
    (saved / file).symlink_to(saved / "nothing")
    assert f"{saved / file} is missing (a link to nothing)" in refusal(saved)


def test_a_file_in_the_place_of_a_folder_is_named(saved):
    with pytest.raises(UserError, match=r"model.safetensors is a file; give the folder"):
        load_pretrained(saved / WEIGHTS)


def test_a_byte_order_mark_is_read_over_and_another_encoding_named(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text("\ufeff" + text, "utf-8")
    load_pretrained(saved)
    (saved / "config.json").write_text(text, "utf-16")
    assert "config.json cannot be read ('utf-8' codec can't decode" in refusal(saved)


def test_all_shards_that_are_missing_are_counted(tmp_path):
    save_pretrained(tmp_path / "sharded", *make_model(), max_shard_bytes=3000)
    for number in (1, 3):
        (tmp_path / "sharded" / f"model-0000{number}-of-00003.safetensors").unlink()
    assert "the shard 'model-00001-of-00003.safetensors' and 1 more, of 3, which is not" in refusal(
        tmp_path / "sharded"
    )
