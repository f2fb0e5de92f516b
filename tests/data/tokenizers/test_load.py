from __future__ import annotations

import dataclasses
import json
import os
import random
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from flax_transformers.data.tokenizers.load import (
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from flax_transformers.errors import UserError

KINDS = ("wordpiece", "unigram", "bpe", "bytes")
SENTENCES = ("The quick brown fox jumps over the lazy dog.", "She sells sea shells, he said.")


def words(seed: int, count: int) -> str:
    """Made-up words of two or three syllables."""
    choose = random.Random(seed)
    syllables = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "s")]
    drawn = (choose.choices(syllables, k=choose.randint(2, 3)) for _ in range(count))
    return " ".join(map("".join, drawn))


CORPUS = [*SENTENCES, *(words(seed, 200) for seed in range(20))]
SIZE = 500


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(TokenizerConfig(kind, SIZE), CORPUS) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, trained: dict[str, Tokenizer]) -> Tokenizer:
    return trained[request.param]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


@pytest.mark.slow
def test_a_batch_is_one_int32_array_per_text(tokenizer):
    batch = tokenizer.encode_batch([SENTENCES[0], "", SENTENCES[1]])
    assert [ids.dtype for ids in batch] == [np.int32] * 3
    assert [len(ids) > 0 for ids in batch] == [True, False, True]
    assert batch[2].tolist() == encode(tokenizer, SENTENCES[1])
    assert tokenizer.encode_batch([]) == []


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    size = 262 if tokenizer.kind == "bytes" else SIZE
    assert tokenizer.vocabulary.size == size
    assert len(set(tokenizer.pieces(range(size)))) == size


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wordpiece", {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}),
        ("unigram", {"pad": 0, "eos": 1, "unk": 2, "cls": 3, "sep": 4, "mask": 5}),
        ("bpe", {"pad": 0, "eos": 1, "unk": 2, "cls": 3, "sep": 4, "mask": 5}),
        ("bytes", {"pad": 0, "eos": 1, "unk": 2, "cls": 259, "sep": 260, "mask": 261}),
    ],
)
def test_special_ids_stand_where_the_papers_have_them(trained, kind, expected):
    vocabulary = trained[kind].vocabulary
    roles = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    found = {role: getattr(vocabulary, f"{role}_id") for role in roles}
    assert found == {role: expected.get(role) for role in roles}
    assert vocabulary.special_ids == tuple(sorted(expected.values()))


def test_text_never_yields_special_ids(tokenizer):
    vocabulary = tokenizer.vocabulary
    names = tokenizer.pieces(vocabulary.special_ids)
    literals = [*names, *map(str.lower, names), "<pad>", "</s>", "<s>", "<mask>", "<extra_id_0>"]
    texts = [t for name in literals for t in (name, f"sea{name}sea", f"a {name} b", name * 3)]
    forbidden = set(vocabulary.special_ids) - {vocabulary.unk_id}
    for ids in tokenizer.encode_batch(texts):
        assert len(ids) > 0
        assert not forbidden.intersection(ids.tolist())


def test_decoding_leaves_special_ids_out(tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = encode(tokenizer, "sea dog")
    row = [vocabulary.cls_id, *ids, vocabulary.sep_id, vocabulary.mask_id, vocabulary.pad_id]
    assert tokenizer.decode(row) == "sea dog"
    assert tokenizer.pieces(row)[0] == "[CLS]"
    assert tokenizer.pieces(row)[-3:-1] == ["[SEP]", "[MASK]"]


def test_words_start_where_word_start_says(tokenizer):
    starts = tokenizer.vocabulary.word_start
    assert starts.shape == (tokenizer.vocabulary.size,)
    assert starts.dtype == bool
    assert starts[list(tokenizer.vocabulary.special_ids)].all()
    ids = encode(tokenizer, "kanselbus ridentop fox")
    first = 1 if tokenizer.kind == "bytes" else 0  # a byte at the start has no space before it
    assert starts[ids].sum() + first == 3
    assert len(ids) > 3


TRICKY = ("", " \r\n\tb  ", "naïve ½ ﬁ e\u0301", "字\U0001f600\u200d\u202e", "\0\x7f", "▁ a▁")


@pytest.mark.parametrize("text", [*TRICKY, "".join(map(chr, range(3000)))])
def test_bytes_round_trip_every_string_exactly(trained, text):
    assert trained["bytes"].decode(encode(trained["bytes"], text)) == text


@pytest.mark.parametrize("data", [b"\xffa", "\ud800a".encode("utf-8", "surrogatepass")])
def test_bytes_that_are_no_text_decode_to_replacement_characters(trained, data):
    decoded = trained["bytes"].decode([byte + 3 for byte in data])
    assert decoded == "\N{REPLACEMENT CHARACTER}" * (len(data) - 1) + "a"
    decoded.encode()  # halves of surrogate pairs could not be written to a file


def test_bytes_are_utf8_plus_three(trained):
    assert encode(trained["bytes"], "aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  two  spaces\n\nand\tlines ", "two spaces and lines"),
        ("½ ﬁ \uff21", "1\u20442 fi A"),
        ("a▁b", "a b"),
        ("字 \U0001f600 Ω <0x41> ¤", "字 \U0001f600 Ω <0x41> ¤"),
        ("Case Stays", "Case Stays"),
    ],
)
def test_sentencepiece_loses_no_character_of_the_normalized_text(trained, kind, text, normalised):
    ids = encode(trained[kind], text)
    assert trained[kind].decode(ids) == normalised
    assert trained[kind].vocabulary.unk_id not in ids


def test_wordpiece_knows_no_foreign_characters(trained):
    ids = encode(trained["wordpiece"], "fox 字 dog")
    assert trained["wordpiece"].pieces(ids)[-4:].count("[UNK]") == 1


def test_wordpiece_marks_what_continues_a_word(trained):
    pieces = trained["wordpiece"].pieces(encode(trained["wordpiece"], "kanselbus"))
    assert pieces[0] + "".join(piece.removeprefix("##") for piece in pieces[1:]) == "kanselbus"
    assert all(piece.startswith("##") for piece in pieces[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_lowercase_makes_case_not_matter(trained, kind):
    lower = train_tokenizer(TokenizerConfig(kind, SIZE, lowercase=True), CORPUS)
    assert encode(lower, "The FOX") == encode(lower, "the fox")
    assert encode(trained[kind], "The FOX") != encode(trained[kind], "the fox")


def test_tokenizers_are_pickled_for_spawned_workers(tokenizer):
    other = ForkingPickler.loads(ForkingPickler.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint
    assert other.vocabulary == tokenizer.vocabulary
    text = f"{SENTENCES[0]} [MASK] </s>"
    assert encode(other, text) == encode(tokenizer, text)


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    assert loaded.vocabulary == tokenizer.vocabulary
    assert encode(loaded, SENTENCES[0]) == encode(tokenizer, SENTENCES[0])
    loaded.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_tokenizer_of_a_run_is_found_in_its_workdir(trained, tmp_path):
    trained["wordpiece"].save(tmp_path / "run" / "tokenizer")
    assert load_tokenizer(tmp_path / "run").fingerprint == trained["wordpiece"].fingerprint


def test_a_changed_file_in_a_saved_folder_is_noticed(trained, tmp_path):
    trained["wordpiece"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"fox"', '"fux"').replace('"T"', '"Ť"'))
    with pytest.raises(UserError, match=r"damaged: its content does not match the fingerprint"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_a_truncated_file_in_a_saved_folder_is_noticed(trained, tmp_path, kind):
    trained[kind].save(tmp_path)
    path = tmp_path / ("tokenizer.json" if kind == "wordpiece" else "spiece.model")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)


def test_a_truncated_config_file_is_noticed(trained, tmp_path):
    trained["bytes"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged: it is not JSON"):
        load_tokenizer(tmp_path)


def test_loading_from_nowhere_raises_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"There is no tokenizer at .*absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"contains no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="unknown ending"):
        load_tokenizer(tmp_path / "x.bin")


def test_saving_where_nothing_can_be_written_raises_a_user_error(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot save the tokenizer in .*file"):
        trained["bytes"].save(tmp_path / "file" / "below")


PUBLISHED = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "!"]


def vocab_txt(folder: Path, lines: list[str] = PUBLISHED) -> Path:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_vocab_txt_keeps_its_ids(tmp_path):
    tokenizer = load_tokenizer(vocab_txt(tmp_path), lowercase=True)
    assert encode(tokenizer, "The foxes! [unused0]") == [6, 7, 8, 9, 2, 2, 2]
    assert tokenizer.vocabulary.mask_id == 5
    assert tokenizer.vocabulary.special_ids == (0, 2, 3, 4, 5)
    assert tokenizer.vocabulary.size == 10


def test_a_hugging_face_folder_loads_without_our_config(tmp_path):
    vocab_txt(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = TokenizerConfig("wordpiece", path=str(tmp_path))
    assert encode(train_tokenizer(config, []), "the fox") == [6, 7]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*PUBLISHED, "fox"], "contains a token twice"),
        (PUBLISHED[3:], r"no line \[UNK\]"),
    ],
)
def test_a_vocab_txt_that_cannot_serve_raises_a_user_error(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(vocab_txt(tmp_path, lines))


def test_a_path_of_another_kind_raises_a_user_error(tmp_path):
    config = TokenizerConfig("unigram", path=str(vocab_txt(tmp_path)))
    with pytest.raises(UserError, match="is of kind wordpiece, the configuration asks for unigram"):
        train_tokenizer(config, [])


def test_special_tokens_beside_a_foreign_model_do_not_cut_its_words(tmp_path):
    letters = [(c, -5.0) for c in "▁</s>abcdep"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), *letters], 1)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary.eos_id == len(letters) + 2
    assert "".join(tokenizer.pieces(encode(tokenizer, "a</s>b"))) == "▁a</s>b"


def test_special_pieces_of_a_foreign_unigram_json_never_come_from_text(tmp_path):
    """Its own model holds "</s>" as a piece that plain text would match."""
    letters = [(c, -5.0) for c in "▁</s>abcdep"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], 2)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.kind, tokenizer.vocabulary.eos_id) == ("unigram", 1)
    ids = encode(tokenizer, "a</s>b")
    assert not {0, 1}.intersection(ids)
    assert "".join(tokenizer.pieces(ids)).replace("▁", "") == "a</s>b"


def test_special_pieces_that_a_published_model_exposes_never_come_from_text(trained, tmp_path):
    trained["unigram"].save(tmp_path)
    path = tmp_path / "spiece.model"
    model = sentencepiece_proto.ModelProto.FromString(path.read_bytes())
    model.pieces[5].type = model.pieces[5].USER_DEFINED
    model.pieces[SIZE - 1].piece = "<extra_id_0>"
    model.pieces[SIZE - 1].type = model.pieces[5].USER_DEFINED
    path.write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(path)
    assert not {5, SIZE - 1}.intersection(encode(tokenizer, "a [MASK] b <extra_id_0>"))
    assert {5, SIZE - 1} <= set(tokenizer.vocabulary.special_ids)
    assert tokenizer.vocabulary.mask_id == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_training_is_deterministic(trained, kind):
    again = train_tokenizer(TokenizerConfig(kind, SIZE), CORPUS)
    assert again.fingerprint == trained[kind].fingerprint


@pytest.mark.slow
def test_fingerprints_tell_tokenizers_apart(trained):
    smaller = train_tokenizer(TokenizerConfig("unigram", SIZE - 10), CORPUS)
    prints = [smaller.fingerprint, *(tokenizer.fingerprint for tokenizer in trained.values())]
    assert len(set(prints)) == 5


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
@pytest.mark.parametrize("texts", [[], ["", " \n "]])
def test_an_empty_corpus_raises_a_user_error(kind, texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(TokenizerConfig(kind, SIZE), texts)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest_that_works(kind):
    config = TokenizerConfig(kind, 100_000)
    with pytest.raises(UserError, match=r"set vocab_size to (\d+) or less") as caught:
        train_tokenizer(config, SENTENCES)
    largest = int(str(caught.value).split("set vocab_size to ")[1].split()[0])
    fitting = dataclasses.replace(config, vocab_size=largest)
    assert train_tokenizer(fitting, SENTENCES).vocabulary.size == largest


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_too_small_a_vocabulary_raises_a_user_error(kind):
    with pytest.raises(UserError, match="is too small for the"):
        train_tokenizer(TokenizerConfig(kind, 10), CORPUS)


def test_bytes_refuse_to_lowercase():
    with pytest.raises(UserError, match="set lowercase to False"):
        train_tokenizer(TokenizerConfig("bytes", lowercase=True), [])


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_an_error_in_the_corpus_reaches_the_user(kind):
    def broken():
        yield from CORPUS
        raise UserError("Row 7 is bad.")

    with pytest.raises(UserError, match=r"^Row 7 is bad\.$"):
        train_tokenizer(TokenizerConfig(kind, SIZE), broken())


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_reads_no_more_documents_than_asked_for(kind):
    def endless():
        yield from CORPUS
        raise AssertionError("one document too many")

    config = TokenizerConfig(kind, SIZE, training_documents=len(CORPUS))
    assert train_tokenizer(config, endless()).vocabulary.size == SIZE


def test_sentencepiece_trains_on_lines_of_any_length():
    """It would drop lines over 4192 bytes without a word."""
    one_line = " ".join(CORPUS)
    tokenizer = train_tokenizer(TokenizerConfig("bpe", SIZE), [one_line])
    assert len(encode(tokenizer, SENTENCES[0])) < len(SENTENCES[0])


def test_the_saved_wordpiece_files_are_what_bert_tools_read(trained, tmp_path):
    trained["wordpiece"].save(tmp_path)
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    assert lines == trained["wordpiece"].pieces(range(SIZE))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner = encode(trained["wordpiece"], "sea dog")
    assert backend.encode("sea dog").ids == [2, *inner, 3]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "BertTokenizer"
    assert (config["mask_token"], config["do_lower_case"]) == ("[MASK]", False)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def with_sentinels(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(request.param, SIZE, sentinels=20), CORPUS)


@pytest.mark.slow
def test_sentinels_descend_from_the_highest_id(with_sentinels):
    vocabulary = with_sentinels.vocabulary
    assert vocabulary.size == SIZE
    assert vocabulary.sentinel_ids == tuple(range(SIZE - 1, SIZE - 21, -1))
    assert with_sentinels.pieces([SIZE - 1, SIZE - 20]) == ["<extra_id_0>", "<extra_id_19>"]
    assert set(vocabulary.sentinel_ids) < set(vocabulary.special_ids)


def test_text_never_yields_sentinels(with_sentinels):
    ids = encode(with_sentinels, "sea <extra_id_0> sea<extra_id_19>")
    assert not set(ids) & set(with_sentinels.vocabulary.special_ids)
    assert with_sentinels.decode([*ids, SIZE - 1]) == "sea <extra_id_0> sea<extra_id_19>"


@pytest.mark.slow
def test_sentinels_are_saved_and_do_not_change_other_ids(with_sentinels, tmp_path):
    with_sentinels.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocabulary == with_sentinels.vocabulary
    plain = train_tokenizer(TokenizerConfig(with_sentinels.kind, SIZE - 20), CORPUS)
    assert plain.vocabulary.sentinel_ids == ()
    assert encode(plain, CORPUS[2]) == encode(with_sentinels, CORPUS[2])


def test_byte_sentinels_are_the_last_hundred_bytes(trained):
    vocabulary = trained["bytes"].vocabulary
    assert vocabulary.sentinel_ids == tuple(range(258, 158, -1))
    assert not set(vocabulary.sentinel_ids) & set(vocabulary.special_ids)


def test_a_published_t5_folder_says_how_many_sentinels_its_model_lacks(trained, tmp_path):
    trained["unigram"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 100}')
    vocabulary = load_tokenizer(tmp_path).vocabulary
    assert vocabulary.size == SIZE + 100
    assert vocabulary.sentinel_ids == tuple(range(SIZE + 99, SIZE - 1, -1))


def test_the_sentinels_of_a_tokenizer_json_are_found_by_name(trained, tmp_path):
    trained["wordpiece"].save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<extra_id_1>", "<extra_id_0>", "<extra_id_3>"])
    backend.save(str(tmp_path / "other.json"))
    loaded = load_tokenizer(tmp_path / "other.json")
    assert loaded.vocabulary.sentinel_ids == (SIZE + 1, SIZE)  # up to the first gap


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_sentinels_for_other_kinds_are_refused(kind):
    with pytest.raises(UserError, match="leave the tokenizer's sentinels at 0"):
        train_tokenizer(TokenizerConfig(kind, SIZE, sentinels=20), CORPUS)


def test_more_sentinels_than_pieces_are_refused():
    with pytest.raises(UserError, match=f"sentinels are {SIZE}; give a number from 0"):
        train_tokenizer(TokenizerConfig("unigram", SIZE, sentinels=SIZE), CORPUS)


def test_an_id_far_beyond_the_number_of_tokens_is_refused_before_a_table_is_made(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 1, "far": 10**8}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match="gives a token the id 100000000, but has only 3 tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_vocabulary_that_is_not_a_regular_file_is_not_read(tmp_path, make):
    make(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json is not a regular file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_link_to_nothing_is_no_missing_file(tmp_path, name):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / name).symlink_to("../../blobs/1")
    with pytest.raises(UserError, match=rf"{name} is a link to nothing; copy the folder again"):
        load_tokenizer(tmp_path)
