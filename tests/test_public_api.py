"""The names that `import flax_transformers as ft` offers, without the training command."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.config_file import recipes
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame
from tests.huggingface.tensors import drawn_model


def test_every_public_name_is_there():
    for name in ft.__all__:
        assert getattr(ft, name) is not None
    assert dir(ft) == sorted(ft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ft.nothing  # noqa: B018


def test_importing_the_package_imports_no_jax():
    code = "import sys, flax_transformers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_start_of_a_run_imports_neither_matplotlib_nor_scipy_optimize():
    code = (
        "import sys, flax_transformers.evaluation.report, flax_transformers.evaluation.tasks; "
        "sys.exit('matplotlib' in sys.modules or 'scipy.optimize' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_is_found_by_name():
    assert ft.recipe("bert_tiny").model.hidden_size == 256
    assert {"bert_tiny", "llama3_8b"} <= set(recipes())


def test_an_unknown_recipe_is_named_with_those_near_it(tmp_path):
    with pytest.raises(UserError, match="there is no recipe bert_tinny.*did you mean bert_tiny"):
        ft.recipe("bert_tinny")
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(UserError, match=r"pipe\.py is no regular file"):
        ft.recipe(str(tmp_path / "pipe.py"))
    with pytest.raises(UserError, match="there is no config file nowhere/bert_tinny.py; give"):
        ft.recipe("nowhere/bert_tinny.py")


def test_a_recipe_file_of_the_guides_that_is_not_here_is_named_as_the_recipe():
    with pytest.raises(UserError, match=r"no config file nowhere/bert_tiny\.py.*name, bert_tiny$"):
        ft.recipe("nowhere/bert_tiny.py")


def test_the_folder_of_a_run_given_as_a_config_is_resumed_by_workdir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"to resume the run .* --workdir {tmp_path} alone"):
        ft.recipe(str(tmp_path))


@pytest.fixture
def saved(tmp_path):
    """A tokenizer of bytes as a run saves it, which ends its texts with </s>."""
    ByteTokenizer().save(tmp_path / "tokenizer", Frame(after=(1,)))
    return tmp_path / "tokenizer"


def test_a_tokenizer_frames_and_pads_and_decodes(saved):
    tokenizer = ft.load_tokenizer(saved)
    batch = tokenizer(["a", "abc"])
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[100, 1, 0, 0], [100, 101, 102, 1]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
    }
    assert all(array.dtype == np.int32 for array in batch.values())
    assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == ["a", "abc"]


def test_long_texts_are_cut_within_their_frame(saved):
    tokenizer = ft.load_tokenizer(saved)
    assert tokenizer("abcdef", max_length=3)["input_ids"].tolist() == [[100, 101, 1]]
    assert tokenizer("a", pad_to=5)["attention_mask"].tolist() == [[1, 1, 0, 0, 0]]
    with pytest.raises(UserError, match="max_length is 1, but the special tokens"):
        tokenizer("a", max_length=1)
    with pytest.raises(UserError, match="no text to encode"):
        tokenizer([])


def test_without_a_noted_frame_texts_stand_between_cls_and_sep():
    assert ByteTokenizer()("a")["input_ids"].tolist() == [[259, 100, 260]]


@pytest.mark.slow
def test_a_model_is_saved_with_its_tokenizer_and_both_load(saved, tmp_path):
    model, params = drawn_model("BertForMaskedLM", vocab_size=262)
    tokenizer = ft.load_tokenizer(saved)
    ft.save_pretrained(tmp_path / "out", model, params, tokenizer=tokenizer)
    loaded, _ = ft.load_pretrained(tmp_path / "out")
    assert loaded.config == model.config
    again = ft.load_tokenizer(tmp_path / "out")
    assert again("abc")["input_ids"].tolist() == tokenizer("abc")["input_ids"].tolist()
