"""What `transformers` makes of tokenizers trained here, and of words that are given apart."""

from __future__ import annotations

import pytest
import transformers

from flax_transformers.data.tokenizers.export import export_folder
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer, train_tokenizer
from tests.data.tokenizers.languages import HARD_TEXTS, TEXTS
from tests.data.tokenizers.test_byte_level_training import CODE, CORPUS

KINDS = {
    "byte-level BPE": TokenizerConfig("byte_level_bpe", 500),
    "unigram that keeps whitespace": TokenizerConfig("unigram", 800, keep_whitespace=True),
    "BPE that keeps whitespace": TokenizerConfig("bpe", 900, keep_whitespace=True),
}
ALL = [*TEXTS.values(), *HARD_TEXTS, *CODE]
# `transformers` reads the names of special tokens in a text, this package does not.
WITHOUT_SPECIAL = [text for text in ALL if not any(s in text for s in ("</s>", "<|", "▁"))]


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_that_keeps_whitespace_is_read_as_it_is(name, tmp_path):
    tokenizer = train_tokenizer(KINDS[name], CORPUS)
    tokenizer.save(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(read) == tokenizer.vocabulary.size
    assert read.eos_token_id == tokenizer.vocabulary.eos_id
    for text in WITHOUT_SPECIAL:
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert read(text, add_special_tokens=False)["input_ids"] == ids
        assert read.decode(ids) == text


@pytest.mark.parametrize("wordpiece", [True, False])
def test_words_given_apart_have_the_ids_of_is_split_into_words(wordpiece, tmp_path):
    config = TokenizerConfig("wordpiece", 900) if wordpiece else KINDS["byte-level BPE"]
    tokenizer = train_tokenizer(config, CORPUS)
    tokenizer.save(tmp_path)
    if wordpiece:
        read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    else:
        read = transformers.GPT2TokenizerFast.from_pretrained(tmp_path, add_prefix_space=True)
    for text in TEXTS.values():
        words = text.split()
        wanted = read(words, is_split_into_words=True, add_special_tokens=False)
        found = load_tokenizer(tmp_path).encode_words([words])[0]
        assert [i for ids in found for i in ids.tolist()] == wanted["input_ids"]
        numbers = [n for n, ids in enumerate(found) for _ in ids]
        assert numbers == [n for n in wanted.word_ids() if n is not None]


def test_a_vocabulary_with_capital_letters_is_exported_for_auto_tokenizer(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "cafe", "café"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "run")
    out = export_folder(tmp_path / "run", tmp_path / "out", None)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("The café", "the cafe"):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_batch([text])[0].tolist() == wanted
