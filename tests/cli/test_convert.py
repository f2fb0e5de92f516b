"""From Hugging Face format to ours and back, as people do it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.main import main
from flax_transformers.families.bart import BartConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.marian import MarianConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.huggingface import comparison
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.storage import checksums
from tests.huggingface.tensors import parameter_shapes

pytestmark = pytest.mark.usefixtures("one_device")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
CONFIG = BertConfig(
    vocab_size=len(PIECES),
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=12,
    max_positions=16,
)


@pytest.fixture(scope="module", autouse=True)
def without_torch():
    """As where the extra is not installed, whether or not it is here."""
    find_spec = comparison.importlib.util.find_spec

    def without(name):
        return None if name in ("torch", "transformers") else find_spec(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.importlib.util, "find_spec", without)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hugging Face directory with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    model = build_model(CONFIG, ComputeConfig())
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32),
        parameter_shapes(model),
    )
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (tokenizer / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    save_pretrained(folder / "published", model, params, tokenizer_from=tokenizer)
    return folder / "published"


@pytest.fixture(scope="module")
def ours(published):
    """A workdir converted from it."""
    folder = published.with_name("ours")
    assert main(["convert", str(published), str(folder)]) == 0
    return folder


def refused(capsys, *arguments):
    """Runs a command that must fail politely, and returns its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("flax-transformers: ")
    return error[-1]


@pytest.mark.slow
def test_a_round_trip_is_bit_equal(published, ours, tmp_path, capsys):
    assert main(["convert", str(ours), str(tmp_path / "back")]) == 0
    assert sorted(p.name for p in published.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    for file in published.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_convert_prints_a_summary(published, tmp_path, capsys):
    assert main(["convert", str(published), str(tmp_path / "out")]) == 0
    tensors = load_file(published / "model.safetensors").values()
    assert capsys.readouterr().out.splitlines() == [
        "family        bert",
        "architecture  BertForMaskedLM",
        f"parameters    {sum(tensor.size for tensor in tensors):,}",
        "dtype         float32",
        "other files   tokenizer_config.json, vocab.txt",
        "difference    not compared: torch and transformers are not installed (extra 'convert')",
        f"written to    {tmp_path / 'out'}",
    ]


@pytest.mark.slow
def test_a_directory_can_be_written_in_half_precision(ours, tmp_path):
    target = tmp_path / "half"
    assert main(["convert", str(ours), str(target), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype.name for tensor in load_file(target / "model.safetensors").values()} == {
        "bfloat16"
    }
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_is_refused_for_checkpoints_of_this_package(published, tmp_path, capsys):
    said = refused(capsys, "convert", published, tmp_path / "out", "--dtype", "bfloat16")
    assert "leave out --dtype" in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fill_mask_reads_a_published_folder_like_its_conversion(published, ours, capsys):
    said = []
    capsys.readouterr()
    for folder in (ours, published):
        assert main(["fill-mask", str(folder), "--text", "w1 [MASK] w2", "--top", "3"]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == said[1] and len(said[0]) == 3
    command = ["fill-mask", str(published), "--text", "w1 [MASK] w2"]
    assert main([*command, "--architecture", "BertForPreTraining"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert "omit --architecture" in refused(
        capsys, "fill-mask", ours, *command[2:], "--architecture", "BertForMaskedLM"
    )


@pytest.mark.slow
def test_evaluate_scores_a_published_folder_like_its_conversion(published, ours, capsys, tmp_path):
    lines = [f"w{n % 20} w{(3 * n) % 20} w{(7 * n) % 20}" for n in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "scored.py").write_text(f"""
import dataclasses
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.testing import tiny_config

def get_config():
    config = tiny_config(
        {str(tmp_path / "text.txt")!r}, {str(tmp_path / "store")!r}, sequence_length=16
    )
    tokenizer = TokenizerConfig("wordpiece", path={str(published)!r})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
""")
    scores = []
    capsys.readouterr()
    for folder in (ours, published):
        assert main(["evaluate", str(folder), "--config", str(tmp_path / "scored.py")]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]
    assert scores[0]["eval/loss"] > 0


@pytest.mark.slow
def test_evaluate_of_a_published_folder_needs_a_config(published, ours, capsys):
    for folder in (published, ours):
        assert "give --config CONFIG" in refused(capsys, "evaluate", folder)


@pytest.mark.slow
def test_a_converted_checkpoint_is_loaded_like_the_original(published, ours):
    (a, params), (b, back) = load_pretrained(published), load_pretrained(ours)
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.slow
def test_a_checkpoint_can_be_loaded_with_another_head(ours, caplog):
    model, params = load_pretrained(
        ours, architecture="BertForSequenceClassification", num_labels=4, dtype=jnp.bfloat16
    )
    assert model.config.architecture == "BertForSequenceClassification"
    assert params["classification_head"]["bias"].shape == (4,)
    assert "no weights for classification_head, pooler: newly initialised" in caplog.text
    backbone = load_pretrained(ours)[1]
    del backbone["mlm_head"], params["classification_head"], params["pooler"]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16), strict=True),
        params,
        backbone,
    )


@pytest.mark.slow
def test_a_target_that_holds_files_is_refused(published, ours, capsys):
    before = sorted(ours.rglob("*"))
    assert f"{ours} already holds files" in refused(capsys, "convert", published, ours)
    assert sorted(ours.rglob("*")) == before


def test_a_missing_source_is_refused(tmp_path, capsys):
    said = refused(capsys, "convert", tmp_path / "nowhere", tmp_path / "out")
    assert f"there is no directory {tmp_path / 'nowhere'}" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "it should be JSON"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"12345678"), "is damaged"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (
            lambda d: (d / "config.json").write_text('{"architectures": ["NoSuchModel"]}'),
            "'NoSuchModel'",
        ),
        (lambda d: os.mkfifo(d / "merges.txt"), "merges.txt is not a regular file"),
        (
            lambda d: (d / "merges.txt").symlink_to("/dev/zero"),
            "is not a regular file; copy the tokenizer",
        ),
    ],
)
def test_an_incomplete_source_is_refused_and_leaves_no_files(
    published, tmp_path, capsys, spoil, said
):
    source = shutil.copytree(published, tmp_path / "source")
    spoil(source)
    assert said in refused(capsys, "convert", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["write_checksum_index", "seal"])
def test_an_unfinished_checkpoint_does_not_exist(published, tmp_path, monkeypatch, moment):
    """Killed before or right after the commit: neither is there a target, nor does it stand in
    the way of the next try."""
    target, there = tmp_path / "out", []

    def interrupt(folder):
        there.append(target.exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checksums, moment, interrupt)
        patch.setattr(threading, "excepthook", lambda *_: None)
        with contextlib.suppress(Exception):
            main(["convert", str(published), str(target)])
    assert there == [False]
    if not target.exists():
        assert main(["convert", str(published), str(target)]) == 0
    assert find_checkpoint(target).step == 0
    assert [p.name for p in tmp_path.iterdir() if ".tmp" in p.name] == []


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused(ours, tmp_path, capsys):
    damaged = shutil.copytree(ours, tmp_path / "ours")
    meta = damaged / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"vocab_size": 25', '"vocab_size": 24'))
    assert "no checkpoint" in refused(capsys, "convert", damaged, tmp_path / "out")


TINY = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize("kind", [T5Config, MarianConfig])
def test_both_sides_of_an_encoder_decoder_are_compared(kind):
    inputs = comparison.random_inputs(build_model(kind(vocab_size=30, **TINY), ComputeConfig()))
    assert inputs.keys() == {"input_ids", "decoder_input_ids"}
    assert not np.array_equal(*inputs.values())


def test_a_decoder_of_another_vocabulary_is_compared_with_ids_of_its_own():
    config = MarianConfig(vocab_size=90, decoder_vocab_size=30, share_embeddings=False, **TINY)
    inputs = comparison.random_inputs(build_model(config, ComputeConfig()))
    assert inputs["decoder_input_ids"].max() < 30 <= inputs["input_ids"].max()


def test_a_classifier_is_compared_on_rows_with_one_end_and_makes_its_own_target():
    config = BartConfig(
        architecture="BartForSequenceClassification", vocab_size=16, eos_ids=(12, 14), **TINY
    )
    (ids,) = comparison.random_inputs(build_model(config, ComputeConfig())).values()
    assert np.isin(ids, (12, 14)).sum(axis=1).tolist() == [1, 1]
    assert ids[:, -1].tolist() == [12, 12]


def test_an_end_token_beyond_the_vocabulary_is_not_used():
    config = GPT2Config(vocab_size=30, eos_ids=(50256,), max_positions=8, **TINY)
    (ids,) = comparison.random_inputs(build_model(config, ComputeConfig())).values()
    assert ids.max() < 30


def test_importing_the_package_alone_is_light():
    """Spawned data workers import it."""
    code = "import flax_transformers, sys; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
