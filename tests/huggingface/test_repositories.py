"""Models and data by the ids of a hub, which is a server of this test; uploads to it."""

from __future__ import annotations

import json

import huggingface_hub.constants
import huggingface_hub.hf_api
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.storage.hub import Repository, find_data
from flax_transformers.testing import (
    assert_bit_equal,
    tiny_bert,
    tiny_config,
    tiny_model,
    write_corpus,
)
from tests.huggingface import hub_server


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
    model, params = tiny_model("BertForMaskedLM", vocab_size=262)
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
        ("../up", None),
        ("folder/", None),
        ("org/model@", None),
        ("gs://bucket", None),
        ("", None),
    ],
)
def test_an_id_has_an_owner_a_name_and_a_revision(text, found):
    repository = Repository.of_id(text)
    assert (repository and (repository.name, repository.revision)) == found


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
    with pytest.raises(UserError, match="some/bert at revision v9 is not on this machine"):
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
def test_a_run_is_converted_and_uploaded_with_its_recipe_and_scores(hub, tmp_path, capsys):
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
    with pytest.raises(UserError, match="there is no dataset some/none on the Hugging Face hub"):
        find_data("hf://datasets/some/none/a.txt")
