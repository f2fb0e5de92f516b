"""Prompts to ids and ids to text, with the tokenizer that lies beside a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from flax_transformers.data.tokenizers import Tokenizer, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.models.config import TextConfig
from flax_transformers.objectives.rows import end_id


@dataclass(frozen=True)
class Prompts:
    """``encode`` gives the ids of a prompt, with the token that texts begin with where the model
    has one; ``decode`` leaves special tokens out. ``eos_ids`` end a text that is written, and one
    of ``prompt_eos_ids`` the source of an encoder-decoder."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    eos_ids: tuple[int, ...]
    prompt_eos_ids: tuple[int, ...]


def read_prompts(folder: Path, config: TextConfig, target: Path | None = None) -> Prompts:
    """The tokenizer in a folder: tokenizer.json, the two files of an old GPT-2, a sentencepiece
    model, the files of Marian, or one of ours. ``target``: the folder of another one of ours, which
    texts that answer a prompt are written with.

    Raises UserError if there is none, if its ids are not the model's, and for the kinds of files
    that do not tell what ids their pieces have.
    """
    if target is not None:
        return _of_two(folder, target, config)
    published = _published(folder) or _sentencepiece(folder) or _marian(folder) or _ours(folder)
    _require_room(published, config.vocab_size, folder)
    eos = set(getattr(config, "eos_ids", ())) | set(published.eos_ids)
    eos |= set(_described(folder / "generation_config.json", "eos_token_id"))
    ends = tuple(sorted(eos))
    return Prompts(published.encode, published.decode, ends, ends)


def _of_two(source: Path, target: Path, config: TextConfig) -> Prompts:
    """Prompts with one tokenizer of ours, and what answers them with another."""
    sides = [load_tokenizer(folder) for folder in (source, target)]
    read, written = map(_found, sides)
    _require_room(read, config.vocab_size, source)
    _require_room(written, getattr(config, "decoder", config).vocab_size, target)
    read_end, written_end = (end_id(side.vocabulary) for side in sides)
    eos = {*getattr(config, "eos_ids", ()), written_end}
    return Prompts(read.encode, written.decode, tuple(sorted(eos)), (read_end,))


def rows_of(
    prompts: Sequence[Sequence[int]], pad_id: int, *, padded: Literal["left", "right"] = "left"
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as ids and mask int32 [B, T], padded on the given side.

    T is a power of two, so that few lengths have to be compiled for.
    """
    length = 1 << max(0, max(map(len, prompts), default=1) - 1).bit_length()
    ids = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt) if padded == "left" else 0
        ids[row, first : first + len(prompt)] = prompt
        mask[row, first : first + len(prompt)] = 1
    return ids, mask


class _Found(NamedTuple):
    """A tokenizer, and the number of its ids."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    eos_ids: tuple[int, ...]
    size: int


def _require_room(found: _Found, size: int, folder: Path) -> None:
    if found.size > size:
        raise UserError(
            f"the tokenizer in {folder} has {found.size} pieces, but the model only {size}; take "
            "the tokenizer that belongs to the model"
        )


def _published(folder: Path) -> _Found | None:
    """A tokenizer.json, which puts special tokens around a prompt by itself, or what GPT-2 had."""
    serialized, words, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if serialized.is_file():
            backend = tokenizers.Tokenizer.from_file(str(serialized))
        elif words.is_file() and merges.is_file():
            bpe = tokenizers.ByteLevelBPETokenizer.from_file(str(words), str(merges))
            backend = tokenizers.Tokenizer.from_str(bpe.to_str())
        else:
            return None
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer in {folder} is damaged: {error}") from error
    size = max(backend.get_vocab().values()) + 1
    return _Found(
        lambda text: backend.encode(text).ids, lambda ids: backend.decode(list(ids)), (), size
    )


def _sentencepiece(folder: Path) -> _Found | None:
    """A sentencepiece model, which knows what a text begins with but does not put it there."""
    files = [folder / name for name in ("tokenizer.model", "spiece.model")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if (folder / "sentencepiece.bpe.model").is_file():
            raise UserError(
                f"{folder / 'sentencepiece.bpe.model'} does not tell what ids its pieces have in "
                "the model, nor the languages of mBART; put the model's tokenizer.json beside it"
            )
        return None
    model = _processor(file)
    start = [model.bos_id()] if model.bos_id() >= 0 else []
    size = model.get_piece_size()
    return _Found(
        lambda text: [*start, *model.encode(text)],
        lambda ids: str(model.decode([i for i in ids if i < size])),
        (model.eos_id(),) if model.eos_id() >= 0 else (),
        size,
    )


def _marian(folder: Path) -> _Found | None:
    """The pieces of source.spm and target.spm, whose ids are in vocab.json.

    A target language may begin a text, as in ">>fra<< Good morning". Punctuation is left as it is.
    """
    sides, words = [folder / name for name in ("source.spm", "target.spm")], folder / "vocab.json"
    if not any(file.is_file() for file in sides):
        return None
    if (folder / "target_vocab.json").is_file():
        raise UserError(
            f"{folder} has a target_vocab.json, and Marian with two vocabularies is not read; "
            "put a tokenizer.json there, or give the ids to generate_target yourself"
        )
    try:
        source, target = map(_processor, sides)
        ids = {str(piece): int(i) for piece, i in json.loads(words.read_text("utf-8")).items()}
        unknown, special = ids["<unk>"], {ids[name] for name in ("<unk>", "</s>", "<pad>")}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged: {error}") from error
    pieces = {i: piece for piece, i in ids.items()}

    def encode(text: str) -> list[int]:
        end = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
        found = [*([text[:end]] if end else []), *source.encode(text[end:], out_type=str)]
        return [*(ids.get(piece, unknown) for piece in found), ids["</s>"]]

    def decode(written: Iterable[int]) -> str:
        known = [pieces[i] for i in written if i in pieces and i not in special]
        return str(target.decode_pieces(known)).replace("▁", " ").strip()

    return _Found(encode, decode, (ids["</s>"],), max(pieces) + 1)


def _processor(file: Path) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as error:
        raise UserError(f"the tokenizer {file} is damaged: {error}") from error


def _ours(folder: Path) -> _Found:
    return _found(load_tokenizer(folder))


def _found(tokenizer: Tokenizer) -> _Found:
    vocabulary = tokenizer.vocabulary
    start = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    return _Found(
        lambda text: [*start, *map(int, tokenizer.encode_batch([text])[0])],
        tokenizer.decode,
        () if vocabulary.eos_id is None else (vocabulary.eos_id,),
        vocabulary.size,
    )


def _described(file: Path, field: str) -> list[int]:
    """The ids, one or several or none, that a field of a JSON file has; none without the file."""
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text("utf-8")).get(field)
        return [] if ids is None else [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
