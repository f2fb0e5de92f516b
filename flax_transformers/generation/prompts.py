"""Encode prompts and decode generated ids with the tokenizer of a model."""

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
    """``encode`` gives the ids of a prompt with the special tokens of training; ``decode`` drops
    special tokens. ``eos_ids`` end generated text; one of ``prompt_eos_ids`` ends the source of an
    encoder-decoder. ``written``: the tokenizer of generated text."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    eos_ids: tuple[int, ...]
    prompt_eos_ids: tuple[int, ...]
    written: Tokenizer


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each token adds to a text, special tokens nothing; then an empty text, for ids beyond
    the tokenizer's."""
    first = int(tokenizer.encode_prompt("a")[-1])
    before = tokenizer.decode([first])
    texts = (tokenizer.decode([first, i]) for i in range(tokenizer.vocabulary.size))
    return [*(text.removeprefix(before) for text in texts), ""]


def end_ids(tokenizer: Tokenizer, config: TextConfig) -> set[int]:
    """The ids that end a text, by the generation settings, the model's config or the tokenizer."""
    end = tokenizer.vocabulary.end_id
    known = {*config.generation.eos_ids, *getattr(config, "eos_ids", ())}
    return known if end is None else known | {end}


def special_stops(
    tokenizer: Tokenizer, stops: Sequence[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids of ``stops`` that are special tokens, which decoded texts do not show, and the other
    stops."""
    ids = tokenizer.vocabulary.special_ids
    id_of = dict(zip(tokenizer.pieces(ids), ids, strict=True))
    return (
        tuple(id_of[stop] for stop in stops if stop in id_of),
        tuple(stop for stop in stops if stop not in id_of),
    )


def read_prompts(folder: Path, config: TextConfig, target: Path | None = None) -> Prompts:
    """Read the tokenizer of a folder; ``target`` is the folder of that of targets, if they have
    their own.

    Raises UserError if there is none; ``encode`` raises it for ids without an embedding.
    """
    tokenizer = load_tokenizer(folder)
    encode = _framed(tokenizer, config, folder)
    if target is not None:
        return _of_two(tokenizer, encode, load_tokenizer(target), config)
    eos = set(getattr(config, "eos_ids", ()))
    eos |= set() if tokenizer.vocabulary.eos_id is None else {tokenizer.vocabulary.eos_id}
    eos |= set(_described(folder / "generation_config.json", "eos_token_id"))
    ends = tuple(sorted(eos))
    return Prompts(encode, tokenizer.decode, ends, ends, tokenizer)


def _of_two(
    source: Tokenizer, encode: Callable[[str], list[int]], target: Tokenizer, config: TextConfig
) -> Prompts:
    """Prompts in one tokenizer, generated text in another."""
    read_end, written_end = end_id(source.vocabulary), end_id(target.vocabulary)
    eos = {*getattr(config, "eos_ids", ()), written_end}
    return Prompts(encode, target.decode, tuple(sorted(eos)), (read_end,), target)


def noted_frame(tokenizer: Tokenizer) -> Frame | None:
    """The special tokens around a text as recorded by the training run, else by the tokenizer's
    files; None if neither has them."""
    return tokenizer.facts.run_frame or tokenizer.vocabulary.frame


def require_known(
    tokenizer: Tokenizer, ids: Iterable[int], vocab_size: int, what: str, where: object = "use"
) -> None:
    """Raises UserError for ids of a text that have no embedding in the model.

    ``what`` names the text, and ``where`` the tokenizer's folder.
    """
    for token in ids:
        if token >= vocab_size:
            name = tokenizer.pieces([token])[0]
            raise UserError(
                f"the {what} has the token {name!r} with id {token}, but the model has only "
                f"{vocab_size} tokens; remove it, or use the tokenizer of the model instead of the "
                f"one in {where}"
            )


def prompt_frame(tokenizer: Tokenizer, config: TextConfig) -> Frame:
    """The special tokens around a prompt: of the training run, else of the tokenizer's files, else
    of this package's objectives. The prompt of a decoder has none after it.
    """
    vocabulary = tokenizer.vocabulary
    answers = isinstance(config, EncoderDecoderConfig)
    frame = noted_frame(tokenizer)
    if frame is None and answers:
        return Frame(after=(end_id(vocabulary),))
    if frame is None:
        return Frame(before=(document_start(vocabulary),))
    return frame if answers else Frame(frame.before)


def with_frame(frame: Frame, ids: Sequence[int]) -> list[int]:
    """The ids of a text with the special tokens around it, those that it names itself only once: a
    chat template writes them, too."""
    before, after, found = list(frame.before), list(frame.after), list(ids)
    starts = found[: len(before)] == before
    ends = found[max(0, len(found) - len(after)) :] == after
    return [*([] if starts else before), *found, *([] if ends else after)]


def _framed(tokenizer: Tokenizer, config: TextConfig, folder: Path) -> Callable[[str], list[int]]:
    """The function that encodes prompts; an empty prompt becomes the start token."""

    def encode(text: str) -> list[int]:
        frame = prompt_frame(tokenizer, config)
        ids = with_frame(frame, tokenizer.encode_prompt(text).tolist())
        require_known(tokenizer, ids, config.vocab_size, "prompt", folder)
        return ids or [_beginning(tokenizer, config)]

    return encode


def _beginning(tokenizer: Tokenizer, config: TextConfig) -> int:
    """The start token of an empty prompt."""
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
    """Prompts as ids and mask int32 [B, T], padded on the given side.

    T is a power of two, which limits the number of compiled shapes.
    """
    length = 1 << max(0, max(map(len, prompts), default=1) - 1).bit_length()
    ids = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt) if padded == "left" else 0
        ids[row, first : first + len(prompt)] = prompt
        mask[row, first : first + len(prompt)] = 1
    return ids, mask


def read_lines(file: str) -> list[str]:
    """The prompts in a text file, one in each line.

    Raises UserError for a file that is missing, empty or not UTF-8, and for an empty line.
    """
    try:
        lines = Path(file).expanduser().read_text("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the prompts in {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; convert it") from None
    if lines == [""]:
        raise UserError(f"{file} has no prompts; write one in each line")
    empty = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise UserError(f"line {empty} of {file} is empty; remove it, or give it by --prompt ''")
    return lines


def read_texts(file: str) -> list[str]:
    """The prompts in a text file, one in each line, or in the field "prompt" of JSON lines.

    Raises UserError as `read_lines`, and for a line of a .jsonl or .ndjson file without a prompt.
    """
    lines = read_lines(file)
    if not file.endswith((".jsonl", ".ndjson")):
        return lines
    return [_prompt_in(line, f"line {number} of {file}") for number, line in enumerate(lines, 1)]


def _prompt_in(line: str, where: str) -> str:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()  # raises for lone surrogates
    except (ValueError, RecursionError):
        raise UserError(
            f"{where} is not JSON in UTF-8; correct it, or give prompts as they are in a file of "
            "another ending"
        ) from None
    text = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise UserError(f'{where} has no text "prompt"; write {{"prompt": "..."}} in each line')
    return text


def until_stop(text: str, begin: int, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` that ends after character ``begin``."""
    found = (text.find(stop, max(0, begin - len(stop) + 1)) for stop in stops)
    return text[: min((place for place in found if place >= 0), default=len(text))]


class Typist:
    """Prints a text as its tokens come.

    It keeps back incomplete characters, and what can be the beginning of a stop string. ``prompt``:
    the ids that the text begins with, which are printed too.
    """

    def __init__(
        self, prompts: Prompts, prompt: Sequence[int], stops: Sequence[str], eos: Sequence[int]
    ) -> None:
        self._ids, self._stops, self._eos = list(prompt), stops, frozenset(eos)
        self._decode, self._ended = prompts.decode, False
        self._begin = len(self._decode(self._ids))
        self._printed = 0
        self._print(self._decode(self._ids))

    def __call__(self, tokens: np.ndarray) -> None:
        """Print what the newest token, int32 [1], adds."""
        token = int(tokens[0])
        self._ended |= token in self._eos
        if not self._ended:
            self._ids.append(token)
            text = until_stop(self._decode(self._ids), self._begin, self._stops)
            held = max((_overlap(text[self._printed :], stop) for stop in self._stops), default=0)
            self._print(text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self) -> None:
        """Print the rest."""
        self._print(self.text)
        print(flush=True)

    @property
    def text(self) -> str:
        """What was printed, and is to be printed."""
        return until_stop(self._decode(self._ids), self._begin, self._stops)

    def _print(self, text: str) -> None:
        print(text[self._printed :], end="", flush=True)
        self._printed = max(self._printed, len(text))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    lengths = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def _described(file: Path, field: str) -> list[int]:
    """The id or ids in a field of a JSON file; empty without the field or the file."""
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text("utf-8")).get(field)
        return [] if ids is None else [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
