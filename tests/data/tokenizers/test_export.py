"""Tokenizers trained here in the files of exported models."""

from __future__ import annotations

import json

import pytest
import tokenizers

from flax_transformers.data.tokenizers.export import export_folder, exported_files
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame
from tests.golden.multilingual import corpus, texts

KINDS = ("wordpiece", "unigram", "bpe", "bytes", "byte_level_bpe")
GIVEN = [text for several in texts(2).values() for text in several]


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    return train_tokenizer(TokenizerConfig(request.param, 1_500), corpus())


def test_the_exported_file_gives_the_same_ids_in_the_frame_of_training(trained):
    start = trained.vocabulary.end_id
    files = exported_files(trained, Frame(before=(start,)), 512)
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text, ids in zip(GIVEN, trained.encode_batch(GIVEN), strict=True):
        assert backend.encode(text).ids == [start, *ids.tolist()]
    config = json.loads(files["tokenizer_config.json"])
    assert config["model_max_length"] == 512
    assert config["eos_token" if trained.vocabulary.eos_id is not None else "sep_token"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_folder_of_a_run_is_exported_and_a_published_one_stays(trained, tmp_path):
    trained.save(tmp_path / "run", Frame(before=(trained.vocabulary.end_id,)))
    (tmp_path / "run" / "generation_config.json").write_text("{}")
    out = export_folder(tmp_path / "run", tmp_path / "out", None)
    assert out == tmp_path / "out" and (out / "generation_config.json").is_file()
    assert "flax_transformers" not in (out / "tokenizer_config.json").read_text()
    frame = load_tokenizer(out).vocabulary.frame
    assert frame == Frame(before=(trained.vocabulary.end_id,))
    assert export_folder(out, tmp_path / "again", None) == out


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_of_a_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer_config.json is damaged: it is not JSON"):
        export_folder(tmp_path, tmp_path / "out", None)
