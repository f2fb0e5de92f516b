"""Small files and folders under the names that the guides use."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import PIL.Image

import flax_transformers as ft
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.testing import tiny_model
from tests.golden import tokenizer_layouts
from tests.parity.recipe_data import WORDS, sentence

POSITIONS = 512
CLASSES = ("no", "yes", "maybe")
INTENTS, TAGS = 150, 17
"""As many classes as the recipes have."""


def write_all(folder: Path) -> None:
    """Everything that the commands of the guides read and that no command of them writes."""
    _write_texts(folder)
    _write_labelled(folder)
    _write_digits(folder / "MNIST")
    (folder / "data" / "mnist").symlink_to(folder / "MNIST")
    (folder / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (28, 28), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    texts = (folder / "text.txt").read_text().split("\n\n")
    for name, architecture, kind in (
        ("bert-base-uncased", "BertForMaskedLM", "wordpiece"),
        ("all-MiniLM-L6-v2", "BertModel", "wordpiece"),
        ("gpt2", "GPT2LMHeadModel", "byte_level_bpe"),
        ("llama3", "LlamaForCausalLM", "bpe"),
        ("t5", "T5ForConditionalGeneration", "unigram"),
        ("bart", "BartForConditionalGeneration", "bpe"),
    ):
        write_model(folder / name, architecture, trained(kind, texts))
    # Its byte-level BPE has [CLS] and the like, which one that is trained here has not.
    tokenizer_layouts.write(folder / "modernbert_tokenizer", tokenizer_layouts.modernbert())
    published = ft.load_tokenizer(folder / "modernbert_tokenizer")
    write_model(folder / "modernbert", "ModernBertForMaskedLM", published)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "all-MiniLM-L6-v2" / "1_Pooling").mkdir()
    (folder / "all-MiniLM-L6-v2" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling",
         "type": "sentence_transformers.models.Pooling"},
    ]  # fmt: skip
    (folder / "all-MiniLM-L6-v2" / "modules.json").write_text(json.dumps(modules))


def trained(kind: str, texts: list[str]) -> Tokenizer:
    """A small tokenizer of a kind, trained on ``texts``."""
    sentinels = 100 if kind == "unigram" else 0
    config = TokenizerConfig(kind, vocab_size=400 + sentinels, sentinels=sentinels)
    return train_tokenizer(config, texts)


def write_model(folder: Path, architecture: str, tokenizer: Tokenizer) -> None:
    """A tiny model in Hugging Face format, with its tokenizer."""
    known = tokenizer.vocabulary
    changes = {"vocab_size": known.size, "max_positions": POSITIONS, "pad_id": max(known.pad_id, 0)}
    if architecture.startswith("T5"):
        del changes["max_positions"]
    if architecture.startswith(("Llama", "Bart")):
        changes |= {"bos_id": None, "eos_ids": (known.eos_id,)}
    if architecture.startswith("Bart"):  # which begins with the end, as published
        changes["decoder_start_id"] = known.eos_id
    model, params = tiny_model(architecture, **changes)
    ft.save_pretrained(folder, model, params, tokenizer=tokenizer)


def _write_texts(folder: Path) -> None:
    rng = np.random.default_rng(1)
    documents = [" ".join(sentence(rng) for _ in range(9)) for _ in range(200)]
    for name in ("my_text", "data/en", "data/de"):
        (folder / name).mkdir(parents=True)
        (folder / name / "text.txt").write_text("\n\n".join(documents) + "\n")
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    _write_rows(folder / "texts.jsonl", [{"paragraphs": text.split(". ")} for text in documents])
    pairs = (f"{sentence(rng)}\t{sentence(rng)}\n" for _ in range(300))
    (folder / "pairs.tsv").write_text("".join(pairs))
    lines = [line for line in (folder / "text.txt").read_text().split("\n") if line]
    for name in ("texts.txt", "sentences.txt", "prompts.txt"):
        (folder / name).write_text("\n".join(line[:60] for line in lines[:6]) + "\n")
    _write_rows(folder / "prompts.jsonl", [
        {"messages": [{"role": "user", "content": f"sort {n}="}], "prompt": f"{n}=",
         "answer": str(n)}
        for n in range(310, 314)
    ])  # fmt: skip


def _write_labelled(folder: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 7)) for _ in range(1800)]
    _write_rows(folder / "pairs.jsonl", [
        {"premise": text, "hypothesis": text[:12], "label": CLASSES[n % 3]}
        for n, text in enumerate(texts[:90])
    ])  # fmt: skip
    reviews = [{"text": text, "label": CLASSES[n % 3]} for n, text in enumerate(texts[:90])]
    _write_rows(folder / "reviews.jsonl", reviews)
    _write_rows(folder / "new.jsonl", [{"text": row["text"]} for row in reviews[:4]])
    (folder / "data" / "clinc150").mkdir(parents=True)
    rows = [[text, f"intent {n % INTENTS}"] for n, text in enumerate(texts)]
    content = json.dumps({"train": rows[:1500], "test": rows[1500:1650]}).encode()
    (folder / "data" / "clinc150" / "data_full.json.gz").write_bytes(gzip.compress(content))
    sentences = "".join(
        "".join(
            f"{n}\t{word}\t{word}\tTAG{WORDS.index(word) % TAGS}\t_\t_\t0\t_\t_\t_\n"
            for n, word in enumerate(text.split(), 1)
        )
        + "\n"
        for text in texts[:300]
    )
    place = folder / "data" / "ud_english_ewt"
    place.mkdir(parents=True)
    for name in ("data/ud_english_ewt/en_ewt-ud-train", "data/ud_english_ewt/en_ewt-ud-test",
                 "en_pud-ud-test", "cs_pud-ud-test"):  # fmt: skip
        (folder / f"{name}.conllu.gz").write_bytes(gzip.compress(sentences.encode()))
    questions = [
        {"id": str(n), "question": f"what {text.split()[0]}",
         "answers": [{"text": text.split()[3], "answer_start": text.index(text.split()[3])}]}
        for n, text in enumerate(texts[:40])
    ]  # fmt: skip
    (folder / "data" / "swag").mkdir()
    for name in ("train", "val"):
        lines = (
            f"{text},{text[:9]},one,two,three,four,{n % 4}" for n, text in enumerate(texts[:40])
        )
        (folder / "data" / "swag" / f"{name}.csv").write_text(
            "\n".join(["sent1,sent2,ending0,ending1,ending2,ending3,label", *lines]) + "\n"
        )
    articles = [
        {"title": "t", "paragraphs": [{"context": texts[n], "qas": [asked]}]}
        for n, asked in enumerate(questions)
    ]
    (folder / "data" / "squad").mkdir()
    for name in ("train-v1.1", "dev-v1.1"):
        content = json.dumps({"version": "1.1", "data": articles})
        (folder / "data" / "squad" / f"{name}.json").write_text(content)


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _write_digits(folder: Path) -> None:
    """MNIST's four files with noise, which is darker for one class than for the next."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 700), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 20 * (labels[:, None, None] + 1), (count, 28, 28)).astype(np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        for name, content in (
            (f"{split}-images-idx3-ubyte.gz", header + images.tobytes()),
            (f"{split}-labels-idx1-ubyte.gz", struct.pack(">II", 2049, count) + labels.tobytes()),
        ):
            (folder / name).write_bytes(gzip.compress(content, mtime=0))
