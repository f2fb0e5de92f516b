"""A run of each small recipe's shape, after one step, in the pipeline of transformers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import transformers

from flax_transformers.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = "the cat saw a small dog near old trees and ran home before rain fell on it again".split()
ONE_STEP = (
    *("--phases.0.steps", "1", "--phases.0.batch-size", "8", "--evaluation.batch-size", "8"),
    *("--optimizer.schedule.warmup-steps", "0", "--evaluation.max-examples", "8"),
)

FEW_PIECES = ("--model.vocab-size", "70", "--data.tokenizer.vocab-size", "70")


def sentence(random):
    return " ".join(random.choice(WORDS, 9)).capitalize() + "."


def books(folder):
    """JSON lines of paragraphs."""
    random = np.random.default_rng(0)
    rows = [{"paragraphs": [sentence(random) for _ in range(9)]} for _ in range(60)]
    file = folder / "books.jsonl.gz"
    file.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    return ["--data.source.path", str(file), *FEW_PIECES]


def tagged(folder):
    """Words and their tags."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(40):
        for number, word in enumerate(random.choice(WORDS, 7), 1):
            tag = ("DET", "NOUN", "VERB")[WORDS.index(word) % 3]
            lines.append(f"{number}\t{word}\t{word}\t{tag}\t_\t_\t0\t_\t_\t_")
        lines.append("")
    file = folder / "words.conllu"
    file.write_text("\n".join(lines) + "\n")
    return [
        *("--data.source.path", str(file), "--data.validation-source.path", str(file)),
        *("--model.num-labels", "3"),
        *FEW_PIECES,
    ]


def shakespeare(folder):
    random = np.random.default_rng(0)
    for name in ("train", "validation"):
        text = "\n".join(sentence(random) for _ in range(200))
        (folder / f"{name}.txt").write_text(text)
    return [
        *("--data.source.path", str(folder / "train.txt")),
        *("--data.validation-source.path", str(folder / "validation.txt")),
    ]


def digits(folder):
    """28 x 28 grey images of ten classes."""
    random = np.random.default_rng(0)
    for label in range(10):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 255, (28, 28), np.uint8)
            file = folder / "images" / str(label) / f"{number}.png"
            PIL.Image.fromarray(pixels).save(file)
    return ["--data.source.path", str(folder / "images"), "--data.validation-fraction", "0.2"]


def convert(folder, recipe, arguments):
    """The folder that a run of a recipe is converted to."""
    store = ["--data.store", str(folder / "store")]
    run = ["train", str(CONFIGS / f"{recipe}.py"), "--workdir", str(folder / "run")]
    assert main([*run, *arguments, *store, *ONE_STEP]) == 0
    assert main(["convert", str(folder / "run"), str(folder / "out")]) == 0
    return str(folder / "out")


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("modernbert_tiny", ()),
        ("bert_tiny", ()),
        ("roberta_small_books", books),
        ("bert_small_books", books),
    ],
)
def test_a_masked_language_model_fills_masks(tmp_path, recipe, more):
    out = convert(tmp_path, recipe, more(tmp_path) if more else [])
    fill = transformers.pipeline("fill-mask", model=out)
    found = fill(f"The cat saw a {fill.tokenizer.mask_token} dog.", top_k=3)
    assert len(found) == 3 and all(isinstance(one["token_str"], str) for one in found)
    assert fill.tokenizer.model_max_length == fill.model.config.max_position_embeddings - (
        1 if recipe.startswith("roberta") else 0  # the row of padding
    )


def test_a_tagger_tags(tmp_path):
    out = convert(tmp_path, "bert_small_upos", tagged(tmp_path))
    found = transformers.pipeline("token-classification", model=out)("the cat ran home")
    assert {one["entity"] for one in found} <= {"DET", "NOUN", "VERB"} and len(found) >= 4


@pytest.mark.parametrize("recipe", ["gpt_tiny_shakespeare"])
def test_a_language_model_writes(tmp_path, recipe):
    out = convert(tmp_path, recipe, shakespeare(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == 1
    assert model.config.eos_token_id == 1 and model.config.bos_token_id == 1


def test_an_image_classifier_sees_an_image(tmp_path):
    out = convert(tmp_path, "vit_mnist", digits(tmp_path))
    classify = transformers.pipeline("image-classification", model=out)
    found = classify(PIL.Image.fromarray(np.full((40, 30), 90, np.uint8)), top_k=10)
    assert len(found) == 10 and abs(sum(one["score"] for one in found) - 1) < 1e-5
    assert classify.image_processor.size["shortest_edge"] == 28
