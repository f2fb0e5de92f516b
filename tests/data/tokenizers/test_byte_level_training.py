"""Byte-level BPE and whitespace-preserving sentencepiece decode code and verse exactly."""

from __future__ import annotations

import json

import pytest
import tokenizers

from flax_transformers.data.tokenizers.byte_level_training import _BLOCK, training_blocks
from flax_transformers.data.tokenizers.load import (
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from flax_transformers.errors import UserError
from tests.data.tokenizers.languages import HARD_TEXTS, TEXTS

CODE = (
    "def add(a, b):\n\treturn a + b\n\n\nclass A:\n    def f(self):\n        return  self.x\n",
    "for (int i = 0; i < n; ++i) {\r\n\tprintf(\"%d\\n\", i);\r\n}\r\n",
    "Tyger Tyger, burning bright,\n  In the forests of the night;\n\n\nWhat immortal hand\n",
    "\n", "\n\n\n", "\t", " ", "   ", " a", "a ", "\r\n", "\r", "a\u00a0b", "\x00\x01\x7f",
    "😀\n👩‍👩‍👧\t🇫🇷",
    "x\u2028y\u2029z\x0b\x0c\x85", "e\u0301 \ufeff \u200b", "½ ﬁ ①",
)  # fmt: skip
CORPUS = [*TEXTS.values(), *HARD_TEXTS, *CODE] * 3
CONFIGS = {
    "byte-level BPE": TokenizerConfig("byte_level_bpe", 500),
    "unigram": TokenizerConfig("unigram", 800, keep_whitespace=True),
    "BPE": TokenizerConfig("bpe", 900, keep_whitespace=True),
    "bytes": TokenizerConfig("bytes"),
}
_trained: dict[str, Tokenizer] = {}


@pytest.fixture(params=CONFIGS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name = request.param
    return _trained.setdefault(name, _trained.get(name) or train_tokenizer(CONFIGS[name], CORPUS))


def test_code_and_verse_are_decoded_exactly(tokenizer):
    for text in [*CODE, *TEXTS.values(), *HARD_TEXTS]:
        if "▁" not in text or tokenizer.kind == "bytes":
            assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_a_saved_tokenizer_still_decodes_text_exactly(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocabulary == tokenizer.vocabulary
    for text in CODE:
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert loaded.encode_batch([text])[0].tolist() == ids
        assert loaded.decode(ids) == text


def test_byte_level_bpe_has_the_ids_of_gpt2():
    tokenizer = train_tokenizer(CONFIGS["byte-level BPE"], CORPUS)
    vocabulary = tokenizer.vocabulary
    assert vocabulary.size == 500
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (499, 499, None)
    assert not vocabulary.has_pad and vocabulary.special_ids == (499,)
    assert tokenizer.pieces([0, 93, 94, 187, 188, 220, 255, 499]) == [
        "!", "~", "¡", "ÿ", "Ā", "Ġ", "Ń", "<|endoftext|>"
    ]  # fmt: skip
    assert tokenizer.encode_batch(["<|endoftext|>"])[0].max() < 499


def test_byte_level_bpe_splits_words_as_gpt2_does(tmp_path):
    train_tokenizer(CONFIGS["byte-level BPE"], CORPUS).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["pre_tokenizer"] == {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    assert saved["normalizer"] is None and saved["decoder"]["type"] == "ByteLevel"
    assert saved["model"]["vocab"]["<|endoftext|>"] == 499
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("a<|endoftext|>").ids[-1] == 499  # to those who may write it


def test_line_ends_and_indentation_are_learned():
    text = "    if x:\n        y = 1\n\n\n" * 50
    tokenizer = train_tokenizer(TokenizerConfig("byte_level_bpe", 271), [text])
    assert len(tokenizer.encode_batch(["\n       "])[0]) <= 2
    assert tokenizer.pieces(tokenizer.encode_batch(["1\n\n\n"])[0])[-1] == "ĊĊĊ"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_that_keeps_whitespace_has_a_token_for_each_line_end(kind):
    tokenizer = train_tokenizer(TokenizerConfig(kind, 800, keep_whitespace=True), CORPUS)
    pieces = tokenizer.pieces(tokenizer.encode_batch(["a\n\n\tb\r\n"])[0])
    assert [piece for piece in pieces if piece.isspace()] == ["\n", "\n", "\t", "\r", "\n"]


def test_long_training_texts_are_cut_between_words():
    text = "word, \n  " * _BLOCK
    blocks = list(training_blocks([text + "a b " * _BLOCK]))
    assert "".join(blocks) == text + "a b " * _BLOCK
    assert len(blocks) > 2 and all(block.startswith(" ") for block in blocks[1:])


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "byte_level_bpe", None])
def test_other_kinds_do_not_take_keep_whitespace(kind):
    with pytest.raises(UserError, match="keep_whitespace is for a sentencepiece tokenizer"):
        train_tokenizer(TokenizerConfig(kind, keep_whitespace=True), CORPUS)


def test_byte_level_bpe_refuses_lower_case_and_too_large_vocabularies():
    with pytest.raises(UserError, match="byte_level_bpe tokenizer does not change text"):
        train_tokenizer(TokenizerConfig("byte_level_bpe", lowercase=True), CORPUS)
    with pytest.raises(UserError, match=r"set vocab_size to \d+ or less, of the tokenizer"):
        train_tokenizer(TokenizerConfig("byte_level_bpe", 50_000), CORPUS)
    with pytest.raises(UserError, match="set vocab_size well above 257"):
        train_tokenizer(TokenizerConfig("byte_level_bpe", 200), CORPUS)


def test_a_folder_of_byte_level_bpe_may_be_called_that(tmp_path):
    trained = train_tokenizer(CONFIGS["byte-level BPE"], CORPUS)
    trained.save(tmp_path)
    config = TokenizerConfig("byte_level_bpe", path=str(tmp_path))
    assert train_tokenizer(config, []).fingerprint == trained.fingerprint


def test_settings_of_tokenizers_that_do_not_keep_whitespace_are_as_before():
    assert "keep_whitespace" not in TokenizerConfig("bpe").settings
    assert TokenizerConfig("bpe", keep_whitespace=True).settings["keep_whitespace"] is True
