"""Tokenizing a corpus with Hugging Face's libraries; started by ``benchmarks/prepare.py``.

    python benchmarks/prepare_peers.py CORPUS.jsonl TOKENIZER_FOLDER {encode_batch,map} PROCESSES

Prints the seconds that it took, without those of imports. ``encode_batch``: that of ``tokenizers``
in one thread, on batches of 1,000 texts, whose ids are thrown away. ``map``: ``datasets`` reads the
corpus, and writes ids of the same batches into its cache, with so many processes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator

_BATCH = 1000


def encode_batch(corpus: str, tokenizer: str) -> float:
    """Seconds to read the corpus and to tokenize it in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    began = time.monotonic()
    for texts in _batches(corpus):
        loaded.encode_batch(texts)
    return time.monotonic() - began


def _batches(corpus: str) -> Iterator[list[str]]:
    with open(corpus) as file:
        texts: list[str] = []
        for line in file:
            texts.append(json.loads(line)["text"])
            if len(texts) == _BATCH:
                yield texts
                texts = []
        yield texts


def dataset_map(corpus: str, tokenizer: str, processes: int) -> float:
    """Seconds from the file to a dataset of ids."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_HOME"] = cache
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import datasets
        from transformers import PreTrainedTokenizerFast

        loaded = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer}/tokenizer.json")
        datasets.disable_progress_bars()
        began = time.monotonic()
        rows = datasets.load_dataset("json", data_files=corpus, split="train")
        rows.map(
            lambda batch: {"input_ids": loaded(batch["text"])["input_ids"]},
            batched=True,
            batch_size=_BATCH,
            num_proc=processes,
            remove_columns="text",
        )
        return time.monotonic() - began


if __name__ == "__main__":
    corpus, tokenizer, way, processes = sys.argv[1:]
    if way == "map":
        seconds = dataset_map(corpus, tokenizer, int(processes))
    else:
        seconds = encode_batch(corpus, tokenizer)
    print(json.dumps({"seconds": seconds}))
