"""Tokenizers trained here in the files of exported models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers
from tokenizers.processors import TemplateProcessing

from flax_transformers.data.tokenizers.export import (
    export_folder,
    exported_files,
    warn_of_another_class,
)
from flax_transformers.data.tokenizers.layouts import bert_backend
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives import rows
from flax_transformers.objectives.base import Frame
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence, SentenceOrder
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.token_classification import TokenClassification
from tests.golden.multilingual import corpus, texts

FRAMINGS = ("bert", "roberta", "t5", "llama", "gpt2")
MASKED = (MaskedLM(), NextSentence(), SentenceOrder(), ReplacedTokenDetection())
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
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    typed = exported_files(trained, Frame(before=(start,)), 512, token_types=2)
    assert "token_type_ids" in json.loads(typed["tokenizer_config.json"])["model_input_names"]


def test_the_folder_of_a_run_is_exported_and_a_published_one_stays(trained, tmp_path):
    trained.save(tmp_path / "run", Frame(before=(trained.vocabulary.end_id,)))
    (tmp_path / "run" / "additional_chat_templates").mkdir()
    others = ("generation_config.json", "additional_chat_templates/rag.jinja")
    for name in others:
        (tmp_path / "run" / name).write_text("{}")
    out = export_folder(tmp_path / "run", tmp_path / "out", None)
    assert out == tmp_path / "out" and all((out / name).is_file() for name in others)
    assert "flax_transformers" not in (out / "tokenizer_config.json").read_text()
    frame = load_tokenizer(out).vocabulary.frame
    assert frame == Frame(before=(trained.vocabulary.end_id,))
    assert export_folder(out, tmp_path / "again", None) == out


def exported(tokenizer, objective, folder, noted):
    """The tokenizer.json of a run with an objective, which ``noted`` its special tokens or not."""
    frame = rows.run_frame(objective, tokenizer.vocabulary)
    if frame is None:
        assert tokenizer.vocabulary.cls_id is None
        pytest.skip("byte-level BPE is trained without [CLS]")
    tokenizer.save(folder / "run", frame if noted else None)
    out = export_folder(folder / "run", folder / "out", None, 2, None if noted else objective)
    return tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))


def prepared(objective, tokenizer, texts):
    """The ids and token types that a labelled objective gives the model."""
    ids = tokenizer.encode_batch(texts)
    tokens = np.concatenate(ids)
    example = {
        "tokens": tokens,
        "text_ends": np.cumsum([len(one) for one in ids]),
        "labels": np.zeros(1, np.int32),
    }
    if isinstance(objective, QuestionAnswering):
        question = {"question_tokens": ids[0], "tokens": ids[1], "offset": np.array(0)}
        example = {**question, "spans": np.zeros((1, 2), np.int32)}
    row = objective.prepare(example, np.random.default_rng(0), tokenizer.vocabulary, 8_192)
    if isinstance(objective, MultipleChoice):
        row = {name: row[name][0] for name in ("input_ids", "attention_mask", "token_type_ids")}
    used = int(row["attention_mask"].sum())
    return [row.get(name, row["input_ids"] * 0)[:used].tolist()
            for name in ("input_ids", "token_type_ids")]  # fmt: skip


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_labelled_texts_are_exported_as_they_were_framed(trained, tmp_path, framing, noted):
    objective = SequenceClassification(framing=framing)
    backend = exported(trained, objective, tmp_path, noted)
    for text in GIVEN:
        assert backend.encode(text).ids == prepared(objective, trained, [text])[0]
    found = backend.encode(*GIVEN[:2])
    ids, types = prepared(objective, trained, GIVEN[:2])
    assert found.ids == ids
    if framing in ("bert", "roberta"):  # models of the other families have no token types
        assert found.type_ids == types


@pytest.mark.parametrize(
    "objective", [QuestionAnswering(max_question_length=4_096), MultipleChoice()]
)
def test_two_texts_of_a_task_are_exported_as_they_were_framed(trained, tmp_path, objective):
    found = exported(trained, objective, tmp_path, True).encode(*GIVEN[:2])
    assert [found.ids, found.type_ids] == prepared(objective, trained, GIVEN[:2])


@pytest.mark.parametrize("objective", [*MASKED, TokenClassification()])
def test_texts_of_other_encoders_are_exported_in_cls_and_sep(trained, tmp_path, objective):
    backend = exported(trained, objective, tmp_path, True)
    for text, ids in zip(GIVEN, trained.encode_batch(GIVEN), strict=True):
        example = {"tokens": ids, "document_ends": np.array([len(ids)])}
        assert backend.encode(text).ids == rows.frame(example, trained.vocabulary).tolist()
    found = load_tokenizer(tmp_path / "out")
    assert found.vocabulary.frame == Frame(trained.frame.before, trained.frame.after)


CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "cafe"]


@pytest.mark.parametrize("beside", [{}, {"model_type": "bert"}])
def test_a_vocabulary_with_capital_letters_is_exported_as_one(tmp_path, beside):
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in CASED))
    (tmp_path / "config.json").write_text(json.dumps(beside))
    load_tokenizer(tmp_path).save(tmp_path / "run")
    out = export_folder(tmp_path / "run", tmp_path / "out", None)
    config = json.loads((out / "tokenizer_config.json").read_text())
    normalizer = json.loads((out / "tokenizer.json").read_text())["normalizer"]
    assert normalizer["lowercase"] is False and "strip_accents" not in config
    if beside:
        assert config["tokenizer_class"] == "BertTokenizer" and config["do_lower_case"] is False
    else:
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


OWN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|end|>", "a", "b", "ab"]


def own_tokenizer(folder, beside=None, frame=None):
    """A tokenizer.json of a user's own, without special tokens around texts."""
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(OWN)}, [("a", "b")]))
    backend.add_special_tokens(OWN[:6])
    if frame is not None:
        backend.post_processor = frame
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
        return load_tokenizer(folder)
    return load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("beside", [None, {"tokenizer_class": "PreTrainedTokenizerFast"}])
@pytest.mark.parametrize("frame", [Frame((2,), (3,), ()), Frame((5,))])
def test_an_own_tokenizer_json_is_exported_with_class_roles_and_frame(tmp_path, beside, frame):
    own_tokenizer(tmp_path / "own", beside).save(tmp_path / "run", frame)
    out = export_folder(tmp_path / "run", tmp_path / "out", 512, token_types=2)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]", "model_max_length": 512, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert backend.encode("abb").ids == [*frame.before, 8, 7, *frame.after]
    if frame.before_second is not None:
        assert backend.encode("ab", "b").ids == [2, 8, 3, 7, 3]


def test_the_special_tokens_of_an_own_tokenizer_json_stay_where_the_run_has_them(tmp_path):
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    frame = TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    beside = {"bos_token": "[CLS]", "padding_side": "left", "tokenizer_class": "TokenizersBackend"}
    own = own_tokenizer(tmp_path / "own", beside, frame)
    files = exported_files(own, own.frame, 512)
    config = json.loads(files["tokenizer_config.json"])
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert backend.encode("ab", "b").ids == [2, 8, 3, 7, 3]
    assert config["padding_side"] == "left" and "pad_token" not in config
    assert (config["tokenizer_class"], config["bos_token"]) == ("PreTrainedTokenizerFast", "[CLS]")
    other = tokenizers.Tokenizer.from_str(
        exported_files(own, Frame(after=(5,)), 512)["tokenizer.json"].decode()
    )
    assert other.encode("ab").ids == [8, 5]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_own_sentencepiece_model_is_exported_as_a_tokenizer_json(tmp_path, caplog, kind):
    for symbols in ([], ["<sep>"]):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the fox and the dog"] * 9), vocab_size=32, model_type=kind,
            model_prefix=str(tmp_path / "own"), user_defined_symbols=symbols, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        own = load_tokenizer(tmp_path / "own.model")
        files = exported_files(own, None, 512)
        assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
        config = json.loads(files["tokenizer_config.json"])
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        for text in ("the fox", "dog  zoo"):
            assert backend.encode(text).ids == [1, *own.encode_batch([text])[0].tolist()]
        assert ("which has the symbol '<sep>'" in caplog.text) is (kind == "bpe" and bool(symbols))


def test_a_normalizer_that_is_not_that_of_its_class_is_noticed_and_exported(tmp_path, caplog):
    backend = bert_backend(models.WordPiece({p: i for i, p in enumerate(CASED)}), True)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=True, strip_accents=False, handle_chinese_chars=False
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    options = {"strip_accents": False, "tokenize_chinese_chars": False}
    assert f"tokenizer_config.json does not have {json.dumps(options)}" in caplog.text
    files = exported_files(tokenizer, None, None)
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "BertTokenizer", **options
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    caplog.clear()
    load_tokenizer(tmp_path)
    assert not caplog.text


def test_a_tokenizer_that_transformers_takes_for_that_of_qwen2_is_noticed(tmp_path, caplog):
    pieces, merges = {letter: i for i, letter in enumerate("abc")}, [("a", "b")]
    (tmp_path / "vocab.json").write_text(json.dumps(pieces | {"ab": 3}))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    for name in ("Qwen2", "GPT2"):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{name}Tokenizer"}}')
        load_tokenizer(tmp_path).save(tmp_path / name)  # with a tokenizer.json
    warn_of_another_class(tmp_path / "Qwen2", "qwen2")
    warn_of_another_class(tmp_path / "GPT2", "qwen3")
    assert not caplog.text
    warn_of_another_class(tmp_path / "GPT2", "qwen2")
    assert "load it with PreTrainedTokenizerFast.from_pretrained" in caplog.text


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_of_a_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer_config.json is damaged: it is not JSON"):
        export_folder(tmp_path, tmp_path / "out", None)
