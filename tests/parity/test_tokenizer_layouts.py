"""Every tokenizer layout, live: 200 texts in each of twenty languages, and batches of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.generation.prompts import rows_of
from tests.golden.tokenizer_layouts import (
    LAYOUTS,
    ROLES,
    expected,
    given_texts,
    llama2_model,
    write,
)

transformers = pytest.importorskip("transformers")

TEXTS = 200


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout") / request.param.__name__
    write(path, request.param())
    return path


def test_ids_roles_frames_and_decoded_texts_are_those_of_transformers(folder):
    given = given_texts(folder.name, TEXTS)
    wanted, tokenizer = expected(folder, given), load_tokenizer(folder)
    vocabulary = tokenizer.vocabulary
    assert {role: vocabulary.roles.get(role) for role in ROLES} == wanted["roles"]
    assert vocabulary.size == wanted["size"]
    assert vocabulary.frame is not None
    assert [list(vocabulary.frame.before), list(vocabulary.frame.after)] == [
        wanted["before"],
        wanted["after"],
    ]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(given)]
    assert encoded == wanted["ids"]
    assert [tokenizer.decode(ids) for ids in encoded] == wanted["decoded"]


def test_a_padded_batch_is_that_of_transformers(folder):
    given = given_texts(folder.name, 1)[:8]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary, frame = tokenizer.vocabulary, tokenizer.vocabulary.frame
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    rows = [[*frame.before, *ids, *frame.after] for ids in tokenizer.encode_batch(given)]
    ids, mask = rows_of(rows, vocabulary.pad_id, padded="right")
    theirs.padding_side = "right"
    wanted = theirs(given, padding="max_length", max_length=ids.shape[1], return_tensors="np")
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])


@pytest.mark.parametrize("legacy", [True, False])
def test_texts_behind_special_tokens_have_the_ids_of_transformers(tmp_path, legacy):
    write(tmp_path / "llama2", llama2_model())
    file = tmp_path / "llama2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"legacy": legacy}))
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent)
    ours = load_tokenizer(file.parent)
    for text in ("<s>Hello", "a</s>b c", "[INST] a [/INST]</s><s>[INST] b", "</s>\nb"):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_prompt(text).tolist() == wanted
