"""Models and data by the ids of a hub, which is a server of this test; uploads to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.convert import Convert
from flax_transformers.cli.main import main
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import find_tokenizer, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import all_families
from flax_transformers.huggingface.read import find_directory
from flax_transformers.model_card import hub_task
from flax_transformers.storage.hub import Repository, find_data
from flax_transformers.testing import (
    assert_bit_equal,
    tiny_bert,
    tiny_config,
    write_corpus,
)
from tests.huggingface import hub_server
from tests.huggingface.tensors import drawn_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client is connected with, and an empty cache."""
    with hub_server.running() as running:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", running.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_TELEMETRY", True),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield running


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    model, params = drawn_model("BertForMaskedLM", vocab_size=262)
    ft.save_pretrained(folder, model, params, tokenizer=ByteTokenizer())
    return folder, ft.load_pretrained(folder)[1]


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpt2", ("gpt2", "main")),
        ("google-bert/bert-base-cased@v1.0", ("google-bert/bert-base-cased", "v1.0")),
        ("org/model@refs/pr/1", ("org/model", "refs/pr/1")),
        ("/absolute/folder", None),
        ("a/b/c", None),
        ("data/vocab.txt", None),
        ("here/bert", None),
        ("here/bert@main", ("here/bert", "main")),
        ("../up", None),
        ("folder/", None),
        ("org/model@", None),
        ("gs://bucket", None),
        ("", None),
    ],
)
def test_an_id_has_an_owner_a_name_and_a_revision(text, found, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    repository = Repository.of_id(text)
    assert (repository and (repository.name, repository.revision)) == found


def test_a_process_that_has_imported_no_part_of_the_client_downloads(tmp_path):
    program = (
        "from flax_transformers.storage.hub import Repository\n"
        "print(Repository('some/bert', 'main').download(list))\n"
    )
    with hub_server.running() as running:
        running.repositories["models/some/bert"] = {"config.json": b"{}"}
        environment = {"HF_ENDPOINT": running.url, "HF_HUB_CACHE": str(tmp_path)}
        found = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environment | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert found.returncode == 0, found.stderr
    assert (Path(found.stdout.strip()) / "config.json").read_bytes() == b"{}"


@pytest.mark.slow
def test_an_id_is_downloaded_once_and_then_taken_from_the_cache(hub, saved, monkeypatch):
    folder, params = saved
    unread = {"pytorch_model.bin": b"pickle", "flax_model.msgpack": b"old", "onnx/model.onnx": b""}
    hub.repositories["models/some/bert"] = files_of(folder) | unread
    for name, wanted in (("some/bert", "model.safetensors"), ("some/bert@v1", "revision/v1")):
        hub.requests.clear()
        assert_bit_equal(ft.load_pretrained(name)[1], params)
        assert any(wanted in asked for asked in hub.requests)
        assert not any(file in asked for asked in hub.requests for file in unread)
        hub.requests.clear()
        assert ft.load_tokenizer(name).decode([104, 105]) == "ef"
        assert hub.requests == []
    hub.requests.clear()
    hub.repositories["models/some/other"] = files_of(folder)
    assert load_tokenizer("some/other").decode([104, 105]) == "ef"
    assert not any("model.safetensors" in asked for asked in hub.requests)
    assert_bit_equal(ft.load_pretrained("some/other")[1], params)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_bit_equal(ft.load_pretrained("some/bert")[1], params)
    with pytest.raises(UserError, match="no directory some/third, and no model of that name"):
        ft.load_pretrained("some/third")


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_sentence(hub, saved):
    with pytest.raises(UserError, match="no directory runs/tpyo, and no model of that name"):
        ft.load_pretrained("runs/tpyo")
    hub.repositories["models/some/bert"] = files_of(saved[0])
    with pytest.raises(
        UserError, match="no folder some/bert here, and some/bert at revision v9 is"
    ):
        ft.load_pretrained("some/bert@v9")


@pytest.mark.slow
def test_a_folder_is_uploaded_with_a_card_and_read_again(hub, saved):
    folder, params = saved
    assert ft.push_to_hub(folder, "me/tiny", private=True) == f"{hub.url}/me/tiny"
    uploaded = hub.repositories["models/me/tiny"]
    assert uploaded.keys() == {*files_of(folder), "README.md"} and hub.private["me/tiny"]
    assert not (folder / "README.md").exists()
    card = uploaded["README.md"].decode()
    assert "library_name: transformers" in card and "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card and "## Training" not in card
    assert_bit_equal(ft.load_pretrained("me/tiny")[1], params)
    with pytest.raises(UserError, match="'tiny' is no name of a repository"):
        ft.push_to_hub(folder, "tiny")


@pytest.mark.slow
def test_a_run_is_converted_and_uploaded_with_its_recipe_and_scores(
    hub, tmp_path, capsys, one_device, compiled_once
):
    write_corpus(tmp_path / "text.txt")
    config = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=5, model=tiny_bert())
    ft.train(config, workdir=tmp_path / "run")
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main([*command, "--push-to-hub", "me/run"]) == 0
    assert f"uploaded to   {hub.url}/me/run" in capsys.readouterr().out
    uploaded = hub.repositories["models/me/run"]
    assert uploaded == files_of(tmp_path / "out")
    card = uploaded["README.md"].decode()
    assert "| objective | `masked_lm`" in card and "| data | `text.txt` |" in card
    assert "5 steps x 16 x 32 tokens" in card and "| step | 5 |" in card
    assert str(tmp_path) not in card
    model, params = ft.load_pretrained("me/run")
    ours = ft.load_pretrained(tmp_path / "run")[1]
    size = model.config.vocab_size
    found, wanted = (np.asarray(tree["words"]["embedding"])[:size] for tree in (params, ours))
    assert_bit_equal(found, wanted)
    assert main(["convert", "me/run", str(tmp_path / "back"), "--push-to-hub", "me/x"]) == 2


def cache_of(tmp_path, entry, names):
    """An interrupted download: files of these names in a snapshot of the cache."""
    entry = tmp_path / "cache" / entry
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(hub_server.COMMIT)
    for name in names:
        file = entry / "snapshots" / hub_server.COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return entry / "snapshots" / hub_server.COMMIT


INDEX = json.dumps(
    {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
)
SHARDED = {
    "config.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-1-of-2.safetensors": b"1",
    "model-2-of-2.safetensors": b"2",
}


@pytest.mark.parametrize("there", [["model-1-of-2.safetensors"], ["config.json"], []])
def test_a_download_that_was_interrupted_is_completed(hub, tmp_path, there):
    hub.repositories["models/some/large"] = SHARDED
    snapshot = cache_of(tmp_path, "models--some--large", ["tokenizer_config.json", *there])
    assert find_directory("some/large") == snapshot
    assert {path.name for path in snapshot.iterdir()} == SHARDED.keys()
    hub.requests.clear()
    assert find_directory("some/large") == snapshot and hub.requests == []


@pytest.mark.parametrize(
    ("lost", "kept"),
    [
        ("model-2-of-2.safetensors", ["config.json", "model-1-of-2.safetensors"]),
        ("flax_model-00002-of-00002.msgpack", ["config.json", "flax_model-00001-of-00002.msgpack"]),
    ],
)
def test_a_shard_is_missed_by_the_index_and_by_the_number_of_shards(hub, tmp_path, lost, kept):
    hub.repositories["models/some/large"] = dict.fromkeys([*kept, lost], b"{}")
    snapshot = cache_of(tmp_path, "models--some--large", kept)
    if lost in SHARDED:
        hub.repositories["models/some/large"] |= SHARDED
        (snapshot / "model.safetensors.index.json").write_text(INDEX)
    find_directory("some/large")
    assert (snapshot / lost).is_file()


def test_other_files_of_a_snapshot_with_weights_are_asked_for_once(hub, tmp_path):
    others = ["tokenizer_config.json", "vocab.txt", "modules.json", "1_Pooling/config.json"]
    names = ["config.json", "model.safetensors"]
    for name, more in (("sentences", others), ("bare", [])):
        hub.repositories[f"models/some/{name}"] = dict.fromkeys([*names, *more], b"[]")
        snapshot = cache_of(tmp_path, f"models--some--{name}", names)
        assert find_directory(f"some/{name}") == snapshot
        assert files_of(snapshot).keys() == {*names, *more}
        hub.requests.clear()
        assert find_directory(f"some/{name}") == snapshot and hub.requests == []
    (tmp_path / "cache/models--some--sentences/snapshots" / hub_server.COMMIT / others[0]).unlink()
    find_directory("some/sentences")
    assert hub.requests != []


def test_without_a_network_weights_in_the_cache_are_taken_with_a_warning(hub, tmp_path, caplog):
    hub.repositories["models/some/gone"] = {}
    snapshot = cache_of(tmp_path, "models--some--gone", ["config.json", "model.safetensors"])
    (tmp_path / "cache/models--some--gone/refs/main").write_text("d" * 40)
    snapshot = snapshot.rename(snapshot.with_name("d" * 40))
    assert find_directory("some/gone") == snapshot
    assert "some/gone is taken from the local cache, which may lack its tokenizer" in caplog.text
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not complete in the local cache and cannot be"):
        find_directory("some/gone")


def test_a_tokenizer_that_a_snapshot_lacks_is_downloaded(hub, tmp_path):
    hub.repositories["models/some/bert"] = {"config.json": b"{}", "vocab.txt": b"[PAD]\n"}
    snapshot = cache_of(tmp_path, "models--some--bert", ["config.json", "model.safetensors"])
    assert os.fspath(find_tokenizer("some/bert", download=False)) == str(snapshot)
    assert not (snapshot / "vocab.txt").exists()
    find_tokenizer("some/bert")
    assert (snapshot / "vocab.txt").is_file()


def test_the_sentencepiece_models_of_marian_are_downloaded(hub, tmp_path):
    names = ["config.json", "tokenizer_config.json", "vocab.json", "model.safetensors"]
    models = ["source.spm", "target.spm"]
    hub.repositories["models/some/marian"] = dict.fromkeys([*names, *models], b"{}")
    assert files_of(find_directory("some/marian")).keys() == {*names, *models}
    hub.repositories["models/some/older"] = hub.repositories["models/some/marian"]
    snapshot = cache_of(tmp_path, "models--some--older", names)
    find_tokenizer("some/older")
    assert files_of(snapshot).keys() == {*names, *models}


def test_a_mistyped_path_is_not_sought_on_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no directory runs/tpyo, and .* or write runs/tpyo@main"):
        ft.load_pretrained("runs/tpyo")
    with pytest.raises(UserError, match=r"There is no tokenizer at data/vocab.txt; check the path"):
        load_tokenizer("data/vocab.txt")
    assert hub.requests == []


def test_only_the_weights_that_are_read_are_downloaded(hub):
    unread = ["consolidated.safetensors", "model.fp16.safetensors", "onnx/model.safetensors",
              "consolidated-1-of-2.safetensors", "model.fp16-1-of-2.safetensors"]  # fmt: skip
    for name, read in (("whole", {"model.safetensors": b"x", "config.json": b"{}"}),
                       ("large", SHARDED)):  # fmt: skip
        hub.repositories[f"models/some/{name}"] = read | dict.fromkeys(unread, b"x")
        assert files_of(find_directory(f"some/{name}")).keys() == read.keys()


def test_the_cache_is_where_the_client_has_it(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for variable, below in (
        ("XDG_CACHE_HOME", "huggingface/hub"), ("HF_HOME", "hub"), ("HUGGINGFACE_HUB_CACHE", "."),
    ):  # fmt: skip
        monkeypatch.setenv(variable, str(tmp_path / variable))
        snapshot = tmp_path / variable / below / "models--some--bert" / "snapshots" / "main"
        assert Repository("some/bert").cached() is None
        snapshot.mkdir(parents=True)
        assert Repository("some/bert").cached() == snapshot


def test_transformers_offline_forbids_downloads_too(hub, monkeypatch):
    hub.repositories["models/some/bert"] = SHARDED
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert find_directory("some/bert") is None and hub.requests == []


def test_a_name_without_owner_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="'tiny' is no name of a repository"):
        ft.push_to_hub(tmp_path / "none", "tiny")
    command = Convert(str(tmp_path / "run"), str(tmp_path / "out"), push_to_hub="tiny")
    with pytest.raises(UserError, match="'tiny' is no name of a repository"):
        command.run([])


def test_every_architecture_with_a_head_has_a_class_in_its_card():
    heads = {
        name
        for family in all_families()
        if family.config.__module__.startswith("flax_transformers.")  # not those of other tests
        for name in family.architectures
        if name not in family.only_here and not family.timm_prefix
        if not name.endswith("Model") or name.endswith("LMHeadModel")
    }
    assert len(heads) > 50
    assert sorted(name for name in heads if hub_task(name)[1] == "AutoModel") == []
    assert hub_task("CLIPTextModelWithProjection")[1] == "CLIPTextModelWithProjection"
    assert hub_task("VideoMAEForVideoClassification")[1] == "AutoModelForVideoClassification"


def test_data_in_the_cache_are_read_without_a_network(hub, tmp_path, monkeypatch, caplog):
    snapshot = cache_of(tmp_path, "datasets--some--cached", ["data/0.jsonl", "data/1.jsonl"])
    place = "hf://datasets/some/cached"
    assert find_data(f"{place}/data/0.jsonl") == str(snapshot / "data/0.jsonl")
    assert hub.requests == []

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "repo_info", unreachable)
    assert find_data(f"{place}/data/*.jsonl") == str(snapshot / "data/*.jsonl")
    assert "2 files of hf://datasets/some/cached/data/*.jsonl are taken from" in caplog.text
    with pytest.raises(UserError, match=r"cannot be downloaded .*no route to host"):
        find_data(f"{place}/other/*.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"c.txt is not in the local cache, and HF_HUB_OFFLINE"):
        find_data(f"{place}/c.txt")


@pytest.mark.parametrize("reference", ["refs/convert/parquet", "refs/pr/7"])
def test_data_of_a_reference_are_found(reference, hub, tmp_path):
    snapshot = cache_of(tmp_path, "datasets--some--cached", ["plain_text/train/0000.parquet"])
    (snapshot.parents[1] / "refs" / reference).parent.mkdir(parents=True)
    (snapshot.parents[1] / "refs" / reference).write_text(snapshot.name)
    (snapshot.parents[1] / "refs" / "main").unlink()
    for written in (reference, reference.replace("/", "%2F")):
        path = f"hf://datasets/some/cached@{written}/plain_text/train/0000.parquet"
        assert find_data(path) == str(snapshot / "plain_text/train/0000.parquet")


def test_a_dataset_without_such_a_file_is_named(hub):
    hub.repositories["datasets/some/few"] = {"a[1].txt": b"x"}
    with pytest.raises(UserError, match=r"the dataset some/few has no file b\.txt"):
        find_data("hf://datasets/some/few/b.txt")
    assert Path(find_data("hf://datasets/some/few/a[1].txt")).is_file()


def test_a_star_of_a_pattern_ends_at_a_slash(hub, tmp_path):
    names = ["data/a.jsonl", "data/old/b.jsonl", "data/old/more/c.jsonl"]
    hub.repositories["datasets/some/tree"] = dict.fromkeys(names, b'{"text": "x"}')
    place = "hf://datasets/some/tree"
    entry = tmp_path / "cache" / "datasets--some--tree"
    for pattern, wanted in (("data/*.jsonl", names[:1]), ("data/*/*.jsonl", names[:2]),
                            ("data/**/*.jsonl", names)):  # fmt: skip
        find_data(f"{place}/{pattern}")
        assert sorted(files_of(entry / "snapshots" / hub_server.COMMIT)) == wanted


def test_data_of_the_hub_are_read_as_local_files_are(hub):
    rows = {f"data/{n}.jsonl": json.dumps({"text": f"text {n}"}).encode() for n in range(3)}
    hub.repositories["datasets/some/texts"] = rows | {"other.bin": b"x"}
    place = "hf://datasets/some/texts"
    names = [file.name for _, file in TextSource(f"{place}/data/*.jsonl").files()]
    assert names == ["0.jsonl", "1.jsonl", "2.jsonl"]
    [(_, one)] = TextSource(f"{place}@v1/data/1.jsonl").files()
    assert one.read_bytes() == rows["data/1.jsonl"]
    assert [file.name for _, file in TextSource(f"{place}/data").files()] == names
    assert not any("other.bin" in asked for asked in hub.requests)
    with pytest.raises(UserError, match="no path of a dataset's file; write hf://datasets/OWNER"):
        find_data("hf://some/texts/data.jsonl")
    with pytest.raises(UserError, match="hub, which has no dataset some/none; check the name"):
        find_data("hf://datasets/some/none/a.txt")
