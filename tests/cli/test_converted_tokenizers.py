"""The tokenizer of a checkpoint that was converted from a Hugging Face directory."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.convert import _write_checkpoint
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from tests.golden.tokenizer_layouts import ARCHIVE, TEXTS, given_texts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def converted(source, target, config):
    """The folder of a checkpoint with one weight, and what was carried into it."""
    model = build_model(config, ComputeConfig())
    carried = _write_checkpoint(target, model, {"w": np.zeros(1, np.float32)}, source)
    return find_checkpoint(target).folder, carried


@pytest.mark.parametrize(
    "name", ["t5_model", "xlm_roberta_model", "byt5", "gpt2", "bert_cased_vocab"]
)
def test_a_converted_checkpoint_reads_text_as_the_folder_does(root, tmp_path, name):
    folder, _ = converted(root / name, tmp_path / "ours", BertConfig())
    found, wanted = load_tokenizer(folder / "tokenizer"), load_tokenizer(root / name)
    assert found.vocabulary == wanted.vocabulary
    assert found.vocabulary.frame is not None
    texts = given_texts(name, TEXTS)
    for ours, theirs in zip(found.encode_batch(texts), wanted.encode_batch(texts), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", ["t5_model", "xlm_roberta_model"])
def test_a_tokenizer_class_named_only_in_config_json_is_kept(root, tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("spiece.model", "sentencepiece.bpe.model", "config.json"):
        if (root / name / file).exists():
            (source / file).write_bytes((root / name / file).read_bytes())
    folder, _ = converted(source, tmp_path / "ours", BertConfig())
    found, wanted = load_tokenizer(folder / "tokenizer"), load_tokenizer(source)
    assert found.vocabulary == wanted.vocabulary
    assert found.vocabulary.frame.after == (found.vocabulary.eos_id,)
    assert found.facts.tokenizer_class == wanted.facts.tokenizer_class


def test_a_tokenizer_that_is_only_a_class_is_carried(tmp_path):
    (tmp_path / "byt5").mkdir()
    (tmp_path / "byt5" / "config.json").write_text(
        '{"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"}'
    )
    folder, carried = converted(tmp_path / "byt5", tmp_path / "ours", BertConfig())
    assert carried == "config.json"
    assert load_tokenizer(folder / "tokenizer").kind == "bytes"


@pytest.mark.parametrize("config", [BertConfig(), ViTConfig()])
def test_without_a_tokenizer_no_other_files_are_written(tmp_path, config):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    folder, carried = converted(tmp_path / "source", tmp_path / "ours", config)
    assert carried == "" and not (folder / "tokenizer").exists()
