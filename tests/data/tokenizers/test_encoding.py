"""The ids of a document do not depend on where its sentences end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.documents import Document
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.store import token_store as store
from flax_transformers.data.tokenizers import encoding
from flax_transformers.data.tokenizers import offsets as token_offsets
from flax_transformers.data.tokenizers.encoding import encode_documents, encode_sentences
from flax_transformers.data.tokenizers.kinds import PieceTokenizer
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.data.tokenizers.sentencepiece import SentencePieceTokenizer, piece_offsets
from flax_transformers.data.tokenizers.sentences import (
    MAX_CHARACTERS,
    sentence_ends,
    split_sentences,
)
from tests.data.tokenizers.languages import HARD_TEXTS, TEXTS

ALL = [*TEXTS.values(), *HARD_TEXTS, " ".join(TEXTS.values())]
LLAMA_3, QWEN_2, _ = token_offsets._SPLITS_BEFORE_SPACES
_SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def byte_level(add_prefix_space: bool = False, split: str | None = None) -> tokenizers.Tokenizer:
    """GPT-2's kind of tokenizer, or with ``split`` Llama 3's and Qwen 2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    if split is not None:
        pattern = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, level])
    else:
        backend.pre_tokenizer = level
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(ALL, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def qwen() -> tokenizers.Tokenizer:
    backend = byte_level(split=QWEN_2)
    backend.post_processor = None
    backend.normalizer = normalizers.NFC()
    return backend


def added_words() -> tokenizers.Tokenizer:
    """Tokens that are no special ones but are found before any splitting, spaces included."""
    backend = byte_level()
    added = [tokenizers.AddedToken("fine day", lstrip=True, normalized=False, special=False)]
    backend.add_tokens(added)
    backend.post_processor = None
    return backend


def llama_2() -> tokenizers.Tokenizer:
    """No words at all: spaces become "▁" and one is put before the text; bytes as a fallback."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*_SPECIALS, *alphabet], show_progress=False,
        limit_alphabet=200,
    )  # fmt: skip
    backend.train_from_iterator(ALL, trainer)
    model = json.loads(backend.to_str())
    for token in model["added_tokens"][len(_SPECIALS) :]:
        token["special"] = False
    model["added_tokens"] = model["added_tokens"][: len(_SPECIALS)]
    backend = tokenizers.Tokenizer.from_str(json.dumps(model))
    backend.pre_tokenizer = None
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def xlm_roberta() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=_SPECIALS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(ALL, trainer)
    return backend


BACKENDS = {
    "GPT-2": byte_level,
    "RoBERTa with a prefix": lambda: byte_level(add_prefix_space=True),
    "Llama 3": lambda: byte_level(split=LLAMA_3),
    "Qwen 2": qwen,
    "byte-level with added words": added_words,
    "Llama 2": llama_2,
    "XLM-R": xlm_roberta,
}
TRAINED = {
    "WordPiece": TokenizerConfig("wordpiece", 900),
    "WordPiece, lower case": TokenizerConfig("wordpiece", 900, lowercase=True),
    "unigram": TokenizerConfig("unigram", 800),
    "unigram with whitespace": TokenizerConfig("unigram", 700, keep_whitespace=True),
    "unigram, lower case": TokenizerConfig("unigram", 700, lowercase=True),
    "BPE": TokenizerConfig("bpe", 900),
    "bytes": TokenizerConfig("bytes"),
}
_made: dict[str, Tokenizer] = {}


def made(name: str) -> Tokenizer:
    if name not in _made:
        if name in BACKENDS:
            _made[name] = PieceTokenizer(BACKENDS[name]().to_str())
        else:
            _made[name] = train_tokenizer(TRAINED[name], ALL)
    return _made[name]


def own_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the library behind a tokenizer makes of a text."""
    if isinstance(tokenizer, PieceTokenizer):
        backend = tokenizers.Tokenizer.from_str(tokenizer.serialized)
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer._processor.encode(text)
    return [byte + 3 for byte in text.encode()]


def ends(sentences: list[np.ndarray]) -> list[int]:
    return np.cumsum([len(ids) for ids in sentences]).tolist()


@pytest.fixture(params=[*BACKENDS, *TRAINED])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


def test_a_document_in_any_language_has_the_tokenizers_own_ids(tokenizer):
    for text, sentences in zip(ALL, encode_sentences(tokenizer, ALL), strict=True):
        if "</s>" in text and tokenizer is _made.get("XLM-R"):
            continue  # its model would find the special token; user text never yields one
        found = np.concatenate([np.zeros(0, np.int32), *sentences]).tolist()
        assert found == own_ids(tokenizer, text), text


def test_offsets_agree_with_those_of_the_library(tokenizer):
    for text, (ids, offsets) in zip(ALL, tokenizer.encode_with_offsets(ALL), strict=True):
        assert ids.tolist() == tokenizer.encode_batch([text])[0].tolist()
        assert offsets.shape == (len(ids), 2) and offsets.dtype == np.int32
        if isinstance(tokenizer, PieceTokenizer):
            backend = tokenizers.Tokenizer.from_str(tokenizer.serialized)
            backend.encode_special_tokens = True
            if tokenizer._byte_lengths is not None:
                backend.post_processor = None  # it takes spaces out of the offsets
            encoded = backend.encode(text, add_special_tokens=False)
            if encoded.ids == ids.tolist():
                assert offsets.tolist() == list(map(list, encoded.offsets)), text
        elif isinstance(tokenizer, SentencePieceTokenizer):
            assert offsets.tolist() == piece_offsets(tokenizer._processor, text).tolist(), text


def offsets_ends(tokenizer, text, at):
    """What `encode_with_ends` gives, from the offsets."""
    ((ids, offsets),) = tokenizer.encode_with_offsets([text])
    return ids.tolist(), [int((offsets[:, 1] <= end).sum()) for end in at]


@pytest.mark.parametrize(
    "name",
    [
        "WordPiece",
        "WordPiece, lower case",
        "unigram",
        pytest.param("unigram with whitespace", marks=pytest.mark.full),
        pytest.param("unigram, lower case", marks=pytest.mark.full),
        "BPE",
        "bytes",
    ],
)
def test_tokens_before_a_position_are_those_whose_offsets_end_there(name):
    tokenizer = made(name)
    rng = np.random.default_rng(0)
    texts = [*ALL, " ".join(HARD_TEXTS), "A… B. “Ça!” Ñ. ﬁn. Ünder. e\u0301. Ω. \u0301x"]
    for text in filter(None, texts):
        places = [sentence_ends(text), sorted(rng.integers(1, len(text) + 1, 4))]
        places += [[end] for end in range(1, len(text) + 1)][:60]
        for at in places:
            ((ids, found),) = tokenizer.encode_with_ends([text], [at])
            assert (ids.tolist(), found) == offsets_ends(tokenizer, text, at), (text, at)
    both = tokenizer.encode_with_ends(texts[:2], [sentence_ends(text) for text in texts[:2]])
    for text, (ids, found) in zip(texts, both, strict=False):
        assert (ids.tolist(), found) == offsets_ends(tokenizer, text, sentence_ends(text))


@pytest.mark.parametrize("name", ["WordPiece", "unigram", "unigram with whitespace", "BPE"])
def test_sentences_of_most_languages_need_no_offsets(name, monkeypatch):
    tokenizer, asked = made(name), []
    plain = type(tokenizer).encode_with_offsets
    monkeypatch.setattr(
        type(tokenizer), "encode_with_offsets", lambda self, t: asked.extend(t) or plain(self, t)
    )
    texts = [f"{text} {text}" for text in TEXTS.values()]
    tokenizer.encode_with_ends(texts, [[len(text) // 2 + 1, len(text)] for text in texts])
    assert len(asked) <= len(texts) // 4, asked


def test_positions_are_sought_only_in_texts_that_are_cut():
    """`char_to_token` begins at the start of the text, so that a book would take hours."""
    assert made("WordPiece").finds_ends
    backend = tokenizers.Tokenizer.from_str(made("WordPiece").serialized)
    backend.add_tokens(["<url>"])
    with_added = PieceTokenizer(backend.to_str())
    assert with_added.safe_cut is None and not with_added.finds_ends


@pytest.mark.parametrize("name", ["unigram", "unigram with whitespace", "BPE", "bytes"])
def test_texts_without_special_tokens_need_no_offsets(name, monkeypatch):
    tokenizer, texts = made(name), [*TEXTS.values(), ""]
    prompts = [tokenizer.encode_prompt(text).tolist() for text in texts]
    monkeypatch.setattr(type(tokenizer), "encode_prompt_with_offsets", None)
    rows, (before, after) = tokenizer(texts), (tokenizer.frame.before, tokenizer.frame.after)
    lengths = rows["attention_mask"].sum(1)
    found = [row[:length].tolist() for row, length in zip(rows["input_ids"], lengths, strict=True)]
    assert found == [[*before, *ids, *after] for ids in prompts]


def test_texts_of_a_batch_are_read_as_prompts(tokenizer):
    names = tokenizer.pieces(tokenizer.vocabulary.special_ids)
    texts = [*ALL, *(f"a {name}b" for name in names)]
    prompts = [tokenizer.encode_prompt(text).tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_prompts(texts)] == prompts


def test_a_text_may_be_cut_where_a_tokenizer_says_so(tokenizer):
    if tokenizer.safe_cut is None:
        return
    for text in ALL:
        whole = tokenizer.encode_batch([text])[0].tolist()
        for match in tokenizer.safe_cut.finditer(text):
            parts = tokenizer.encode_batch([text[: match.start()], text[match.start() :]])
            assert np.concatenate(parts).tolist() == whole, (text, match.start())


def test_which_tokenizers_give_positions_to_cut_a_text():
    cut = {name for name in (*BACKENDS, *TRAINED) if made(name).safe_cut is not None}
    whole = {"byte-level with added words", "Llama 2", "XLM-R"}
    whole |= {name for name in TRAINED if name.startswith("unigram")}
    assert cut == {*BACKENDS, *TRAINED} - whole


@pytest.mark.parametrize("name", ["WordPiece", "WordPiece, lower case", "bytes"])
def test_wordpiece_and_bytes_are_what_they_were_sentence_by_sentence(name):
    tokenizer = made(name)
    for text, sentences in zip(ALL, encode_sentences(tokenizer, ALL), strict=True):
        apart = tokenizer.encode_batch(split_sentences(text))
        assert [ids.tolist() for ids in sentences] == [ids.tolist() for ids in apart], text


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Llama 2", "unigram", "BPE", "XLM-R"])
def test_a_token_belongs_to_the_sentence_in_which_it_ends(name):
    tokenizer = made(name)
    (sentences,) = encode_sentences(tokenizer, ["He smiled. It was late."])
    texts = ["".join(tokenizer.pieces(ids)) for ids in sentences]
    space = "Ġ" if name in ("GPT-2", "Llama 3") else "▁"
    first = f"He{space}smiled." if space == "Ġ" else f"▁He{space}smiled."
    assert texts == [first, f"{space}It{space}was{space}late."]


def test_a_token_over_several_sentences_leaves_those_it_does_not_end_in_empty():
    backend = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "?": 1}, "?"))
    backend.add_special_tokens(["<pad>"])
    serialized = json.loads(backend.to_str())
    serialized["model"] = {
        "type": "Unigram", "unk_id": 1, "byte_fallback": False,
        "vocab": [["<pad>", 0.0], ["?", -9.0], ["Aa. Bb. Cc.", -1.0], [" Dd.", -1.0]],
    }  # fmt: skip
    tokenizer = PieceTokenizer(json.dumps(serialized))
    (sentences,) = encode_sentences(tokenizer, ["Aa. Bb. Cc. Dd."])
    assert [ids.tolist() for ids in sentences] == [[], [], [2], [3]]


def test_long_text_is_cut_where_no_id_changes(tokenizer, monkeypatch):
    text = " ".join(ALL * 2)
    (whole,) = encode_sentences(tokenizer, [text])
    monkeypatch.setattr(encoding, "_PART", 50)
    monkeypatch.setattr(encoding, "_CHUNK", 300)
    (cut,) = encode_sentences(tokenizer, [text])
    assert [ids.tolist() for ids in cut] == [ids.tolist() for ids in whole]
    if tokenizer.safe_cut is not None:
        assert len(encoding._parts(tokenizer, text)) > 50


def test_a_word_longer_than_a_sentence_may_be_is_still_one_word():
    tokenizer = made("WordPiece")
    (sentences,) = encode_sentences(tokenizer, ["x" * (MAX_CHARACTERS + 5) + " He smiled."])
    assert ends(sentences)[-1] == len(own_ids(tokenizer, "y" * 101 + " He smiled."))


def encoded(document: Document, tokenizer: Tokenizer) -> list[list[int]]:
    (((_, ids),),) = encode_documents([(0, document)], tokenizer)
    return [one.tolist() for one in ids]


def test_words_given_apart_are_those_of_a_running_text(tokenizer):
    words = ("Die", "Straße", "führte", "über", "die", "Brücke", ".")
    found = encoded(Document(words, words, words=True), tokenizer)
    assert len(found) == len(words)
    if isinstance(tokenizer, PieceTokenizer) and tokenizer.kind != "wordpiece":
        backend = tokenizers.Tokenizer.from_str(tokenizer.serialized)
        if token_offsets.is_byte_level(json.loads(tokenizer.serialized)):
            words = tuple(f" {word}" for word in words)  # add_prefix_space
        whole = backend.encode(words, is_pretokenized=True, add_special_tokens=False)
        assert [i for ids in found for i in ids] == whole.ids
    else:
        text = " ".join(words)
        assert [i for ids in found for i in ids] == own_ids(tokenizer, text)


@pytest.mark.parametrize("name", ["GPT-2", "RoBERTa with a prefix"])
def test_the_first_of_words_given_apart_has_a_space_too(name):
    tokenizer = made(name)
    found = encoded(Document(("He", "smiled"), ("A", "B"), words=True), tokenizer)
    assert ["".join(tokenizer.pieces(ids)) for ids in found] == ["ĠHe", "Ġsmiled"]


@pytest.mark.parametrize("name", [*BACKENDS, *TRAINED])
def test_separate_texts_are_encoded_separately(name):
    tokenizer = made(name)
    texts = (TEXTS["English"], TEXTS["Hindi"], TEXTS["Japanese"])
    found = encoded(Document(texts), tokenizer)
    assert found == [own_ids(tokenizer, text) for text in texts]


def test_a_store_of_many_documents_is_the_tokenizers_own(tmp_path: Path):
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = [text.replace("\n", " ") for text in [*TEXTS.values(), *HARD_TEXTS] if text.strip()]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = TextData(
        source=TextSource(str(tmp_path / "a.jsonl")), shards=1, prepare_processes=1,
        tokenizer=TokenizerConfig("bpe", path=str(tmp_path / "tokenizer.json")),
        validation_fraction=0.0,
    )  # fmt: skip
    made = prepare(data, tmp_path / "store").train
    stops = made.document_ends.tolist()
    for text, start, stop in zip(texts, [0, *stops], stops, strict=False):
        ids = backend.encode(text, add_special_tokens=False).ids
        if "endoftext" not in text and "</s>" not in text:
            assert made.tokens(start, stop - start).tolist() == ids
    assert len(stops) == len(texts)


def test_an_older_store_is_used_and_its_difference_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(TEXTS["English"] * 20)
    data = TextData(
        source=TextSource(str(tmp_path / "a.txt")),
        tokenizer=TokenizerConfig("byte_level_bpe", 270),
        validation_fraction=0.0, shards=1, prepare_processes=1,
    )  # fmt: skip
    with monkeypatch.context() as older:
        older.setattr(store, "FORMAT", 1)
        fingerprint = prepare(data, tmp_path / "store").fingerprint
    capsys.readouterr()
    assert prepare(data, tmp_path / "store").fingerprint == fingerprint
    assert (
        "has format 1, in which each sentence was tokenized separately" in capsys.readouterr().err
    )
