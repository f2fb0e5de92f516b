"""Trains byte-level BPE as in GPT-2 (Radford et al. 2019): decoding restores any text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
_BLOCK = 1 << 16  # characters of a training text, if it may be cut
_CUT = re.compile(r"(?<=[^\W_])(?= )")  # no word of GPT-2's pattern has a space after a letter


def training_blocks(texts: Iterable[str]) -> Iterator[str]:
    """Texts with their line ends; long ones in parts, without changing their words."""
    for text in texts:
        start = 0
        while len(text) - start > _BLOCK and (cut := _CUT.search(text, start + _BLOCK)):
            yield text[start : cut.start()]
            start = cut.start()
        if not text[start:].isspace() and start < len(text):
            yield text[start:]


def train_byte_level(vocab_size: int, texts: Iterator[str]) -> tuple[str, int]:
    """A tokenizer.json and its number of tokens, which is below ``vocab_size`` for a small corpus.

    Ids as in GPT-2: 256 bytes, then merges, and last ``<|endoftext|>``, which starts and ends
    texts. There is neither a padding token nor an unknown token.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    parsed = json.loads(backend.to_str())
    found = len(parsed["model"]["vocab"]) + 1
    # In the vocabulary too, as in published files.
    parsed["model"]["vocab"][END_OF_TEXT] = found - 1
    backend = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    backend.add_special_tokens([END_OF_TEXT])
    return backend.to_str(), found
