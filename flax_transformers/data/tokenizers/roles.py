"""The roles of the special tokens of a vocabulary, and the special tokens around a text."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from flax_transformers.data.tokenizers.facts import ROLES, Facts
from flax_transformers.objectives.base import Frame, Vocabulary

Kind = Literal["wordpiece", "unigram", "bpe", "byte_level_bpe", "bytes", "wordlevel"]
"""A tokenizer trained as "byte_level_bpe" has the kind "bpe", like published ones."""
Find = Callable[[str], int | None]
"""The id of a token by its name."""

_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")  # T5 (arXiv:1910.10683); mT5's file has the "▁"
# Usual names of roles, the first that exists is used: for tokenizers trained here, and for a
# vocabulary without files beside it.
ROLE_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "[BOS]", "<|endoftext|>"),
    "eos": ("</s>", "[EOS]", "<|endoftext|>"),
}


def vocabulary_of(
    facts: Facts,
    find: Find,
    size: int,
    special: set[int],
    word_start: list[bool],
    sentinels: tuple[int, ...],
    declared: Mapping[str, int] | None = None,
    frame: Frame | Callable[[Facts, Vocabulary, Find], Frame | None] | None = None,
) -> Vocabulary:
    """The vocabulary with the roles that the files define; every special token starts a word."""
    roles = _roles(facts, find, size, declared or {})
    extra = {i for i in map(find, facts.extra) if i is not None}
    special_ids = sorted(special | extra | {i for i in roles.values() if i is not None})
    starts = np.array(word_start, bool)
    starts[special_ids] = True
    vocabulary = Vocabulary(
        size=size, pad_id=-1 if roles["pad"] is None else roles["pad"],
        has_pad=roles["pad"] is not None, special_ids=tuple(special_ids), word_start=starts,
        sentinel_ids=sentinels, unk_id=roles["unk"], cls_id=roles["cls"], sep_id=roles["sep"],
        mask_id=roles["mask"], bos_id=roles["bos"], eos_id=roles["eos"],
    )  # fmt: skip
    if callable(frame):
        frame = frame(facts, vocabulary, find)
    return dataclasses.replace(vocabulary.within(size), frame=frame)


def _roles(
    facts: Facts, find: Find, size: int, declared: Mapping[str, int]
) -> dict[str, int | None]:
    """The ids of ROLES: from the files, else from the class of the tokenizer.

    If there is neither: from the model, from config.json, and last by usual names.
    """
    silent = not facts.named and facts.known_class is None
    found: dict[str, int | None] = {}
    for role in ROLES:
        name = None if facts.trained_here else facts.role(role)
        found[role] = None if name is None else find(name)
        if facts.trained_here or silent:
            named = (i for i in map(find, ROLE_NAMES[role]) if i is not None)
            guesses = (declared.get(role), facts.model_id(role, size), next(named, None))
            found[role] = next((i for i in guesses if i is not None), None)
    return found


def class_frame(facts: Facts, vocabulary: Vocabulary, find: Find) -> Frame | None:
    """The frame by the class of a tokenizer without a tokenizer.json."""
    if facts.trained_here:
        return None
    known = facts.known_class
    before, after = (known.before, known.after) if known else (("bos",), ())
    if facts.tokenizer_class in ("LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", None):
        bos = facts.flag("add_bos_token")
        before = ("bos",) if (bool(before) if bos is None else bos) else ()
        after = ("eos",) if facts.flag("add_eos_token") else ()
    roles = vocabulary.roles
    language = find(str(facts.options.get("src_lang") or "en_XX"))
    roles = roles if language is None else {**roles, "language": language}
    return Frame(
        tuple(roles[role] for role in before if role in roles),
        tuple(roles[role] for role in after if role in roles),
    )


def sentinel_ids(names: Iterable[str]) -> tuple[int, ...]:
    """Ids of the tokens ``<extra_id_0>``, ``<extra_id_1>`` and so on, up to the first gap."""
    matches = ((i, _SENTINEL.fullmatch(name)) for i, name in enumerate(names))
    found = {int(match[1]): i for i, match in matches if match}
    return tuple(found[n] for n in itertools.takewhile(found.__contains__, itertools.count()))


def never_from_text(vocabulary: Vocabulary) -> set[int]:
    """The special ids, except an unknown id without another role."""
    others = {i for role, i in vocabulary.roles.items() if role != "unk"}
    return set(vocabulary.special_ids) - ({vocabulary.unk_id} - others)


def starts_word(kind: Kind, piece: str) -> bool:
    """Whether a token starts a word, as tokenizers of this kind mark it."""
    if kind == "wordlevel":
        return True
    return not piece.startswith("##") if kind == "wordpiece" else piece.startswith(("▁", "Ġ", "Ċ"))
