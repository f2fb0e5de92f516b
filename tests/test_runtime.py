"""The model of a run that starts from the weights of another; nothing here is compiled."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from jax.experimental import multihost_utils

import flax_transformers as ft
from flax_transformers import runtime
from flax_transformers.cli.evaluate import _check_data
from flax_transformers.cli.main import main
from flax_transformers.config_json import to_json
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.prepare.cached_stores import cache_directory
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.parallel import distributed
from flax_transformers.storage.file_hashes import cache_root
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config, write_corpus
from flax_transformers.training.config import Phase
from tests.data.images.test_dataset import write_folder
from tests.huggingface.tensors import drawn_model

SMALLER = dataclasses.replace(tiny_bert(), num_layers=1, intermediate_size=16)


def write_step(folder, model):
    """A step folder as training leaves it, but for its weights."""
    for name in ("state/_METADATA", "state/manifest.ocdbt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    meta = {"config": {"model": to_json(model)}, "position": {"step": int(folder.name)}}
    (folder / "meta").mkdir()
    (folder / "meta" / "metadata").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def from_smaller(tmp_path):
    """The config of a run that starts from the weights of a model with one layer."""
    initial = write_step(tmp_path / "other" / "checkpoints" / "7", SMALLER)
    return dataclasses.replace(tiny_config("text.txt", "store"), init_from=str(initial))


def test_a_run_stopped_before_its_first_checkpoint_starts_from_init_from_again(
    from_smaller, tmp_path
):
    workdir = tmp_path / "run"
    assert runtime.with_initial_model(from_smaller, [], workdir).model == SMALLER
    (workdir / "checkpoints").mkdir(parents=True)
    assert runtime.with_initial_model(from_smaller, [], workdir).model == SMALLER
    trained = dataclasses.replace(SMALLER, intermediate_size=24)
    write_step(workdir / "checkpoints" / "5", trained)
    assert runtime.with_initial_model(from_smaller, [], workdir).model == trained


def test_a_resumed_run_keeps_the_end_ids_that_it_began_with(tmp_path):
    model = dataclasses.replace(tiny_architecture("LlamaForCausalLM"), eos_ids=(6,))
    initial = write_step(tmp_path / "other" / "checkpoints" / "7", model)
    recipe = dataclasses.replace(model, eos_ids=(6, 9))
    config = dataclasses.replace(
        tiny_config("text.txt", "store"), model=recipe, init_from=str(initial)
    )
    workdir = tmp_path / "run"
    assert runtime.with_initial_model(config, [], workdir).model == recipe
    write_step(workdir / "checkpoints" / "5", model)
    assert runtime.with_initial_model(config, [], workdir).model == model
    given = ["--model.eos-ids", "6", "9"]
    with pytest.raises(UserError, match="holds a model whose eos_ids is"):
        runtime.with_initial_model(config, given, workdir)
    write_step(workdir / "checkpoints" / "6", recipe)
    assert runtime.with_initial_model(config, given, workdir).model == recipe


def test_a_part_of_a_field_of_the_model_names_the_field():
    overrides = ["--model.generation.num-beams=1", "--model.hidden-size", "8", "--seed", "1"]
    assert runtime.given_fields(overrides) == {"generation", "hidden_size"}


def test_a_stored_model_is_restored_with_the_generation_settings_of_its_config(tmp_path):
    model, params = drawn_model("GPT2LMHeadModel")
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    stored = runtime.stored_model(str(tmp_path / "hf"))
    beams = dataclasses.replace(stored.model.generation, num_beams=4)
    stored = dataclasses.replace(stored, model=dataclasses.replace(stored.model, generation=beams))
    restored = runtime.restored_model(stored)
    assert restored.model.config == restored.model_config == stored.model


def test_a_resumed_run_of_images_takes_its_own_store_before_one_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "pets", ("Training", "Testing"))
    data = ImageData(source=ImageSource(str(folder)))
    before = cache_directory({"images": data.origin}, lambda: "a version before")  # its name there
    former = prepare(dataclasses.replace(data, store=before))
    found = runtime.prepared_data(data, trained_on=former.fingerprint)
    assert found.directory == before
    assert {*os.listdir(os.path.dirname(before))} == {"known", os.path.basename(before)}
    other = runtime.prepared_data(data, trained_on="another store")
    assert other.directory not in (None, before)
    # A store of this version that the run was trained on goes first.
    assert runtime.prepared_data(data, trained_on=other.fingerprint).directory == other.directory


def test_a_job_of_several_processes_prepares_no_data(tmp_path, monkeypatch):
    write_corpus(tmp_path / "text.txt", documents=20)
    data = tiny_config(tmp_path / "text.txt", tmp_path / "store").data
    monkeypatch.setattr(runtime.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="There is no finished token store"):
        runtime.prepared_data(data)


def test_a_tokenizer_that_does_not_fit_is_refused_before_data_are_prepared(tmp_path, capsys):
    write_corpus(tmp_path / "text.txt", documents=20)
    store = tmp_path / "store"
    config = tiny_config(tmp_path / "text.txt", store, model=tiny_bert(pad_id=5))
    with pytest.raises(UserError, match="pads with id 0, but model.pad_id is 5"):
        ft.train(config, tmp_path / "run")
    assert not store.exists()
    options = ["--data.source.path", str(tmp_path / "text.txt"), "--data.store", str(store)]
    options += ["--data.validation-fraction", "0.2", "--data.tokenizer.kind", "bytes"]
    options += ["--data.tokenizer.lowercase", "None"]
    options += ["--model.vocab-size", "262", "--model.pad-id", "5"]
    assert main(["doctor", "--config", "bert_tiny", "--platform", "cpu", *options]) == 2
    assert "pads with id 0, but model.pad_id is 5" in capsys.readouterr().err
    trained = dataclasses.replace(config.data, tokenizer=TokenizerConfig("unigram", 262))
    runtime.check_known_tokenizers(dataclasses.replace(config, data=trained))
    prepare(config.data)
    runtime.check_known_tokenizers(config)  # `check_run` compares what is in the store
    gone = dataclasses.replace(config.data, tokenizer=TokenizerConfig(path=str(tmp_path / "gone")))
    runtime.check_known_tokenizers(dataclasses.replace(config, data=gone))


def test_a_model_without_the_last_special_tokens_is_called_too_small(tmp_path):
    """Not the tokenizer, as if it had no end of a text."""
    write_corpus(tmp_path / "text.txt", documents=20)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ids = {"pad_id": -1, "bos_id": None, "eos_ids": ()}
    model = dataclasses.replace(tiny_architecture("GPT2LMHeadModel"), vocab_size=2, **ids)
    config = tiny_config(tmp_path / "text.txt", "store", model=model, objective=CausalLM())
    data = dataclasses.replace(config.data, tokenizer=TokenizerConfig(path=str(tmp_path)))
    config = dataclasses.replace(config, data=data)
    with pytest.raises(UserError, match="has 3 tokens, but model.vocab_size is 2; set --model"):
        runtime.check_known_tokenizers(config)


def test_the_source_is_not_hashed_to_compare_tokenizers(tmp_path, monkeypatch):
    write_corpus(tmp_path / "text.txt", documents=20)
    config = tiny_config(tmp_path / "text.txt", "")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=None))
    monkeypatch.setattr(TextData, "preparation", None)
    runtime.check_known_tokenizers(config)


def test_both_tokenizers_of_pairs_are_compared_with_the_model(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\tb\n" * 20)
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "a", "b", "[PAD]"]))
    data = TextData(
        source=PairSource(str(tmp_path / "pairs.tsv")),
        tokenizer=TokenizerConfig("bytes"),
        target_tokenizer=TokenizerConfig(path=str(tmp_path / "vocab.txt")),
        store=str(tmp_path / "store"),
    )
    ids = {"pad_id": 0, "bos_id": None, "eos_ids": (2,), "decoder_start_id": 0}
    sizes = {"vocab_size": 262, "decoder_vocab_size": 6, "share_embeddings": False}
    model = dataclasses.replace(tiny_architecture("MarianMTModel"), **ids, **sizes)
    config = tiny_config("", "", model=model, objective=SequenceToSequence(), data=data)
    with pytest.raises(UserError, match="sources pads with id 0 and that of the targets with 5"):
        runtime.check_known_tokenizers(config)


def test_processes_that_see_the_same_files_verify_a_share_each(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    shares = []

    def verify(*share):
        shares.append(share)
        if share[0] == 2:
            raise UserError("damaged")

    def gathered(array, tiled):
        """Processes 0, 1 and 3 see these files, 2 sees a copy; 3 finds one damaged."""
        if array.dtype == bool:
            return np.array([False, False, False, True])
        return np.concatenate([array, array, array + 1, array])

    data = SimpleNamespace(directory=str(tmp_path), verify_share=verify)
    monkeypatch.setattr(distributed, "wait_for_all", lambda: None)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    for process, error in ((0, "process 3 found damaged"), (2, "process 3 found"), (3, "^damaged")):
        monkeypatch.setattr(runtime.jax, "process_index", lambda process=process: process)
        with pytest.raises(UserError, match=error):
            runtime._verify_together(data)
    assert shares == [(0, 3), (0, 1), (2, 3)]


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_workdir_without_a_checkpoint_cannot_be_resumed_without_a_config(
    folder, tmp_path, capsys
):
    (tmp_path / "run" / folder).mkdir(parents=True)
    assert main(["train", "--workdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"flax-transformers: --workdir {tmp_path}/run holds no checkpoint to resume from; name "
        "the CONFIG of the run\n"
    )


@pytest.mark.parametrize("of_run", [True, False])
def test_the_tokenizer_to_set_for_an_evaluation_is_where_the_checkpoint_has_it(tmp_path, of_run):
    folder = tmp_path / "1"
    folder.mkdir()
    if of_run:
        write_step(folder, SMALLER)
    theirs, ours = SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b")
    prepared = SimpleNamespace(
        directory="store", tokenizer=theirs, target_tokenizer=None, examples=lambda part, spec: []
    )
    restored = SimpleNamespace(tokenizer=ours, target_tokenizer=None)
    place = f"{folder}/tokenizer" if of_run else str(folder)
    with pytest.raises(UserError, match=f"set --data.tokenizer.path to {place}$"):
        _check_data(tiny_config("text.txt", "store"), prepared, restored, str(folder))


def test_a_phase_too_long_for_the_initial_model_is_named(tmp_path):
    short = dataclasses.replace(tiny_bert(), max_positions=16)
    initial = write_step(tmp_path / "3", short)
    config = tiny_config("text.txt", "store", phases=(Phase(1, 16, 8), Phase(1, 32, 8)))
    config = dataclasses.replace(config, init_from=str(initial))
    with pytest.raises(UserError) as caught:
        runtime.with_initial_model(config, [])
    assert str(caught.value) == (
        f"--init-from {initial} holds a model of 16 positions, but phases.1 has "
        "sequence_length 32; set --phases.1.sequence-length 16"
    )


@pytest.mark.parametrize("of_run", [True, False])
def test_files_beside_the_weights_do_not_change_their_fingerprint(tmp_path, of_run):
    folder = tmp_path / "3"
    if of_run:
        write_step(folder, SMALLER)
        weights = folder / "state" / "manifest.ocdbt"
    else:
        (folder / "0_Transformer").mkdir(parents=True)
        (folder / "0_Transformer" / "config.json").write_text("{}")
        weights = folder / "0_Transformer" / "model.safetensors"
        weights.write_bytes(b"weights")
    stored = runtime.StoredWeights(str(folder), ComputeConfig())
    first, earlier = stored.fingerprint(), stored.earlier_fingerprint()
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("README.md", "meta_update.json", "tokenizer.json", ".cache/huggingface/model"):
        (folder / name).write_text("{}")
    weights.with_name(".DS_Store").write_text("")
    if of_run:
        (weights.parent / ".AppleDouble").mkdir()
        (weights.parent / ".AppleDouble" / "manifest.ocdbt").write_text("")
    assert stored.fingerprint() == first
    assert stored.earlier_fingerprint() != earlier
    weights.write_bytes(b"others")
    assert stored.fingerprint() not in (None, first)


def test_a_user_without_a_home_has_caches_below_the_temporary_folder(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(distributed, "start_processes", lambda *_: None)
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    config = SimpleNamespace(values=dict.fromkeys(names))
    config.update = config.values.__setitem__
    monkeypatch.setattr(runtime, "jax", SimpleNamespace(config=config))
    runtime.start(None)
    assert config.values[names[0]] == f"{cache_root()}/compiled"
    assert cache_root().startswith(tempfile.gettempdir())


@pytest.mark.multi_process
def test_the_cache_of_the_program_around_is_kept(tmp_path):
    program = f"""
import jax
import flax_transformers as ft
from flax_transformers import runtime
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
runtime.start("cpu")
found = jax.config.values
print(found["jax_compilation_cache_dir"], found["jax_persistent_cache_min_compile_time_secs"])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == [str(tmp_path), "7.0"], found.stderr
