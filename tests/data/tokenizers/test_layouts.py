"""Published tokenizer folders give the ids of `transformers`."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import pytest

from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import (
    TokenizerConfig,
    load_tokenizer,
    published_files,
    train_tokenizer,
)
from flax_transformers.errors import UserError
from tests.golden.tokenizer_layouts import ARCHIVE, EXPECTED, LAYOUTS, ROLES, TEXTS, given_texts

NAMES = [layout.__name__ for layout in LAYOUTS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> dict:
    return json.loads((root / EXPECTED).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_is_read_as_transformers_reads_it(root, expected, name):
    wanted, given = expected[name], given_texts(name, TEXTS)
    tokenizer = load_tokenizer(root / name)
    vocabulary = tokenizer.vocabulary
    assert {role: vocabulary.roles.get(role) for role in ROLES} == wanted["roles"]
    assert vocabulary.size == wanted["size"]
    assert vocabulary.has_pad == (wanted["roles"]["pad"] is not None)
    assert vocabulary.frame is not None
    assert list(vocabulary.frame.before) == wanted["before"]
    assert list(vocabulary.frame.after) == wanted["after"]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(given)]
    assert encoded == wanted["ids"]
    assert [tokenizer.decode(ids) for ids in encoded] == wanted["decoded"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_survives_saving_and_pickling(root, expected, name, tmp_path):
    tokenizer, given = load_tokenizer(root / name), given_texts(name, 1)
    tokenizer.save(tmp_path / "saved")
    for other in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.vocabulary == tokenizer.vocabulary
        for ours, theirs in zip(
            other.encode_batch(given), tokenizer.encode_batch(given), strict=True
        ):
            assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_published_files_of_a_folder_are_all_that_its_tokenizer_is_read_from(
    root, name, tmp_path
):
    for file, place in published_files(root / name).items():
        (tmp_path / file).write_bytes(place.read_bytes())
    found, tokenizer = load_tokenizer(tmp_path), load_tokenizer(root / name)
    assert found.vocabulary == tokenizer.vocabulary
    assert found.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_of_bytes_that_was_saved_here_is_its_config_file(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert published_files(tmp_path).keys() == {"tokenizer_config.json"}


def test_a_folder_without_a_tokenizer_has_no_published_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert published_files(tmp_path) == {}


def test_padding_and_truncation_that_a_file_stores_are_never_applied(root):
    stored = json.loads((root / "minilm" / "tokenizer.json").read_text())
    assert stored["padding"] and stored["truncation"]
    tokenizer = load_tokenizer(root / "minilm")
    assert len(tokenizer.encode_prompt("free")) < 10
    assert len(tokenizer.encode_prompt("free " * 300)) >= 300


def test_the_padding_that_is_not_there_is_another_special_token(root):
    for name in ("gpt2", "llama2_model", "llama3", "mistral"):
        vocabulary = load_tokenizer(root / name).vocabulary
        assert not vocabulary.has_pad
        assert vocabulary.pad_id == vocabulary.eos_id


def test_special_tokens_in_a_prompt_are_read_and_in_a_document_are_not(root):
    tokenizer = load_tokenizer(root / "llama3")
    eot = tokenizer.vocabulary.eos_id
    assert tokenizer.encode_prompt("<|end_of_text|>").tolist() == [eot]
    assert eot not in tokenizer.encode_batch(["<|end_of_text|>"])[0]


@pytest.mark.parametrize(
    ("text", "behind"),
    [("<s>Hello", ["H"]), ("<s> Hello", ["▁H"]), ("</s>\nb", ["\n", "b"]), ("a</s>b", ["b"])],
)
def test_llama_has_a_space_behind_a_special_token_only_if_legacy(root, tmp_path, text, behind):
    for file in (root / "llama2_model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(tmp_path)  # its files say that it is not
    ids, spans = tokenizer.encode_prompt_with_offsets(text)
    found = tokenizer.pieces(ids)
    name = "</s>" if "</s>" in text else "<s>"
    after = found.index(name) + 1
    assert found[after : after + len(behind)] == behind
    assert spans[after, 0] == text.index(name) + len(name)
    assert tokenizer.pieces(tokenizer.encode_prompt("Hello"))[0] == "▁H"
    described = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    legacy = load_tokenizer(tmp_path)
    assert legacy.pieces(legacy.encode_prompt(text))[after].startswith("▁")


def test_a_role_whose_token_is_not_there_gets_the_next_id(root, tmp_path):
    for file in (root / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    vocabulary = load_tokenizer(tmp_path).vocabulary
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (402, 401, 400)


@pytest.mark.parametrize(
    "name", ["bert_cased", "bert_cased_vocab", "roberta", "llama2_model", "t5"]
)
def test_lower_casing_that_the_files_do_not_do_is_an_error(root, name):
    config = TokenizerConfig(path=str(root / name), lowercase=True)
    if name == "bert_cased_vocab":
        with pytest.raises(UserError, match="keeps capital letters"):
            train_tokenizer(config, ())
        return
    with pytest.raises(UserError, match="keeps capital letters, but lowercase is True"):
        train_tokenizer(config, ())


def test_lower_casing_without_being_asked_for_is_a_warning(root, caplog):
    load_tokenizer(root / "minilm", lowercase=False)
    assert "lower-cases all text, as its files say" in caplog.text


def test_the_case_of_the_config_counts_before_that_of_the_file(root, tmp_path, caplog):
    for file in (root / "bert_cased").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer = load_tokenizer(tmp_path)
    ids = [one.tolist() for one in tokenizer.encode_batch(["HUMAN", "human"])]
    assert ids[0] == ids[1]
    assert (
        "tokenizer.json has lowercase=False, tokenizer_config.json overrides it with True"
        in caplog.text
    )


def test_an_uncased_vocabulary_alone_is_read_as_uncased(root, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((root / "bert_uncased_vocab" / "vocab.txt").read_bytes())
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.vocabulary.unk_id not in tokenizer.encode_batch(["All Human"])[0]
    with pytest.raises(UserError, match="its tokens have no capital letters"):
        load_tokenizer(tmp_path / "vocab.txt", lowercase=False)


def test_the_kind_need_not_be_given_with_a_path(root):
    kinds = {"gpt2": "bpe", "bert_cased": "wordpiece", "t5_model": "unigram", "byt5": "bytes"}
    for name, kind in kinds.items():
        assert train_tokenizer(TokenizerConfig(path=str(root / name)), ()).kind == kind


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("gpt2", "CLIPTokenizer", "vocab.json and merges.txt belong to a CLIPTokenizer"),
        ("bert_cased_vocab", "MPNetTokenizer", "vocab.txt belongs to a MPNetTokenizer"),
        ("t5_model", "AlbertTokenizer", "spiece.model belongs to a AlbertTokenizer"),
        ("llama2_model", "DebertaV2Tokenizer", "tokenizer.model belongs to a DebertaV2Tokenizer"),
        (
            "xlm_roberta_model",
            "CamembertTokenizer",
            "ids of the pieces of sentencepiece.bpe.model are not known",
        ),
    ],
)
def test_files_whose_class_is_not_known_are_refused(root, tmp_path, name, kind, said):
    for file in (root / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "expected"),
    [
        ("albert", "spiece.model", "Albert"),
        ("deberta-v2", "spm.model", "DebertaV2"),
        ("siglip", "spiece.model", "Siglip"),  # which has no fast class in transformers
    ],
)
def test_a_sentencepiece_model_is_that_of_its_models_class(root, tmp_path, kind, file, expected):
    (tmp_path / file).write_bytes((root / "t5_model" / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    said = f"{file} belongs to a {expected}Tokenizer, .*; add the .*from the published model"
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize(
    "text", ["{", '{"bos_token": 5, "a": "b"}', '{"flax_transformers": {"model": 5}, "a": "b"}']
)
def test_a_side_file_that_cannot_be_read_is_named(root, tmp_path, name, text):
    for file in (root / "gpt2_json").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"added_tokens\.json|tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_called_tokenizer_reads_special_tokens_as_a_prompt(root):
    for tokenizer in (load_tokenizer(root / "bert_cased"), ByteTokenizer()):
        ids = tokenizer(["the [MASK] dog", "a"])["input_ids"][0].tolist()
        frame, inner = tokenizer.frame, tokenizer.encode_prompt("the [MASK] dog")
        assert ids == [*frame.before, *inner, *frame.after]
        assert ids.count(tokenizer.vocabulary.mask_id) == 1
