"""Character offsets of tokens from their lengths, and positions where a text may be cut.

The offsets of the tokenizer libraries take longer than tokenization. If every token stands for a
known number of bytes, the offsets are sums of these.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_UNKNOWN = -1
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits a text into words, from its tokenizer.json."""
# The pre-tokenizers of Llama 3, Qwen 2 and GPT-2: no word has a space after a letter.
_SPLITS_BEFORE_SPACES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    QWEN2_WORDS,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
_BEFORE_SPACE = re.compile(r"(?<=[^\W_])(?= )")
_BEHIND_SPACE = re.compile(r"(?<= )(?=[^\W_])")
_CUT_OF_BERT = re.compile(r"(?<=[ \t\r\n.!?。\uff01\uff1f｡」』”’》\uff09])")


def safe_cut(model: dict[str, Any]) -> re.Pattern[str] | None:
    """A pattern with an empty match at positions where a text may be cut without changing its ids.

    ``model`` is a parsed tokenizer.json. None if no such position is known.
    """
    added = [token for token in model.get("added_tokens") or () if not token.get("special")]
    if any(re.search(r"\s", token["content"]) or _strips(token) for token in added):
        return None
    normalizer = (model.get("normalizer") or {"type": None})["type"]
    steps = _steps(model.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if kinds == ["BertPreTokenizer"] and normalizer in (None, "BertNormalizer"):
        return None if added else _CUT_OF_BERT
    if normalizer not in (None, "NFC"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return _BEFORE_SPACE
    split = kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated"
    known = split and steps[0]["pattern"].get("Regex") in _SPLITS_BEFORE_SPACES
    return _BEFORE_SPACE if known and not steps[0].get("invert") else None


def safe_sentencepiece_cut(model: Any) -> re.Pattern[str] | None:
    """The same for a sentencepiece BPE model (a protocol buffer message): after spaces, if they are
    dropped at the end of a text and added before it, and pieces have spaces only at their start."""
    rules, trainer = model.normalizer_spec, model.trainer_spec
    spaces = rules.add_dummy_prefix and rules.remove_extra_whitespaces and rules.escape_whitespaces
    inside = any("▁" in piece.piece[1:] for piece in model.pieces)
    return (
        _BEHIND_SPACE if spaces and not inside and not trainer.treat_whitespace_as_suffix else None
    )


def _strips(token: dict[str, Any]) -> bool:
    return bool(token.get("lstrip") or token.get("rstrip") or token.get("single_word"))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def is_byte_level(model: dict[str, Any]) -> bool:
    """Whether each character of a token of this tokenizer.json is a byte of the text."""
    return any(step["type"] == "ByteLevel" for step in _steps(model.get("pre_tokenizer")))


def byte_level_lengths(model: dict[str, Any], names: list[str]) -> np.ndarray | None:
    """The number of bytes of text per id, int64 [vocabulary]; -1 for special tokens.

    None if a tokenizer.json is not byte-level, or has another normalizer than NFC.
    """
    normalizer = (model.get("normalizer") or {"type": None})["type"]
    if not is_byte_level(model) or normalizer not in (None, "NFC"):
        return None
    lengths = np.array([len(name) for name in names], np.int64)
    for token in model.get("added_tokens") or ():
        content = len(token["content"].encode())
        lengths[token["id"]] = _UNKNOWN if token.get("special") else content
    unknown = model["model"].get("unk_token")
    if unknown in names:
        lengths[names.index(unknown)] = _UNKNOWN
    return lengths


def byte_ends(lengths: np.ndarray, size: int, prefix: bool = False) -> np.ndarray | None:
    """The bytes at which tokens of these lengths end, int64 [n]; None unless they are ``size``
    bytes in total. ``prefix``: a space may have been added before the text."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    if (lengths < 0).any() or not size <= total <= size + prefix:
        return None
    return np.maximum(ends - (total - size), 0)


def character_spans(ends: np.ndarray, text: bytes) -> np.ndarray:
    """Offsets int64 [n, 2] in characters of UTF-8 text, of consecutive tokens that end at these
    bytes; a token that is a part of a character spans all of it."""
    first_bytes = (np.frombuffer(text, np.uint8) & 0xC0) != 0x80
    # characters_before[i]: number of characters that begin in the first i bytes.
    characters_before = np.append(0, np.cumsum(first_bytes))
    stops = characters_before[np.maximum(ends, min(1, len(text)))]  # of a space added before it
    starts = np.append(0, ends)[: len(ends)]
    begins = characters_before[np.minimum(starts + 1, len(text))] - 1
    return np.stack([np.maximum(begins, 0), stops], axis=1)


def spread(spans: np.ndarray) -> np.ndarray:
    """Gives empty spans the span of the next token that has one: sentencepiece assigns a character
    of several tokens to the last of them."""
    filled = np.where(spans[:, 0] < spans[:, 1], np.arange(len(spans)), len(spans) - 1)
    return spans[np.minimum.accumulate(filled[::-1])[::-1]] if len(spans) else spans
