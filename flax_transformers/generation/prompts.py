"""Prompts to ids and ids to text, with the tokenizer that lies beside a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flax_transformers.data.tokenizers.load import Tokenizer, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.models.config import EncoderDecoderConfig, TextConfig
from flax_transformers.objectives.base import Frame
from flax_transformers.objectives.rows import document_start, end_id


@dataclass(frozen=True)
class Prompts:
    """``encode`` gives the ids of a prompt, framed as the model was trained; ``decode`` leaves
    special tokens out. ``eos_ids`` end a text that is written, and one of ``prompt_eos_ids`` the
    source of an encoder-decoder."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    eos_ids: tuple[int, ...]
    prompt_eos_ids: tuple[int, ...]


def read_prompts(folder: Path, config: TextConfig, target: Path | None = None) -> Prompts:
    """The tokenizer in a folder, as `load_tokenizer` reads it. ``target``: the folder of another
    one, which texts that answer a prompt are written with.

    Raises UserError if there is none, and on encoding an id that the model has no embedding for.
    """
    tokenizer = load_tokenizer(folder)
    encode = _framed(tokenizer, config, folder)
    if target is not None:
        return _of_two(tokenizer, encode, load_tokenizer(target), config)
    eos = set(getattr(config, "eos_ids", ()))
    eos |= set() if tokenizer.vocabulary.eos_id is None else {tokenizer.vocabulary.eos_id}
    eos |= set(_described(folder / "generation_config.json", "eos_token_id"))
    ends = tuple(sorted(eos))
    return Prompts(encode, tokenizer.decode, ends, ends)


def _of_two(
    source: Tokenizer, encode: Callable[[str], list[int]], target: Tokenizer, config: TextConfig
) -> Prompts:
    """Prompts with one tokenizer, and what answers them with another."""
    read_end, written_end = end_id(source.vocabulary), end_id(target.vocabulary)
    eos = {*getattr(config, "eos_ids", ()), written_end}
    return Prompts(encode, target.decode, tuple(sorted(eos)), (read_end,))


def noted_frame(tokenizer: Tokenizer) -> Frame | None:
    """What stands around a text as the run that trained the model noted it, else as the tokenizer's
    own files say; None where neither does."""
    return tokenizer.facts.run_frame or tokenizer.vocabulary.frame


def require_known(
    tokenizer: Tokenizer, ids: Iterable[int], vocab_size: int, what: str, where: object = "use"
) -> None:
    """Raises UserError for ids of a text that the model has no embedding for.

    ``what`` names the text, and ``where`` the tokenizer's folder.
    """
    for token in ids:
        if token >= vocab_size:
            name = tokenizer.pieces([token])[0]
            raise UserError(
                f"the {what} has the token {name!r} with id {token}, but the model has only "
                f"{vocab_size} tokens; leave it out, or take the tokenizer that belongs to the "
                f"model instead of the one in {where}"
            )


def prompt_frame(tokenizer: Tokenizer, config: TextConfig) -> Frame:
    """What stands around a prompt: what the run that trained the model put around its texts, else
    what the tokenizer's own files do, else what this package's objectives do.

    Nothing stands after the prompt of a decoder, which goes on with it.
    """
    vocabulary = tokenizer.vocabulary
    answers = isinstance(config, EncoderDecoderConfig)
    frame = noted_frame(tokenizer)
    if frame is None and answers:
        return Frame(after=(end_id(vocabulary),))
    if frame is None:
        return Frame(before=(document_start(vocabulary),))
    return frame if answers else Frame(frame.before)


def _framed(tokenizer: Tokenizer, config: TextConfig, folder: Path) -> Callable[[str], list[int]]:
    """What encodes prompts; an empty one of a decoder is the beginning of a text."""

    def encode(text: str) -> list[int]:
        frame = prompt_frame(tokenizer, config)
        ids = [*frame.before, *tokenizer.encode_prompt(text).tolist(), *frame.after]
        require_known(tokenizer, ids, config.vocab_size, "prompt", folder)
        return ids or [_beginning(tokenizer, config)]

    return encode


def _beginning(tokenizer: Tokenizer, config: TextConfig) -> int:
    """The token that a text begins after, where a prompt has none."""
    vocabulary = tokenizer.vocabulary
    if vocabulary.bos_id is None and vocabulary.end_id is None:
        known = [getattr(config, "bos_id", None), *getattr(config, "eos_ids", ())]
        found = next((i for i in known if i is not None), None)
        if found is not None:
            return int(found)
    return document_start(vocabulary)


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


def _described(file: Path, field: str) -> list[int]:
    """The ids, one or several or none, that a field of a JSON file has; none without the file."""
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text("utf-8")).get(field)
        return [] if ids is None else [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
