"""Data sets of the library `datasets` as training data: in memory, on disk, and streamed."""

from __future__ import annotations

import json

import datasets
import jax
import numpy as np
import optax
import pytest

import flax_transformers as ft
from flax_transformers.data.sequences import GeneratorBatches
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.testing import assert_bit_equal, tiny_bert

TEXTS = [f"The square of {n} is {n * n}." for n in range(60)]
SHAPE = {"sequence_length": 32, "batch_size": 8}


@pytest.fixture
def file(tmp_path):
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def loaded(file, folder, **how):
    return datasets.load_dataset(
        "json", data_files=file, split="train", cache_dir=str(folder / "hf"), **how
    )


def batches(items, workers=0):
    data = ft.SequenceDataset(items, tokenizer=ByteTokenizer(), name="squares")
    with ft.training_batches(data, MaskedLM(), workers=workers, **SHAPE) as stream:
        return [next(stream) for _ in range(12)]  # more than one epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_gives_the_batches_of_the_list_of_its_texts(file, tmp_path, workers):
    for found, wanted in zip(batches(loaded(file, tmp_path), workers), batches(TEXTS), strict=True):
        assert_bit_equal(found, wanted)


def test_a_streamed_dataset_gives_its_texts_in_order_again_and_again(file, tmp_path):
    streamed = loaded(file, tmp_path, streaming=True)
    tokenizer = ByteTokenizer()
    vocabulary = tokenizer.vocabulary
    stream = GeneratorBatches(
        lambda: streamed, CausalLM(), vocabulary, tokenizer=tokenizer, **SHAPE
    )
    found = [tokenizer.decode(row) for _ in range(9) for row in next(stream)["input_ids"]]
    wanted = (TEXTS * 2)[: len(found)]
    assert [text.strip() for text in found] == [
        text[: len(f)] for text, f in zip(wanted, found, strict=True)
    ]


def test_a_model_learns_from_a_dataset(file, tmp_path):
    data = ft.SequenceDataset(loaded(file, tmp_path), tokenizer=ByteTokenizer(), name="squares")
    mesh = ft.make_mesh(devices=jax.devices()[:1])
    trainer = ft.Trainer(
        model=tiny_bert(), objective=MaskedLM(), optimizer=optax.adamw(1e-2), mesh=mesh
    )
    losses = []
    state = trainer.init(seed=0)
    with ft.training_batches(data, MaskedLM(), **SHAPE) as stream:
        for _ in range(20):
            state, metrics = trainer.step(state, next(stream))
            losses.append(float(metrics["train/loss"]))
    assert np.mean(losses[-5:]) < losses[0] - 1
