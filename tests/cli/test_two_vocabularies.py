"""A translator whose sides have a vocabulary each, from training to what it writes."""

from __future__ import annotations

import pytest

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.main import main
from flax_transformers.restore import restore_model

CONFIG = """
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.testing import tiny_config
from flax_transformers.checkpointing.config import CheckpointConfig

def get_config():
    return tiny_config(
        "", "", steps=40, batch_size=16, sequence_length=16,
        model=MarianConfig(
            vocab_size=262, decoder_vocab_size=285, share_embeddings=False, hidden_size=32,
            num_layers=1, num_heads=2, intermediate_size=64, max_positions=64,
            dropout=0.0, pad_id=0, eos_ids=(1,), decoder_start_id=0,
        ),
        objective=SequenceToSequence(pack=False, label_smoothing=0.0),
        data=TextData(
            source=PairSource(PAIRS), tokenizer=TokenizerConfig("bytes"),
            target_tokenizer=TokenizerConfig("unigram", vocab_size=285),
            validation_fraction=0.2, store=STORE, shards=1, prepare_processes=1,
        ),
        checkpoints=CheckpointConfig(every_steps=0),
    )
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_train_evaluate_inspect_and_generate_with_a_tokenizer_for_targets(tmp_path, capsys):
    pairs, config, run = (tmp_path / name for name in ("pairs.tsv", "config.py", "run"))
    pairs.write_text("".join(f"{n:02d} Hunde\tThe dogs {n}\n" for n in range(60)))
    places = str(pairs), str(tmp_path / "store")
    config.write_text(f"PAIRS, STORE = {places}\n{CONFIG}")
    assert main(["train", str(config), "--workdir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "bytes with a vocabulary of 262, unigram of 285 for targets" in said
    assert "(unigram cross-entropy)" in said and "held-out bleu" in said
    restored = restore_model(run)
    assert (restored.tokenizer.kind, restored.target_tokenizer.kind) == ("bytes", "unigram")
    meta = find_checkpoint(run).meta
    assert meta["target_tokenizer"] == restored.target_tokenizer.fingerprint
    sample = sorted((run / "samples").iterdir())[-1].read_text()
    assert " Hunde\n" in sample and "truth: The dogs" in sample

    assert main(["generate", str(run), "--prompt", "07 Hunde", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.startswith("The dogs")

    assert main(["inspect", str(config), "--examples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "H u n d e" in shown and "▁" in shown.split("decoder")[1]

    other = ("--data.target-tokenizer.vocab-size", "284", "--data.store", str(tmp_path / "other"))
    assert main(["prepare", str(config), *other]) == 0
    assert main(["evaluate", str(run), *other]) == 2
    assert "another target tokenizer than the checkpoint" in capsys.readouterr().err

    assert main(["convert", str(run), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    assert "none: the format of transformers has one tokenizer" in said
    assert f"decode targets with {run}" in said
