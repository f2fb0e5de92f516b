"""Log-likelihoods and pseudo-log-likelihoods of texts by ``predict --score``."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
import tokenizers

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.evaluation.scoring.likelihood import bytes_of_first
from tests.golden.multilingual import corpus
from tests.huggingface.tensors import drawn_model

pytestmark = pytest.mark.usefixtures("one_device")

TEXTS = ["one", "a longer text", "x", "two words, é"]


@pytest.fixture
def model_of(tmp_path):
    def write(architecture, **changes):
        model, params = drawn_model(architecture, vocab_size=384, **changes)
        ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
        (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
        model, params = ft.load_pretrained(tmp_path / "hf")
        return model, params, ["predict", str(tmp_path / "hf"), "--input"]

    return write


def scores(capsys, command):
    capsys.readouterr()
    assert main(command) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_a_text_has_the_sum_of_the_log_probabilities_of_its_tokens(model_of, tmp_path, capsys):
    model, params, command = model_of("GPT2LMHeadModel")
    command += [str(tmp_path / "texts.txt"), "--score"]
    found = scores(capsys, [*command, "--batch-size", "3"])
    frame = ft.load_tokenizer(tmp_path / "hf").frame
    before = [] if frame is None else list(frame.before)
    texts = [[*before, *(byte + 3 for byte in text.encode())] for text in TEXTS]
    rows = np.zeros((len(texts), 16), np.int32)  # what follows a token changes nothing
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = ids
    logits = jax.jit(model.apply)({"params": params}, rows).logits
    shares = np.asarray(jax.nn.log_softmax(logits))
    for text, ids, share, line in zip(TEXTS, texts, shares, found, strict=True):
        first = max(1, len(before))
        total = sum(share[i - 1, ids[i]] for i in range(first, len(ids)))
        assert line["tokens"] == len(ids) - first
        assert line["log_likelihood"] == pytest.approx(total, rel=1e-4, abs=1e-6)
        assert line["bits_per_byte"] == pytest.approx(
            -total / math.log(2) / len(text.encode()), rel=1e-4, abs=1e-6
        )
        if line["tokens"]:
            perplexity = math.exp(-total / line["tokens"])
            assert line["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    again = scores(capsys, [*command, "--batch-size", "1"])
    for one, other in zip(found, again, strict=True):
        assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_bytes_of_a_first_token_that_is_not_scored_do_not_count(tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "é": 1}, "é"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    model, params = drawn_model("GPT2LMHeadModel", vocab_size=2, bos_id=None, eos_ids=())
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer_from=tmp_path / "words")
    (tmp_path / "texts.txt").write_text("one é\none\n")
    command = ["predict", str(tmp_path / "hf"), "--input", str(tmp_path / "texts.txt"), "--score"]
    two, one = scores(capsys, command)
    bits = -two["log_likelihood"] / math.log(2)
    assert two["tokens"] == 1 and two["bits_per_byte"] == pytest.approx(bits / len(" é".encode()))
    assert (one["tokens"], one["bits_per_byte"]) == (0, None)


@pytest.mark.parametrize(
    ("kind", "text", "size"),
    [
        ("bytes", "éa", 1),
        ("byte_level_bpe", "All human", 3),
        ("unigram", "All human", 3),
        ("wordpiece", "Ärzte", 2),
    ],
)
def test_the_first_token_has_its_bytes(kind, text, size):
    tokenizer = train_tokenizer(TokenizerConfig(kind, 1_500), corpus())
    assert bytes_of_first(text, tokenizer) == size


class Offsets:
    def __init__(self, *offsets):
        self._offsets = np.array(offsets)

    def encode_with_offsets(self, texts):
        return [(np.zeros(len(self._offsets), np.int32), self._offsets) for _ in texts]


def test_tokens_that_end_within_a_character_share_its_bytes():
    assert bytes_of_first("ール", Offsets((0, 2), (1, 2))) == 4.5
    assert bytes_of_first(" ーx", Offsets((1, 2), (2, 3))) == 4


@pytest.mark.slow
def test_a_masked_model_scores_each_token_that_it_does_not_see(tmp_path, capsys):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    model, params = drawn_model("BertForMaskedLM", vocab_size=len(pieces))
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer_from=tmp_path / "vocabulary")
    model, params = ft.load_pretrained(tmp_path / "hf")
    (tmp_path / "texts.txt").write_text("a b c\nf\n")
    command = ["predict", str(tmp_path / "hf"), "--input", str(tmp_path / "texts.txt"), "--score"]
    found = scores(capsys, [*command, "--batch-size", "3"])
    apply = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask).logits)
    for words, line in zip(([5, 6, 7], [10]), found, strict=True):
        total = 0.0
        for place in range(len(words)):
            ids, mask = np.zeros((2, 1, 5), np.int32)
            ids[0, : len(words) + 2], mask[0, : len(words) + 2] = [2, *words, 3], 1
            ids[0, place + 1] = 4
            logits = apply(ids, mask)
            total += float(jax.nn.log_softmax(logits[0, place + 1])[words[place]])
        assert line["pseudo_log_likelihood"] == pytest.approx(total, rel=1e-4)
        assert line["tokens"] == len(words)
        assert line["pseudo_perplexity"] == pytest.approx(math.exp(-total / len(words)), rel=1e-4)


def test_texts_that_are_too_long_and_models_without_words_are_refused(model_of, tmp_path, capsys):
    _, _, command = model_of("GPT2LMHeadModel", max_positions=16)
    (tmp_path / "long.txt").write_text("short\n" + "x" * 40 + "\n")
    assert main([*command, str(tmp_path / "long.txt"), "--score"]) == 2
    assert "row 2 has 40 tokens, but the model scores up to" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "texts.txt"), "--score", "--pool", "mean"]) == 2
    assert "exclude each other" in capsys.readouterr().err
