"""``generate``: a text goes on, from a Hugging Face directory or one of our checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.families.bart import BartConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.generation import translate
from flax_transformers.generation.prompts import read_prompts, rows_of
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig

pytestmark = pytest.mark.usefixtures("one_device")

WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e"]
TINY = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=8,
    bos_id=0,
    eos_ids=(1,),
)


def published_tokenizer(folder, special=("<s>", "</s>")):
    """A tokenizer.json of words that begins every text with <s>."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(zip(WORDS, range(7), strict=True)), "a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


def tokenizer_with_added_padding(folder):
    """That tokenizer with [PAD] after the words, for which their models have no embedding."""
    published_tokenizer(folder, special=("<s>", "</s>", "[PAD]"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def counting_params(model):
    """Parameters with which each word is followed by the next one: a -> b -> c -> d -> e -> </s>.

    The layer adds nothing; words are unit vectors, and the head turns each into the next.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nn.meta.unbox(boxed))
    params["final_norm"]["scale"] = np.ones(8, np.float32)
    params["words"]["embedding"][:7, :7] = np.eye(7)
    for this, following in ((2, 3), (3, 4), (4, 5), (5, 6), (6, 1)):
        params["lm_head"]["words"]["kernel"][this, following] = 1.0
    return params


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved model that counts, with its tokenizer."""
    folder = tmp_path_factory.mktemp("counting")
    published_tokenizer(folder / "tokenizer")
    model = build_model(TINY, ComputeConfig())
    ft.save_pretrained(
        folder / "model", model, counting_params(model), tokenizer_from=folder / "tokenizer"
    )
    return folder / "model"


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_a_sharded_model_writes_the_same(directory, capsys, monkeypatch):
    shares, plain = [], ft.load_pretrained

    def load(*args, **how):
        model, params = plain(*args, **how)
        kernel = params["lm_head"]["words"]["kernel"]
        shares.append(kernel.addressable_shards[0].data.size / kernel.size)
        return model, params

    monkeypatch.setattr("flax_transformers.pretrained.load_pretrained", load)
    command = ["generate", str(directory), "--prompt", "b a b"]
    assert main([*command, "--mesh.fsdp", "2", "--mesh.data", "4"]) == 0
    assert capsys.readouterr().out == "b a b c d e\n"
    assert shares == [1 / 2]


@pytest.mark.usefixtures("eight_devices")
def test_a_mesh_that_does_not_fit_and_an_unknown_flag_are_named(directory, capsys):
    command = ["generate", str(directory), "--prompt", "b"]
    assert main([*command, "--mesh.tensor", "3"]) == 2
    assert "mesh data=-1 x tensor=3 does not fit 8 devices" in capsys.readouterr().err
    assert main([*command, "--mesh.tensr", "2"]) == 2
    assert "there is no option --mesh.tensr; did you mean --mesh.tensor?" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_directory_continues_a_prompt_until_the_end_token(directory, capsys):
    assert main(["generate", str(directory), "--prompt", "b a b"]) == 0
    assert capsys.readouterr().out == "b a b c d e\n"
    assert main(["generate", str(directory), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == "a b c\n"


@pytest.mark.slow
def test_prompts_given_together_are_continued_as_those_given_alone(directory, capsys):
    assert main(["generate", str(directory), "--prompt", ""]) == 0
    alone = capsys.readouterr().out
    prompts = ["--prompt", "b a b", "--prompt", "c", "--prompt", ""]
    assert main(["generate", str(directory), *prompts]) == 0
    assert capsys.readouterr().out == f"b a b c d e\nc d e\n{alone}"


def test_a_converted_checkpoint_continues_a_prompt_alike(directory, tmp_path, capsys):
    assert main(["convert", str(directory), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "ours"), "--prompt", "c"]) == 0
    assert capsys.readouterr().out == "c d e\n"


@pytest.mark.slow
def test_a_seed_gives_the_same_sample_again(directory, capsys):
    def sample(seed):
        settings = ["--temperature", "50", "--top-k", "6", "--seed", str(seed)]
        assert main(["generate", str(directory), "--prompt", "a", *settings]) == 0
        return capsys.readouterr().out

    first = sample(3)
    assert sample(3) == first
    assert {sample(seed) for seed in range(2)} != {first}


@pytest.mark.slow
def test_beams_stop_strings_and_a_file_of_prompts(directory, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("b a b\nc\na\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "2"]
    beams = ["--num-beams", "2", "--stop", "e"]
    assert main(["generate", str(directory), *prompts, *beams]) == 0
    assert capsys.readouterr().out == "b a b c d \nc d \na b c d \n"
    # The stop string "c d" begins in the second prompt, and would have been in the first text.
    assert main(["generate", str(directory), *prompts, "--stop", "c d"]) == 0
    assert capsys.readouterr().out == "b a b \n\na b \n"


@pytest.mark.slow
def test_a_stream_prints_the_same_text(directory, capsys):
    assert main(["generate", str(directory), "--prompt", "b a b", "--stream"]) == 0
    assert capsys.readouterr().out == "b a b c d e\n"
    command = ["generate", str(directory), "--prompt", "a", "--stream", "--stop", "c d"]
    assert main(command) == 0
    assert capsys.readouterr().out == "a b \n"


@pytest.mark.slow
def test_a_special_token_that_is_a_stop_string_ends_the_text(directory, tmp_path, capsys):
    model = str(shutil.copytree(directory, tmp_path / "model"))
    published_tokenizer(tmp_path / "model", special=["<s>", "</s>", "d"])
    command = ["generate", model, "--prompt", "a b"]
    assert main(command) == 0
    assert capsys.readouterr().out == "a b c e\n"
    for options in ([], ["--stream"], ["--num-beams", "2"]):
        assert main([*command, "--stop", "d", "--stop", "z", *options]) == 0
        assert capsys.readouterr().out == "a b c\n"


def refused(capsys, *arguments):
    assert main(["generate", *arguments]) == 2
    return capsys.readouterr().err.strip()


@pytest.mark.slow
def test_a_model_without_a_language_modelling_head_is_refused(capsys, tmp_path):
    model = build_model(dataclasses.replace(TINY, architecture="LlamaModel"), ComputeConfig())
    params = counting_params(build_model(TINY, ComputeConfig()))
    del params["lm_head"]
    ft.save_pretrained(tmp_path / "bare", model, params)
    said = refused(capsys, str(tmp_path / "bare"), "--prompt", "a")
    assert "LlamaModel does not generate text" in said


def test_a_missing_folder_is_named(capsys, tmp_path):
    said = refused(capsys, str(tmp_path / "nowhere"), "--prompt", "a")
    assert said.startswith("flax-transformers: ") and "nowhere" in said


@pytest.mark.slow
def test_a_directory_without_a_tokenizer_is_named(capsys, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "contains no tokenizer" in refused(capsys, str(tmp_path / "bare"), "--prompt", "a")


def test_a_published_tokenizer_adds_its_special_tokens_to_a_prompt(tmp_path):
    published_tokenizer(tmp_path)
    prompts = read_prompts(tmp_path, TINY)
    assert list(prompts.encode("b a")) == [0, 3, 2]
    assert prompts.decode([0, 3, 2, 1]) == "b a"


def test_the_generation_config_adds_end_tokens(tmp_path):
    published_tokenizer(tmp_path)
    for said, ends in ((5, (1, 5)), ([5, 6], (1, 5, 6)), (None, (1,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert read_prompts(tmp_path, TINY).eos_ids == ends


def test_the_two_files_of_an_old_gpt2_are_read(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {piece: i for i, piece in enumerate([*alphabet, "he", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    config = GPT2Config(vocab_size=len(words), eos_ids=(257,))
    prompts = read_prompts(tmp_path, config)
    ids = prompts.encode("he ho")
    assert ids[0] == words["he"] and len(ids) == 4
    assert prompts.decode(ids) == "he ho"


def test_a_sentencepiece_model_begins_a_text_as_the_model_does(tmp_path):
    trained_pieces(tmp_path / "tokenizer.model")
    prompts = read_prompts(tmp_path, LlamaConfig(vocab_size=26, eos_ids=()))
    ids = list(prompts.encode("the cat"))
    assert ids[0] == 1 and prompts.eos_ids == (2,)
    assert prompts.decode(ids) == "the cat"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no tokenizer")
    with pytest.raises(UserError, match="The tokenizer .*is damaged"):
        read_prompts(tmp_path, TINY)


def test_a_prompt_begins_as_documents_do_in_training(tmp_path):
    train_tokenizer(TokenizerConfig("bytes"), []).save(tmp_path)
    prompts = read_prompts(tmp_path, LlamaConfig(vocab_size=262, eos_ids=()))
    assert list(prompts.encode("a")) == [1, ord("a") + 3]
    assert prompts.eos_ids == (1,)


def test_only_a_token_that_the_model_lacks_is_refused(tmp_path):
    published_tokenizer(tmp_path)
    prompts = read_prompts(tmp_path, SimpleNamespace(vocab_size=5, padded_vocab_size=128))
    assert list(prompts.encode("b c")) == [0, 3, 4]
    with pytest.raises(UserError, match="the token 'd' with id 5, but the model has only 5"):
        prompts.encode("b d")


def test_prompts_are_padded_on_the_left_to_a_power_of_two():
    ids, mask = rows_of([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert rows_of([[1]], 0)[0].shape == (1, 1) and rows_of([[]], 0)[1].tolist() == [[0]]


def test_sources_are_padded_on_the_right():
    ids, mask = rows_of([[5, 6, 7], [8]], 9, padded="right")
    assert ids.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def trained_pieces(file):
    lines = ["the cat sat on the mat", "a dog ran over the hill", "she sells sea shells"]
    with open(file, "wb") as opened:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=opened, vocab_size=26, minloglevel=2
        )


@pytest.fixture
def marian(tmp_path):
    """The files of Marian, whose ids go the other way round, and the ids."""
    for name in ("source.spm", "target.spm"):
        trained_pieces(tmp_path / name)
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "source.spm"))
    known = [model.id_to_piece(i) for i in range(25, 2, -1)]
    words = ["</s>", "<unk>", *known, ">>fra<<", "<pad>"]
    ids = {piece: i for i, piece in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    return tmp_path, ids, model


def test_the_ids_of_marian_are_those_of_its_vocabulary(marian):
    folder, ids, model = marian
    prompts = read_prompts(folder, MarianConfig(vocab_size=28, eos_ids=(0,)))
    pieces = model.encode("the cat", out_type=str)
    found = list(prompts.encode("the cat"))
    assert found == [*(ids[piece] for piece in pieces), 0]
    assert prompts.decode([ids["<pad>"], *found]) == "the cat" and prompts.eos_ids == (0,)


def test_a_language_begins_a_source_of_marian_and_unknown_pieces_have_their_id(marian):
    folder, ids, _ = marian
    encode = read_prompts(folder, MarianConfig(vocab_size=28)).encode
    assert list(encode(">>fra<< the")) == [ids[">>fra<<"], *encode("the")]
    assert list(encode(">>xxx<< the")) == [1, *encode("the")]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "vocab.json").unlink(), "has a source.spm but no vocab.json"),
        (lambda d: (d / "vocab.json").write_text("{}"), "vocab.json is not a table of ids"),
        (lambda d: (d / "target.spm").unlink(), "no target.spm"),
        (lambda d: (d / "target.spm").write_bytes(b"none"), "target.spm is damaged"),
        (lambda d: (d / "target_vocab.json").write_text("{}"), "Marian with two vocabularies"),
    ],
)
def test_files_of_marian_that_cannot_be_read_are_named(marian, spoil, said):
    spoil(marian[0])
    with pytest.raises(UserError, match=said):
        read_prompts(marian[0], MarianConfig(vocab_size=28))


def test_a_sentencepiece_model_of_mbart_without_ids_is_refused(tmp_path):
    trained_pieces(tmp_path / "sentencepiece.bpe.model")
    with pytest.raises(
        UserError, match="ids of the pieces of sentencepiece.bpe.model are not known"
    ):
        read_prompts(tmp_path, BartConfig())


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A saved BART with a tokenizer, and a list of what ``generate_target`` was called with."""
    published_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"forced_bos_token_id": 4}')
    config = BartConfig(
        vocab_size=7,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        intermediate_size=8,
        max_positions=16,
        pad_id=6,
        eos_ids=(1,),
        decoder_start_id=1,
    )
    model = build_model(config, ComputeConfig())
    boxed = jax.jit(model.init)(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    params = nn.meta.unbox(boxed)
    ft.save_pretrained(tmp_path / "model", model, params, tokenizer_from=tmp_path / "tokenizer")
    calls, write = [], translate.generate_target

    def recorded(model, params, ids, mask, **settings):
        calls.append({"ids": ids, "mask": mask, **settings})
        return write(model, params, ids, mask, **settings)

    monkeypatch.setattr(translate, "generate_target", recorded)
    return tmp_path / "model", calls


@pytest.mark.slow
def test_a_target_starts_with_the_forced_token_unless_start_ids_are_given(answering, capsys):
    folder, calls = answering
    command = ["generate", str(folder), "--prompt", "a b c", "--max-new-tokens", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == "c\n"
    assert calls[0]["ids"].tolist() == [[0, 2, 3, 4, 1, 6, 6, 6]]
    assert calls[0]["mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    command[3] = "a </s> b"
    assert main([*command, "--start-ids", "1,5"]) == 0
    assert calls[1]["start_ids"] == (1, 5)
    assert capsys.readouterr().out != "c\n"  # nothing is forced after a beginning of two ids
    assert calls[1]["ids"].tolist() == [[0, 2, 1, 3]]  # as mBART's, which has the language last


@pytest.mark.slow
def test_start_ids_are_for_encoder_decoders(directory, capsys):
    said = refused(capsys, str(directory), "--prompt", "a", "--start-ids", "1")
    assert "--start-ids is for encoder-decoders" in said


def test_start_ids_that_are_no_numbers_are_refused(capsys, tmp_path):
    said = refused(capsys, str(tmp_path), "--prompt", "a", "--start-ids", "2,fr")
    assert "--start-ids is '2,fr'; give ids separated by commas" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-beams", "4", "--temperature", "0.8"], "beam search does not sample"),
        (["--length-penalty", "0.6"], "apply to beam search only; give num_beams"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts in nowhere.txt"),
        (["--prompt", "b", "--stream"], "--stream prints one text, and there are 2 prompts"),
        (["--early-stopping", "maybe"], "--early-stopping is 'maybe'"),
        (["--num-beams", "2", "--stream"], "beam search has no text before its end"),
    ],
)
def test_options_that_exclude_each_other_are_refused(directory, capsys, options, says):
    assert says in refused(capsys, str(directory), "--prompt", "a", *options)


def test_an_empty_line_of_a_file_of_prompts_is_named(directory, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    said = refused(capsys, str(directory), "--prompts", str(tmp_path / "prompts.txt"))
    assert "line 2 of" in said and "is empty" in said
