"""Our models in the lm-evaluation-harness against its own model of transformers, on local tasks."""

from __future__ import annotations

import json

import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from flax_transformers.harness.model import HarnessModel

WORDS = [a + b for a in "bdklmnprst" for b in ("a", "o", "en", "ir")]
POSITIONS = 48


def words(random, count):
    return " ".join(random.choice(WORDS, count))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with large random weights, and a tokenizer of its own."""
    folder, random = tmp_path_factory.mktemp("gpt2"), np.random.default_rng(0)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([words(random, 12) for _ in range(100)], trainer)
    tokenizer = transformers.GPT2TokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS,
        bos_token_id=0, eos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of each kind; some contexts and texts are longer than the model."""
    file, random = tmp_path_factory.mktemp("task") / "rows.jsonl", np.random.default_rng(1)
    rows = [
        {
            "context": words(random, int(random.integers(2, 60))),
            "choices": [words(random, int(random.integers(1, 6))) for _ in range(3)],
            "answer": n % 3,
            "text": words(random, 100 if n % 4 == 0 else 6),
        }
        for n in range(20)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
    }
    return [
        common | {
            "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common | {
            "task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
        },
        common | {
            "task": "writing", "output_type": "generate_until", "doc_to_text": "{{context}}",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": [" ba"], "max_gen_toks": 10, "do_sample": False},
        },
    ]  # fmt: skip


def test_figures_are_those_of_the_model_of_transformers(gpt2, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    ours, theirs = (
        lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True)
        for model in (
            HarnessModel(str(gpt2), batch_size=8),
            HFLM(pretrained=str(gpt2), device="cpu", dtype="float32", batch_size=8),
        )
    )
    for task, scores in theirs["results"].items():
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        assert {name: ours["results"][task][name] for name in numbers} == pytest.approx(numbers)
    samples = {
        task: [
            [sample["filtered_resps"] for sample in sorted(run["samples"][task], key=number_of)]
            for run in (ours, theirs)
        ]
        for task in ("choices", "text", "writing")
    }
    for found, expected in zip(*samples["choices"], strict=True):
        assert [str(greedy) for _, greedy in found] == [str(greedy) for _, greedy in expected]
        assert [float(score) for score, _ in found] == pytest.approx(
            [float(score) for score, _ in expected], rel=1e-5
        )
    found, expected = ([float(one) for (one,) in run] for run in samples["text"])
    assert found == pytest.approx(expected, rel=1e-5)
    found, expected = samples["writing"]
    assert found == expected
    assert len({text for (text,) in found}) > 10


def number_of(sample):
    return sample["doc_id"]
