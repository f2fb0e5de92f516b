"""Tokenizers with sentencepiece models: T5, Llama 2, Gemma, XLM-R, mBART, or trained here."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from sentencepiece import sentencepiece_pb2 as sentencepiece_text

from flax_transformers.data.tokenizers import offsets
from flax_transformers.data.tokenizers.base import Files, Tokenizer
from flax_transformers.data.tokenizers.facts import NO_FACTS, TEMPLATE_FILE, AddedToken, Facts
from flax_transformers.data.tokenizers.kinds import (
    encode_apart,
    fingerprint_of,
    joined_with_offsets,
    prompt_ids,
    save_files,
    spaced,
)
from flax_transformers.data.tokenizers.roles import (
    Kind,
    class_frame,
    never_from_text,
    sentinel_ids,
    starts_word,
    vocabulary_of,
)
from flax_transformers.data.tokenizers.sentencepiece_ends import SentenceEnds
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, unigram (arXiv:1804.10959) or BPE (arXiv:1508.07909).

    Trained here: pad 0, eos 1, unk 2, then [CLS] [SEP] [MASK] as control symbols and the 256
    byte-fallback pieces. Text is normalized as in T5 (nmt_nfkc): compatibility characters are
    replaced (the ligature ﬁ by fi), runs of whitespace and line ends become one space and are
    stripped at both ends, U+2581 becomes a space. ``decode(encode(text))`` is the normalized text.
    With ``keep_whitespace`` text is not normalized, except that U+2581 becomes a space.
    """

    def __init__(
        self,
        model: bytes,
        facts: Facts = NO_FACTS,
        files: Files | None = None,
        ids: Sequence[int] | None = None,
        added: Mapping[int, AddedToken] | None = None,
    ) -> None:
        self.model = model
        self.facts, self.files = facts, dict(files or {"spiece.model": model})
        readable = model if facts.trained_here else _naming_unknown(model)
        self._processor = processor = _processor(readable, "the sentencepiece model")
        self.kind: Kind = _sentencepiece_kind(model)
        count = processor.get_piece_size()
        self.added = dict(added or {})
        self._ids = np.arange(count, dtype=np.int32) if ids is None else np.array(ids, np.int32)
        self._is_mapped = ids is not None
        self.fingerprint = fingerprint_of(self.kind, model + self._further_content())
        names = {int(self._ids[i]): processor.id_to_piece(i) for i in range(count)}
        names |= {i: token.content for i, token in self.added.items()}
        self._names = names
        self._piece_of = {int(i): n for n, i in enumerate(self._ids)}
        size = max(names) + 1
        special = {
            int(self._ids[i])
            for i in range(count)
            if processor.is_control(i) or processor.is_unknown(i)
        } | {i for i, token in self.added.items() if token.special}
        starts = [starts_word(self.kind, names.get(i, "")) for i in range(size)]
        sentinels = sentinel_ids(names.get(i, "") if i in special else "" for i in range(size))
        by_name = {name: i for i, name in names.items()}
        self.vocabulary = vocabulary_of(
            facts, by_name.get, size, special, starts, sentinels, self._declared(), class_frame
        )
        self._special = {names[i]: i for i in never_from_text(self.vocabulary) if i in names}
        self._skipped = set(self._special.values())
        plain = {token.content: i for i, token in self.added.items() if not token.special}
        self._plain = {name: i for name, i in plain.items() if i not in self._piece_of}

    def _further_content(self) -> bytes:
        """What the ids depend on besides the model; empty for models trained here."""
        if not self._is_mapped and not self.added:
            return b""
        tokens = sorted((i, token.content) for i, token in self.added.items())
        return self._ids.tobytes() + repr(tokens).encode()

    def _declared(self) -> dict[str, int]:
        """The ids of roles that the model declares."""
        sides = self._processor
        found = {
            "pad": sides.pad_id(), "unk": sides.unk_id(), "bos": sides.bos_id(),
            "eos": sides.eos_id(),
        }  # fmt: skip
        return {role: int(self._ids[i]) for role, i in found.items() if i >= 0}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        ids = self._ids.tolist() if self._is_mapped else None
        return (type(self), (self.model, self.facts, self.files, ids, self.added))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._plain:
            later = functools.partial(self._unsplit, processor=self._later)
            return [prompt_ids(self._unsplit, text, self._plain, later) for text in texts]
        return self._unsplit(texts)

    def _unsplit(self, texts: Sequence[str], processor: Any = None) -> list[np.ndarray]:
        """The ids of texts without tokens that were added to the model."""
        encoded = (processor or self._processor).encode(list(texts))
        return [self._own(np.array(ids, np.int32)) for ids in encoded]

    def _own(self, pieces: np.ndarray) -> np.ndarray:
        """The ids of pieces."""
        return self._ids[pieces] if self._is_mapped else pieces

    @property
    def prompt_names(self) -> Mapping[str, int]:
        return self._special

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        names = {**self._plain, **self._special}
        return self._joined_with_offsets(text, names)

    @functools.cached_property
    def _later(self) -> Any:
        """The model for the parts of a text behind special tokens: for Llama without a space before
        them, if its files say that it is not ``legacy``."""
        if self.facts.tokenizer_class != "LlamaTokenizer" or self.facts.flag("legacy") is not False:
            return self._processor
        proto = parse_sentencepiece(_naming_unknown(self.model))
        proto.normalizer_spec.add_dummy_prefix = False
        return _processor(proto.SerializeToString(), "the sentencepiece model")

    @functools.cached_property
    def safe_cut(self) -> re.Pattern[str] | None:
        """Only for BPE: a unigram model sums scores over the whole text, and rounding decides
        between segmentations of nearly equal scores."""
        if self.kind != "bpe" or self._plain:
            return None
        return offsets.safe_sentencepiece_cut(parse_sentencepiece(self.model))

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._plain:
            return [self._joined_with_offsets(text, self._plain) for text in texts]
        return self._unsplit_with_offsets(texts)

    def encode_with_ends(
        self, texts: Sequence[str], ends: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        if self._plain:
            return super().encode_with_ends(texts, ends)
        encoded = [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]
        counts = self._ends.counts(texts, ends, [self._byte_lengths[ids] for ids in encoded])
        slow = [i for i, found in enumerate(counts) if found is None]
        exact = super().encode_with_ends([texts[i] for i in slow], [ends[i] for i in slow])
        for i, (_, found) in zip(slow, exact, strict=True):
            counts[i] = found
        return [(self._own(ids), at or []) for ids, at in zip(encoded, counts, strict=True)]

    @functools.cached_property
    def _ends(self) -> SentenceEnds:
        return SentenceEnds(self._processor, parse_sentencepiece(self.model))

    def _joined_with_offsets(
        self, text: str, names: Mapping[str, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        later = functools.partial(self._unsplit_with_offsets, processor=self._later)
        return joined_with_offsets(self._unsplit_with_offsets, text, names, later)

    def _unsplit_with_offsets(
        self, texts: Sequence[str], processor: Any = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        found, processor = [], processor or self._processor
        for text, pieces in zip(texts, processor.encode(list(texts)), strict=True):
            spans = summed_offsets(processor, self._byte_lengths[pieces], text)
            spans = piece_offsets(processor, text) if spans is None else spans
            found.append((self._ids[np.array(pieces, np.int32)], spans))
        return found

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        """The number of bytes of normalized text per piece; -1 if it varies."""
        return piece_byte_lengths(self._processor)

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """For a model that adds no space before a text, a space is added between words."""
        prefixed = parse_sentencepiece(self.model).normalizer_spec.add_dummy_prefix
        return encode_apart(self, sentences if prefixed else [spaced(w) for w in sentences])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the model's pieces, and the names of added tokens that are not special."""
        text, run = "", []
        for i in map(int, ids):
            if i in self._piece_of and i not in self._skipped:
                run.append(self._piece_of[i])
            elif i in self.added and i not in self._skipped:
                text += self._processor.decode(run) + self.added[i].content
                run = []
        return text + self._processor.decode(run)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._names.get(int(i), f"<id {int(i)}>") for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        if not self.facts.trained_here:
            save_files(self, directory, self.files, {}, frame)
        elif parse_sentencepiece(self.model).normalizer_spec.remove_extra_whitespaces:
            described = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
            save_files(self, directory, self.files, described, frame)
        else:  # T5's class would drop whitespace; `transformers` finds the model by the file name
            roles = {f"{role}_token": self._names[i] for role, i in self.vocabulary.roles.items()}
            described = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
            kept = {name: file for name, file in self.files.items() if name == TEMPLATE_FILE}
            save_files(self, directory, {"tokenizer.model": self.model, **kept}, described, frame)


def piece_byte_lengths(processor: Any) -> np.ndarray:
    """The number of bytes of normalized text per piece, int64; -1 if it varies."""
    lengths = []
    for i, name in enumerate(processor.id_to_piece(list(range(processor.get_piece_size())))):
        varies = processor.is_control(i) or processor.is_unknown(i)
        lengths.append(-1 if varies else 1 if processor.is_byte(i) else len(name.encode()))
    return np.array(lengths, np.int64)


def summed_offsets(processor: Any, lengths: np.ndarray, text: str) -> np.ndarray | None:
    """The result of `piece_offsets`, computed from the lengths of the pieces in bytes of normalized
    text; None if they do not add up."""
    normalized, origin = processor.normalize(text, with_offsets=True)
    content = normalized.encode()
    ends = offsets.byte_ends(lengths, len(content))
    if ends is None:
        return None
    return offsets.spread(np.array(origin, np.int32)[offsets.character_spans(ends, content)])


def piece_offsets(processor: Any, text: str) -> np.ndarray:
    """Start and end of each piece of a text, int32 [n, 2] in characters, from sentencepiece; slow,
    because every piece becomes an object."""
    serialized = processor.encode(text, out_type="serialized_proto")
    pieces = sentencepiece_text.SentencePieceText.FromString(serialized).pieces
    found = np.array([(piece.begin, piece.end) for piece in pieces], np.int32).reshape(-1, 2)
    lengths = [len(character.encode()) for character in text]
    character_of = np.repeat(np.arange(len(text), dtype=np.int32), lengths)
    return offsets.spread(np.append(character_of, np.int32(len(text)))[found])


def _naming_unknown(model: bytes) -> bytes:
    """The model, changed to decode the unknown id to its name, as `transformers` does."""
    proto = parse_sentencepiece(model)
    unknown = [piece.piece for piece in proto.pieces if piece.type == piece.UNKNOWN]
    proto.trainer_spec.unk_surface = unknown[0] if unknown else " "
    return proto.SerializeToString()


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


class MarianTokenizer(Tokenizer):
    """Marian: a sentencepiece model for each side, with the ids of vocab.json.

    A text may begin with its target language, as in ">>fra<< Good morning". ``encode_batch``
    encodes sources, ``decode`` decodes targets; ``of_targets`` encodes targets. Punctuation is not
    normalized.
    """

    def __init__(
        self,
        sides: tuple[bytes, bytes],
        ids: Mapping[str, int],
        facts: Facts = NO_FACTS,
        files: Files | None = None,
    ) -> None:
        self._sides, self._id_of = sides, dict(ids)
        self.facts, self.files = facts, dict(files or {})
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
        return (type(self), (self._sides, self._id_of, self.facts, self.files))

    @property
    def of_targets(self) -> MarianTokenizer:
        return MarianTokenizer((self._sides[1],) * 2, self._id_of, self.facts, self.files)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encoded(*_without_language(text)) for text in texts]

    def _encoded(self, language: str, text: str) -> np.ndarray:
        pieces = [*([language] if language else []), *self._source.encode(text, out_type=str)]
        unknown = self._id_of["<unk>"]
        return np.array([self._id_of.get(piece, unknown) for piece in pieces], np.int32)

    @functools.cached_property
    def prompt_names(self) -> Mapping[str, int]:
        named = {self._names[i]: i for i in self._skipped}
        return {name: i for name, i in named.items() if not _is_language(name)}

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return joined_with_offsets(self.encode_with_offsets, text, self.prompt_names)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.encode_batch(texts), map(self._offsets, texts), strict=True))

    def _offsets(self, text: str) -> np.ndarray:
        language, rest = _without_language(text)
        first = len(text) - len(rest)
        inner = first + piece_offsets(self._source, rest)
        return np.concatenate([np.array([[0, first]], np.int32), inner]) if language else inner

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        return encode_apart(self, sentences)

    def decode(self, ids: Iterable[int]) -> str:
        text = ""
        run: list[str] = []
        for i in map(int, ids):
            if i == self.vocabulary.unk_id:  # by its name, as in transformers
                text += f"{self._target.decode_pieces(run)}{self._names[i]} "
                run = []
            elif i in self._names and i not in self._skipped:
                run.append(self._names[i])
        text += str(self._target.decode_pieces(run))
        return text.replace("▁", " ").strip()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._names.get(int(i), f"<id {int(i)}>") for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        save_files(self, directory, self.files, {}, frame)


def _is_language(name: str) -> bool:
    return name.startswith(">>") and name.endswith("<<")


def _without_language(text: str) -> tuple[str, str]:
    """A text's target language, if it begins with one, and the rest."""
    end = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
    return text[:end], text[end:]
