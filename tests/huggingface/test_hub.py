"""Directories in Hugging Face format, on a tiny BERT: out and in again, and whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.data.tokenizers.layouts import VOCABULARY_FILES
from flax_transformers.errors import UserError
from flax_transformers.huggingface import write as hub_write
from flax_transformers.huggingface.family import build_model, family_of_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.storage.locks import process_tag
from tests.families.tiny_bert import (
    assert_same,
    change_json,
    change_tensors,
    make_model,
    without,
)
from tests.huggingface.tensors import drawn_model


@pytest.fixture
def saved(tmp_path):
    """A directory that a BertForMaskedLM was saved to."""
    save_pretrained(tmp_path / "saved", *make_model())
    return tmp_path / "saved"


@pytest.fixture
def sharded(tmp_path):
    """The same in three shards."""
    save_pretrained(tmp_path / "sharded", *make_model(), max_shard_bytes=3000)
    return tmp_path / "sharded"


@pytest.mark.slow
def test_what_is_saved_is_loaded_bit_equal(saved):
    model, params = make_model()
    loaded, back = load_pretrained(saved)
    assert loaded.config == model.config
    assert_same(back, params)


def test_a_directory_is_what_transformers_expects(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["model_type"] == "bert" and config["dtype"] == "float32"
    header = (saved / "model.safetensors").read_bytes()[8:]
    metadata = json.JSONDecoder().raw_decode(header.decode("latin-1"))[0]["__metadata__"]
    assert metadata["format"] == "pt" and len(metadata["sha256"]) == 64
    tensors = load_file(saved / "model.safetensors")
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (37, 8)
    assert "cls.predictions.decoder.weight" not in tensors  # tied


def test_large_models_are_written_in_shards_with_an_index(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = {shard: load_file(sharded / shard) for shard in shards}
    assert index["weight_map"] == {name: s for s, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensors in held.values() for tensor in tensors.values()
    )
    assert index["metadata"]["total_parameters"] * 4 == index["metadata"]["total_size"]
    assert_same(load_pretrained(sharded)[1], make_model()[1])


def test_the_published_number_of_parameters_leaves_padding_out(saved):
    tensors = load_file(saved / "model.safetensors")
    assert hub_write.published_parameters(make_model()[0]) == sum(t.size for t in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_saved_and_read_bit_equal(tmp_path, dtype):
    model, params = make_model()
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_pretrained(tmp_path / "half", model, half)
    assert_same(load_pretrained(tmp_path / "half", dtype=dtype)[1], half)
    as_float = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    assert_same(load_pretrained(tmp_path / "half")[1], as_float)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == jnp.dtype(dtype).name


def test_what_a_killed_save_left_behind_is_gone_after_the_next(tmp_path):
    here, gone = process_tag().partition("-")[2], 2**31 - 1
    kept = {f".saved.1-{here}.tmp", f".saved.{gone}-elsewhere.tmp", ".saved.other"}
    for name in (*kept, f".saved.{gone}-{here}.tmp"):
        (tmp_path / name).mkdir()
    save_pretrained(tmp_path / "saved", *make_model())
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "saved"}


def test_tensors_of_mixed_types_begin_at_multiples_of_their_size(tmp_path):
    model, params = make_model(architecture="BertForPreTraining")
    params["mlm_head"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["mlm_head"])
    save_pretrained(tmp_path / "mixed", model, params)
    raw = (tmp_path / "mixed" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16"}
    widths = {"F32": 4, "BF16": 2}
    assert not any((8 + size + e["data_offsets"][0]) % widths[e["dtype"]] for e in header.values())
    assert set(load_file(tmp_path / "mixed" / "model.safetensors")) == set(header)


@pytest.mark.parametrize(("value", "dtype"), [(3e38, jnp.float16), (jnp.nan, jnp.float32)])
def test_a_tensor_that_would_not_be_finite_is_named_and_nothing_is_written(tmp_path, value, dtype):
    model, params = make_model()
    params["words"]["embedding"] = params["words"]["embedding"].at[3, 2].set(value)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with pytest.raises(UserError, match=r"bert.embeddings.word_embeddings.weight has values that"):
        save_pretrained(tmp_path / "half", model, params)
    assert not (tmp_path / "half").exists()


@pytest.mark.slow
def test_files_of_bare_models_have_no_prefix_and_are_read_by_other_architectures(tmp_path):
    model, params = make_model(architecture="BertModel")
    save_pretrained(tmp_path / "bare", model, params)
    names = load_file(tmp_path / "bare" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in names
    assert not any(name.startswith("bert.") for name in names)
    assert_same(load_pretrained(tmp_path / "bare")[1], params)
    _, other = load_pretrained(tmp_path / "bare", architecture="BertForMaskedLM")
    assert_same(without(other, "mlm_head"), without(params, "pooler"))


@pytest.mark.slow
def test_another_head_is_started_anew_and_named(saved, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_transformers"):
        model, params = load_pretrained(
            saved, architecture="BertForSequenceClassification", num_labels=5
        )
    assert model.config.num_labels == 5
    assert params["classification_head"]["bias"].shape == (5,)
    assert "holds no weights for classification_head, pooler: newly initialised" in caplog.text
    assert_same(
        without(params, "classification_head", "pooler"), without(make_model()[1], "mlm_head")
    )
    again = load_pretrained(saved, architecture="BertForSequenceClassification", num_labels=5)[1]
    assert_same(params, again)


@pytest.mark.slow
def test_another_number_of_labels_renews_the_classifier_alone(tmp_path, caplog):
    model, params = make_model(architecture="BertForSequenceClassification", num_labels=3)
    save_pretrained(tmp_path / "three", model, params)
    same = load_pretrained(tmp_path / "three", num_labels=3)[1]
    assert_same(same, params)
    assert not caplog.text
    other = load_pretrained(tmp_path / "three", num_labels=4)[1]
    assert other["classification_head"]["bias"].shape == (4,)
    assert_same(without(other, "classification_head"), without(params, "classification_head"))


@pytest.mark.slow
def test_parameters_go_straight_onto_a_mesh(saved):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = load_pretrained(saved, mesh=mesh)
    assert_same(jax.device_get(params), jax.device_get(make_model()[1]))
    leaves = flatten_dict(params, sep="/").items()
    kernel = next(leaf for path, leaf in leaves if path.endswith("mlp/up/kernel"))
    assert kernel.addressable_shards[0].data.shape == (2, 4, 6)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_fresh_heads_go_onto_the_mesh_too(saved):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    _, params = load_pretrained(saved, architecture="BertForTokenClassification", mesh=mesh)
    assert params["classification_head"]["kernel"].sharding.mesh == mesh


@pytest.mark.slow
def test_what_lies_on_a_mesh_is_saved(tmp_path, saved):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    save_pretrained(tmp_path / "again", *load_pretrained(saved, mesh=mesh))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_tokenizer_files_are_carried_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "pytorch_model.bin").write_text("no")
    save_pretrained(tmp_path / "saved", *make_model(), tokenizer_from=source)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


def test_every_vocabulary_and_named_chat_templates_are_carried_along(tmp_path):
    source, names = tmp_path / "source", {*VOCABULARY_FILES, "additional_chat_templates/rag.jinja"}
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in names:
        (source / name).write_text("{}")
    saved = tmp_path / "saved"
    save_pretrained(saved, *drawn_model("BertForMaskedLM"), tokenizer_from=source)
    assert names <= {file.relative_to(saved).as_posix() for file in saved.rglob("*.*")}


def test_a_directory_with_files_is_not_written_to(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(UserError, match=r"saved already holds files"):
        save_pretrained(saved, *make_model())
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_write.tensor_files, "write_file", full)
    with pytest.raises(UserError, match=r"out cannot be written \(No space left on device\)"):
        save_pretrained(tmp_path / "out", *make_model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_parameters_of_another_model_are_not_saved(tmp_path):
    _, params = make_model(hidden_size=16)
    with pytest.raises(UserError, match=r"params has embeddings/norm/bias as \(16,\), but the"):
        save_pretrained(tmp_path / "out", make_model()[0], params)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HOME"])
def test_a_hugging_face_id_is_found_in_the_local_cache(tmp_path, saved, monkeypatch, variable):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    cache = {"HOME": "home/.cache/huggingface/hub", "HF_HOME": "home/hub", "HF_HUB_CACHE": "home"}
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    entry = tmp_path / cache[variable] / "models--some--bert"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("abc")
    (entry / "snapshots").mkdir()
    saved.rename(entry / "snapshots" / "abc")
    assert_same(load_pretrained("some/bert")[1], make_model()[1])
    with pytest.raises(UserError, match=r"no directory some/other, and no model of that name"):
        load_pretrained("some/other")


def as_published(tensors):
    """The layout of bert-base-uncased: TensorFlow's names, unused heads, an old buffer, copies."""
    named = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    return named | {
        "bert.embeddings.position_ids": np.arange(16)[None],
        "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
        "bert.pooler.dense.bias": np.ones(8, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 8), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].copy(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
    }


@pytest.mark.slow
def test_a_published_layout_is_read_and_a_fresh_one_written(saved, tmp_path):
    before = load_file(saved / "model.safetensors")
    assert len(before) == 5 + 2 * 16 + 5
    change_tensors(saved, as_published)
    model, params = load_pretrained(saved)
    assert_same(params, make_model()[1])
    save_pretrained(tmp_path / "again", model, params)
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    assert_same(after, before)


@pytest.mark.slow
def test_heads_in_a_published_layout_serve_the_architecture_that_has_them(saved, caplog):
    change_tensors(saved, as_published)
    _, params = load_pretrained(saved, architecture="BertForPreTraining")
    assert params["pooler"]["dense"]["kernel"].sum() == 64
    assert params["next_sentence_head"]["bias"].tolist() == [1, 1]
    assert not caplog.text


def test_half_a_head_in_the_file_is_not_made_up_for(saved):
    weight = np.ones((2, 8), np.float32)
    change_tensors(saved, lambda tensors: tensors | {"classifier.weight": weight})
    with pytest.raises(UserError, match=r"missing from the file: classifier.bias"):
        load_pretrained(saved, architecture="BertForSequenceClassification")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("GPT2LMHeadModel", {"scale_embeddings": True}),
        ("LlamaForCausalLM", {"norm": "layer"}),
        ("BertForMaskedLM", {"causal": True}),
        ("BertForMaskedLM", {"norm_position": "pre"}),
        ("ViTForImageClassification", {"pooling": "average"}),
        ("ViTModel", {"pooling": "average"}),
        ("ViTForImageClassification", {"positions": "sincos_2d"}),
    ],
)
def test_a_model_that_the_original_cannot_be_is_not_written(tmp_path, architecture, changes):
    published = {"architectures": [architecture]}
    config = family_of_json(published).from_huggingface(published)
    small = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    model = build_model(dataclasses.replace(config, **small, **changes), ComputeConfig())
    (field,) = changes
    with pytest.raises(UserError, match=f"model.{field} is .* in Hugging Face format cannot be"):
        save_pretrained(tmp_path / "out", model, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "BertForMaskedLM"])
def test_a_config_of_2019_is_read_as_what_the_caller_says(saved, asked):
    change_json(saved / "config.json", architectures=None, model_type=None)
    if asked is None:
        with pytest.raises(UserError, match=r'saved: config.json has neither "architectures" nor'):
            load_pretrained(saved)
    else:
        assert_same(load_pretrained(saved, architecture=asked)[1], make_model()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "lost", "group"),
    [
        ("BertModel", "pooler.", "pooler"),
        ("BertForPreTraining", "cls.seq_relationship.", "next_sentence_head"),
        ("BertForMaskedLM", "cls.", "mlm_head"),
        ("BertForSequenceClassification", "classifier.", "classification_head"),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_a_head_that_the_file_lacks_is_initialised_and_named(
    tmp_path, caplog, architecture, lost, group, asked
):
    model, params = make_model(architecture=architecture)
    save_pretrained(tmp_path / "saved", model, params)
    change_tensors(
        tmp_path / "saved",
        lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(lost)},
    )
    loaded, back = load_pretrained(tmp_path / "saved", architecture=architecture if asked else None)
    assert f"holds no weights for {group}: newly initialised" in caplog.text
    assert loaded.config == model.config and back.keys() == params.keys()
    assert_same(without(back, group), without(params, group))


@pytest.mark.slow
def test_the_table_of_a_decoders_logits_is_no_head_to_make_up_for(tmp_path, caplog):
    model, params = drawn_model("LlamaForCausalLM")
    save_pretrained(tmp_path / "saved", model, params)
    change_tensors(tmp_path / "saved", lambda tensors: without(tensors, "lm_head.weight"))
    with pytest.raises(UserError, match=r"missing from the file: lm_head.weight"):
        load_pretrained(tmp_path / "saved")
    back = load_pretrained(tmp_path / "saved", architecture="LlamaForCausalLM")[1]
    assert_same(without(back, "lm_head"), without(params, "lm_head"))
    assert "no weights for lm_head: newly initialised" in caplog.text


@pytest.mark.slow
def test_heads_that_the_model_does_not_have_are_left_out_and_named(saved, caplog):
    more = {"classifier.weight": np.ones((3, 8), np.float32), "classifier.bias": np.ones(3)}
    change_tensors(saved, lambda tensors: tensors | more)
    with caplog.at_level(logging.INFO, logger="flax_transformers"):
        assert_same(load_pretrained(saved)[1], make_model()[1])
    assert "BertForMaskedLM has no use for classifier in the file: left out" in caplog.text


@pytest.mark.slow
def test_an_architecture_that_is_not_here_is_read_as_another_of_its_family(saved, caplog):
    change_json(saved / "config.json", architectures=["BertForRelations"])
    scores = {"classifier.weight": np.ones((1, 8), np.float32), "classifier.bias": np.ones(1)}
    change_tensors(saved, lambda tensors: tensors | scores | {"router.bias": np.ones(1)})
    with pytest.raises(UserError, match="as another bert model, give architecture="):
        load_pretrained(saved)
    with caplog.at_level(logging.INFO, logger="flax_transformers"):
        _, params = load_pretrained(saved, architecture="BertForSequenceClassification")
    assert params["classification_head"]["bias"].shape == (2,)
    assert "no weights for classification_head, pooler: newly initialised" in caplog.text
    assert (
        "no use for cls.predictions, cls.predictions.transform.LayerNorm, "
        "cls.predictions.transform.dense, router in the file: left out" in caplog.text
    )
    body = without(params, "classification_head", "pooler")
    assert_same(body, without(make_model()[1], "mlm_head"))
