"""Tokenizers that are sentencepiece models: T5, Llama 2, Gemma, XLM-R, mBART, and ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from sentencepiece import sentencepiece_pb2 as sentencepiece_text

from flax_transformers.data.tokenizer_facts import NO_FACTS, AddedToken, Facts
from flax_transformers.data.tokenizer_kinds import Files, fingerprint_of, prompt_ids, save_files
from flax_transformers.data.tokenizer_roles import (
    Kind,
    class_frame,
    never_from_text,
    sentinel_ids,
    starts_word,
    vocabulary_of,
)
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import Frame


class SentencePieceTokenizer:
    """A sentencepiece model, unigram (arXiv:1804.10959) or BPE (arXiv:1508.07909).

    Trained here: pad 0, eos 1, unk 2, then [CLS] [SEP] [MASK] as control symbols and the 256
    byte-fallback pieces. Text is first normalised as T5's is (nmt_nfkc): compatibility characters
    are replaced (the ligature ﬁ by fi), each run of whitespace, line ends included, becomes one
    space and none is left at either end, U+2581 reads as a space. No character of the normalised
    text is lost: ``decode(encode(text))`` is exactly that text.
    """

    def __init__(
        self,
        model: bytes,
        facts: Facts = NO_FACTS,
        files: Files | None = None,
        ids: Sequence[int] | None = None,
        added: Mapping[int, AddedToken] | None = None,
    ) -> None:
        self._model = model
        self.facts, self._files = facts, dict(files or {"spiece.model": model})
        self._processor = processor = _processor(model, "the sentencepiece model")
        self.kind: Kind = _sentencepiece_kind(model)
        count = processor.get_piece_size()
        self._added = dict(added or {})
        self._ids = np.arange(count, dtype=np.int32) if ids is None else np.array(ids, np.int32)
        self._is_mapped = ids is not None
        self.fingerprint = fingerprint_of(self.kind, model + self._further_content())
        names = {int(self._ids[i]): processor.id_to_piece(i) for i in range(count)}
        names |= {i: token.content for i, token in self._added.items()}
        self._names = names
        self._piece_of = {int(i): n for n, i in enumerate(self._ids)}
        size = max(names) + 1
        special = {
            int(self._ids[i])
            for i in range(count)
            if processor.is_control(i) or processor.is_unknown(i)
        } | {i for i, token in self._added.items() if token.special}
        starts = [starts_word(self.kind, names.get(i, "")) for i in range(size)]
        sentinels = sentinel_ids(names.get(i, "") if i in special else "" for i in range(size))
        by_name = {name: i for i, name in names.items()}
        self.vocabulary = vocabulary_of(
            facts, by_name.get, size, special, starts, sentinels, self._declared(), class_frame
        )
        self._special = {names[i]: i for i in never_from_text(self.vocabulary) if i in names}
        self._skipped = set(self._special.values())
        plain = {token.content: i for i, token in self._added.items() if not token.special}
        self._plain = {name: i for name, i in plain.items() if i not in self._piece_of}

    def _further_content(self) -> bytes:
        """What the mapping from text to ids depends on beside the model; nothing for our own."""
        if not self._is_mapped and not self._added:
            return b""
        tokens = sorted((i, token.content) for i, token in self._added.items())
        return self._ids.tobytes() + repr(tokens).encode()

    def _declared(self) -> dict[str, int]:
        """Roles by the ids that the model itself declares, where it does."""
        sides = self._processor
        found = {
            "pad": sides.pad_id(), "unk": sides.unk_id(), "bos": sides.bos_id(),
            "eos": sides.eos_id(),
        }  # fmt: skip
        return {role: int(self._ids[i]) for role, i in found.items() if i >= 0}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        ids = self._ids.tolist() if self._is_mapped else None
        return (type(self), (self._model, self.facts, self._files, ids, self._added))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._plain:
            return [prompt_ids(self.encode_unsplit, text, self._plain) for text in texts]
        return self.encode_unsplit(texts)

    def encode_unsplit(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts without a look at tokens that were added to the model."""
        encoded = (np.array(ids, np.int32) for ids in self._processor.encode(list(texts)))
        return [self._ids[ids] if self._is_mapped else ids for ids in encoded]

    def encode_prompt(self, text: str) -> np.ndarray:
        return prompt_ids(self.encode_unsplit, text, {**self._plain, **self._special})

    def offsets(self, text: str) -> np.ndarray:
        return piece_offsets(self._processor, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the model's pieces, and of added tokens that are not special by their names."""
        text, run = "", []
        for i in map(int, ids):
            if i in self._piece_of and i not in self._skipped:
                run.append(self._piece_of[i])
            elif i in self._added and i not in self._skipped:
                text += self._processor.decode(run) + self._added[i].content
                run = []
        return text + self._processor.decode(run)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._names.get(int(i), f"<id {int(i)}>") for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        described = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        described = described if self.facts.trained_here else {}
        save_files(self, directory, self._files, described, frame)


def piece_offsets(processor: Any, text: str) -> np.ndarray:
    """Where each piece of a text begins and ends in it, int32 [n, 2] in characters."""
    serialized = processor.encode(text, out_type="serialized_proto")
    pieces = sentencepiece_text.SentencePieceText.FromString(serialized).pieces
    found = np.array([(piece.begin, piece.end) for piece in pieces], np.int32).reshape(-1, 2)
    # Of a character in several pieces, the last has all of it and the others have nothing.
    for place in range(len(found) - 2, -1, -1):
        if found[place, 0] == found[place, 1]:
            found[place] = found[place + 1]
    lengths = [len(character.encode()) for character in text]
    character_of = np.repeat(np.arange(len(text), dtype=np.int32), lengths)
    return np.append(character_of, np.int32(len(text)))[found]


def _processor(model: bytes, name: str) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{name} is damaged: {error}") from error


def parse_sentencepiece(model: bytes) -> Any:
    """The model as a protocol buffer message (generated code, without types)."""
    return sentencepiece_proto.ModelProto.FromString(model)


def _sentencepiece_kind(model: bytes) -> Kind:
    trainer = parse_sentencepiece(model).trainer_spec
    kinds: dict[int, Kind] = {trainer.UNIGRAM: "unigram", trainer.BPE: "bpe"}
    if trainer.model_type not in kinds:
        raise UserError("The sentencepiece model is neither unigram nor BPE; train one of these.")
    return kinds[trainer.model_type]


class MarianTokenizer:
    """A sentencepiece model for each side, whose pieces have the ids of vocab.json (Marian).

    A text may begin with its target language, as in ">>fra<< Good morning". ``encode_batch`` reads
    sources, ``decode`` writes targets; ``of_targets`` encodes with the model of the targets.
    Punctuation is left as it is.
    """

    def __init__(
        self,
        sides: tuple[bytes, bytes],
        ids: Mapping[str, int],
        facts: Facts = NO_FACTS,
        files: Files | None = None,
    ) -> None:
        self._sides, self._id_of = sides, dict(ids)
        self.facts, self._files = facts, dict(files or {})
        self._source = _processor(sides[0], "source.spm")
        self._target = _processor(sides[1], "target.spm")
        self.kind: Kind = _sentencepiece_kind(sides[0])
        content = b"".join(sides) + repr(sorted(self._id_of.items())).encode()
        self.fingerprint = fingerprint_of(self.kind, content)
        self._names = {i: name for name, i in self._id_of.items()}
        size = max(self._names) + 1
        special = {self._id_of[name] for name in ("<unk>", "</s>", "<pad>")}
        special |= {i for i, name in self._names.items() if _is_language(name)}
        starts = [starts_word(self.kind, self._names.get(i, "")) for i in range(size)]
        self.vocabulary = vocabulary_of(
            facts, self._id_of.get, size, special, starts, (), None, class_frame
        )
        self._skipped = never_from_text(self.vocabulary)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (type(self), (self._sides, self._id_of, self.facts, self._files))

    @property
    def of_targets(self) -> MarianTokenizer:
        return MarianTokenizer((self._sides[1],) * 2, self._id_of, self.facts, self._files)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encoded(*_without_language(text)) for text in texts]

    def _encoded(self, language: str, text: str) -> np.ndarray:
        pieces = [*([language] if language else []), *self._source.encode(text, out_type=str)]
        unknown = self._id_of["<unk>"]
        return np.array([self._id_of.get(piece, unknown) for piece in pieces], np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        named = {self._names[i]: i for i in self._skipped}
        return prompt_ids(
            self.encode_batch, text, {n: i for n, i in named.items() if not _is_language(n)}
        )

    def offsets(self, text: str) -> np.ndarray:
        language, rest = _without_language(text)
        first = len(text) - len(rest)
        inner = first + piece_offsets(self._source, rest)
        return np.concatenate([np.array([[0, first]], np.int32), inner]) if language else inner

    def decode(self, ids: Iterable[int]) -> str:
        known = [self._names[i] for i in map(int, ids) if i in self._names]
        kept = [name for name in known if self._id_of[name] not in self._skipped]
        return str(self._target.decode_pieces(kept)).replace("▁", " ").strip()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._names.get(int(i), f"<id {int(i)}>") for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        save_files(self, directory, self._files, {}, frame)


def _is_language(name: str) -> bool:
    return name.startswith(">>") and name.endswith("<<")


def _without_language(text: str) -> tuple[str, str]:
    """A text's target language, if it begins with one, and the rest."""
    end = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
    return text[:end], text[end:]
