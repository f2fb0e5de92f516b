"""Two kinds of tokenizers: bytes, and models of the `tokenizers` library."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tokenizers
from etils import epath

from flax_transformers.data.tokenizers import roles
from flax_transformers.data.tokenizers.base import Files, Tokenizer
from flax_transformers.data.tokenizers.facts import (
    CONFIG_FILE,
    NO_FACTS,
    RECORD,
    ROLES,
    TRAINED_HERE,
    Facts,
)
from flax_transformers.data.tokenizers.offsets import (
    byte_ends,
    byte_level_lengths,
    character_spans,
    is_byte_level,
    safe_cut,
)
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary

_BYTE_SENTINELS = 100  # of ByT5
_MAX_GAPS = 100_000  # ids that no token has


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids (ByT5, arXiv:2105.13626): byte + 3; pad 0, eos 1, unk 2.

    259 [CLS], 260 [SEP] and 261 [MASK] follow the bytes, 262 ids in total. Decoding restores every
    string. A word begins at a whitespace byte, as at "▁" in sentencepiece. The sentinels are the
    ids of the last 100 bytes, from 258 down, as in the paper: the first eleven of these bytes never
    occur in UTF-8 text.

    The published ByT5 has other tokens after the bytes, from ``<extra_id_0>`` on, which no model
    was trained with: ``names`` gives the names of all special ids.
    """

    kind: roles.Kind = "bytes"
    safe_cut: ClassVar[re.Pattern[str]] = re.compile("")
    finds_ends = True
    OFFSET: ClassVar[int] = 3
    NAMES: ClassVar[dict[int, str]] = {
        0: "<pad>", 1: "</s>", 2: "<unk>", 259: "[CLS]", 260: "[SEP]", 261: "[MASK]"
    }  # fmt: skip

    def __init__(
        self,
        names: Mapping[int, str] | None = None,
        facts: Facts = TRAINED_HERE,
        files: Files | None = None,
    ) -> None:
        self.names = dict(names or self.NAMES)
        self.facts, self.files = facts, dict(files or {})
        trained = names is None
        specials = tuple(sorted(self.names))
        size = max(specials) + 1
        word_start = np.zeros(size, bool)
        word_start[list(specials) + [byte + self.OFFSET for byte in b" \t\n\v\f\r"]] = True
        self.vocabulary = Vocabulary(
            size=size, pad_id=0, eos_id=1, unk_id=2, cls_id=259 if trained else None,
            sep_id=260 if trained else None, mask_id=261 if trained else None,
            special_ids=specials, word_start=word_start,
            sentinel_ids=tuple(range(258, 258 - _BYTE_SENTINELS, -1)),
            frame=None if trained else Frame(after=(1,)),
        )  # fmt: skip
        self.fingerprint = fingerprint_of("bytes", b"byte+3 " + repr(self.names).encode())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        names = None if self.names == self.NAMES else self.names
        return (type(self), (names, self.facts, self.files))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for ids, _ in self.encode_with_ends(texts, [()] * len(texts))]

    @functools.cached_property
    def prompt_names(self) -> Mapping[str, int]:
        return {name: i for i, name in self.names.items()}

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return joined_with_offsets(self.encode_with_offsets, text, self.prompt_names)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.encode_batch(texts), map(_byte_offsets, texts), strict=True))

    def encode_with_ends(
        self, texts: Sequence[str], ends: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        content = "".join(texts).encode("utf-8", "surrogatepass")
        data = np.frombuffer(content, np.uint8)
        ids = np.add(data, self.OFFSET, dtype=np.int32)
        characters = list(itertools.accumulate(map(len, texts), initial=0))
        if characters[-1] == len(content):
            bounds = itertools.pairwise(characters)
            return [(ids[a:b], list(at)) for (a, b), at in zip(bounds, ends, strict=True)]
        first_bytes = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(content))
        starts = first_bytes[characters].tolist()
        return [
            (ids[a:b], (first_bytes[np.asarray(at, np.int64) + n] - a).tolist())
            for (a, b), n, at in zip(itertools.pairwise(starts), characters, ends, strict=False)
        ]

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """Adds a space after each word but the last, where ByT5 in Hugging Face adds nothing. A
        word has its tag at its first byte, which must not be a space."""
        texts = [[f"{word} " for word in words[:-1]] + list(words[-1:]) for words in sentences]
        return encode_apart(self, texts)

    def decode(self, ids: Iterable[int]) -> str:
        ordinary = (i - self.OFFSET for i in map(int, ids) if i not in self.names)
        data = bytes(byte for byte in ordinary if 0 <= byte < 256)
        return data.decode("utf-8", "replace")  # a model may write any bytes

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self.names.get(int(i)) or _readable_byte(int(i) - self.OFFSET) for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        save_files(self, directory, self.files, {}, frame)


def _byte_offsets(text: str) -> np.ndarray:
    content = text.encode("utf-8", "surrogatepass")
    return character_spans(np.arange(1, len(content) + 1), content).astype(np.int32)


def encode_apart(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]
) -> list[list[np.ndarray]]:
    """The ids of each text of each list."""
    encoded = iter(tokenizer.encode_batch([text for texts in sentences for text in texts]))
    return [list(itertools.islice(encoded, len(texts))) for texts in sentences]


def spaced(words: Sequence[str]) -> list[str]:
    """Words with a space before each but the first."""
    return [f" {word}" if i else word for i, word in enumerate(words)]


def _readable_byte(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>"


class PieceTokenizer(Tokenizer):
    """A model of the `tokenizers` library: WordPiece as trained here, or any tokenizer.json.

    WordPiece splits words as BERT does (arXiv:1810.04805): control characters are removed,
    whitespace separates words, punctuation and CJK characters are words of their own; words longer
    than 100 characters are unknown.
    """

    def __init__(
        self, serialized: str, facts: Facts = NO_FACTS, files: Files | None = None
    ) -> None:
        self.serialized = serialized
        self.facts, self.files = facts, dict(files or {})
        self._backend = backend = tokenizers.Tokenizer.from_str(serialized)
        backend.no_truncation()  # the file may contain settings of both
        backend.no_padding()
        backend.encode_special_tokens = True  # read special tokens in the text as plain text
        self.kind: roles.Kind = _model_kind(serialized)
        # The time that it takes in a text that is not cut grows with the square of its length.
        self.finds_ends = self.kind == "wordpiece" and self.safe_cut is not None
        self.fingerprint = fingerprint_of(self.kind, serialized.encode())
        ids = backend.get_vocab(with_added_tokens=True).values()
        size = max(ids) + 1
        if size > 2 * len(ids) + _MAX_GAPS:
            raise UserError(
                f"it gives a token the id {size - 1}, but has only {len(ids)} tokens; ids count "
                "from 0"
            )
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        names = [backend.id_to_token(i) or "" for i in range(size)]
        starts = [roles.starts_word(self.kind, name) for name in names]
        sentinels = roles.sentinel_ids(names[i] if i in special else "" for i in range(size))
        self.vocabulary = roles.vocabulary_of(
            facts, backend.token_to_id, size, special, starts, sentinels, frame=self._frame()
        )
        # Text may yield the unknown id.
        forbidden = roles.never_from_text(self.vocabulary)
        self._forbidden = np.isin(np.arange(size), list(forbidden))
        literals = "|".join(re.escape(names[i]) for i in sorted(forbidden) if names[i])
        self._literals = re.compile(literals or r"(?!)")

    def _frame(self) -> Frame | None:
        """The special tokens that the file's post-processor adds around a text."""
        if self.facts.trained_here:
            return None
        for probe in ("a", "1", ".", *self._backend.get_vocab()):
            encoding = self._backend.encode(probe, add_special_tokens=True)
            inside = [n for n, one in enumerate(encoding.sequence_ids) if one is not None]
            if inside:
                return Frame(
                    tuple(encoding.ids[: inside[0]]), tuple(encoding.ids[inside[-1] + 1 :])
                )
        return Frame()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (type(self), (self.serialized, self.facts, self.files))

    def encode_prompt_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        self._backend.encode_special_tokens = False
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        return _ids_and_offsets(encoding)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = [np.array(ids, np.int32) for ids in self._ids(texts)]
        if encoded and self._forbidden[np.concatenate(encoded)].any():
            for i, ids in enumerate(encoded):
                if self._forbidden[ids].any():
                    encoded[i] = self._encode_cutting_literals(texts[i])
        return encoded

    def _ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        return (e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False))

    def _encode_cutting_literals(self, text: str) -> np.ndarray:
        """For unigram models with a piece "</s>": cuts such text in two."""
        ids = np.concatenate([np.array(ids, np.int32) for ids in self._ids(self._cut(text))])
        return ids[~self._forbidden[ids]]

    def _cut(self, text: str) -> list[str]:
        cuts = [match.start() + 1 for match in self._literals.finditer(text)]
        return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]

    @functools.cached_property
    def safe_cut(self) -> re.Pattern[str] | None:
        return safe_cut(json.loads(self.serialized))

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        """The number of bytes of text per id."""
        names = [self._backend.id_to_token(i) or "" for i in range(self.vocabulary.size)]
        return byte_level_lengths(json.loads(self.serialized), names)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._byte_lengths is None:
            return self._encode_with_own_offsets(texts)
        encoded = self.encode_batch(texts)
        spans = [self._summed_offsets(*one) for one in zip(texts, encoded, strict=True)]
        return [
            (ids, span) if span is not None else self._encode_with_own_offsets([text])[0]
            for text, ids, span in zip(texts, encoded, spans, strict=True)
        ]

    def encode_with_ends(
        self, texts: Sequence[str], ends: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        if not self.finds_ends:
            return super().encode_with_ends(texts, ends)
        found = []
        for text, at, encoding in zip(texts, ends, self._encodings(texts), strict=True):
            ids = np.array(encoding.ids, np.int32)
            # The first token that reaches beyond a position follows those that end before it.
            tokens = (encoding.char_to_token(end) if end < len(text) else len(ids) for end in at)
            counts = [count for count in tokens if count is not None]
            if len(counts) < len(at) or self._forbidden[ids].any():
                found += super().encode_with_ends([text], [at])
            else:
                found.append((ids, counts))
        return found

    def _summed_offsets(self, text: str, ids: np.ndarray) -> np.ndarray | None:
        """Offsets from the lengths of byte-level tokens; None if they do not add up."""
        assert self._byte_lengths is not None
        if self._backend.normalizer is not None and not unicodedata.is_normalized("NFC", text):
            return None
        content = text.encode()
        ends = byte_ends(self._byte_lengths[ids], len(content), prefix=not text.startswith(" "))
        return None if ends is None else character_spans(ends, content).astype(np.int32)

    def _encode_with_own_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            ids, offsets = _ids_and_offsets(encoding)
            if self._forbidden[ids].any():
                ids, offsets = self._offsets_cutting_literals(text)
            found.append((ids, offsets))
        return found

    def _encodings(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _offsets_cutting_literals(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        parts = self._cut(text)
        starts = itertools.accumulate(map(len, parts), initial=0)
        found = [
            (ids, offsets + start)
            for (ids, offsets), start in zip(
                map(_ids_and_offsets, self._encodings(parts)), starts, strict=False
            )
        ]
        ids, offsets = (np.concatenate(one) for one in zip(*found, strict=True))
        kept = ~self._forbidden[ids]
        return ids[kept], offsets[kept]

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """Byte-level models get a space before every word, as with add_prefix_space."""
        before = " " if is_byte_level(json.loads(self.serialized)) else ""
        return encode_apart(self, [[f"{before}{word}" for word in words] for words in sentences])

    def decode(self, ids: Iterable[int]) -> str:
        size = len(self._forbidden)  # a model may have more embeddings than there are tokens
        kept = [i for i in map(int, ids) if 0 <= i < size and not self._forbidden[i]]
        text = self._backend.decode(kept, skip_special_tokens=False)
        # As in transformers, which keeps the spaces of BPE whatever the file says.
        clean = self.kind != "bpe" and self.facts.flag("clean_up_tokenization_spaces")
        return _cleaned_up(text) if clean else text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._backend.id_to_token(int(i)) or f"<id {int(i)}>" for i in ids]

    def save(self, directory: str | os.PathLike[str], frame: Frame | None = None) -> None:
        files = {**self.files, "tokenizer.json": self.serialized.encode()}
        hugging_face: dict[str, Any] = {}
        if self.facts.trained_here:
            hugging_face = self._described()
            if self.kind == "wordpiece":
                lines = self.pieces(range(self.vocabulary.size))
                files["vocab.txt"] = "".join(f"{line}\n" for line in lines).encode()
        save_files(self, directory, files, hugging_face, frame)

    def _described(self) -> dict[str, Any]:
        """tokenizer_config.json of a tokenizer trained here."""
        fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for role in ROLES:
            token_id = self.vocabulary.roles.get(role)
            if token_id is not None:
                fields[f"{role}_token"] = self._backend.id_to_token(token_id)
        if self.kind == "wordpiece":
            normalizer = json.loads(self.serialized).get("normalizer") or {}
            fields["tokenizer_class"] = "BertTokenizer"
            fields["do_lower_case"] = bool(normalizer.get("lowercase", False))
        return fields


def _ids_and_offsets(encoding: tokenizers.Encoding) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), offsets


def _cleaned_up(text: str) -> str:
    """Removes spaces before punctuation and in English contractions."""
    for ending in (".", "?", "!", ","):
        text = text.replace(f" {ending}", ending)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def prompt_ids(
    encode_batch: Callable[[list[str]], list[np.ndarray]],
    text: str,
    special: Mapping[str, int],
    encode_later: Callable[[list[str]], list[np.ndarray]] | None = None,
) -> np.ndarray:
    """Cuts a text at the names of special tokens and encodes each part; all but the first with
    ``encode_later``, if it is given."""
    ids, encode = [np.zeros(0, np.int32)], encode_batch
    for part in split_at(special, text):
        ids.append(np.array([special[part]], np.int32) if part in special else encode([part])[0])
        encode = encode_later or encode_batch
    return np.concatenate(ids)


def joined_with_offsets(
    encode_with_offsets: Callable[[list[str]], list[tuple[np.ndarray, np.ndarray]]],
    text: str,
    special: Mapping[str, int],
    encode_later: Callable[[list[str]], list[tuple[np.ndarray, np.ndarray]]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`prompt_ids`, and the start and end of each token in the text, int32 [n, 2]."""
    start, ids, spans = 0, [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
    encode = encode_with_offsets
    for part in split_at(special, text):
        if part in special:
            one = np.array([special[part]], np.int32), np.array([[0, len(part)]], np.int32)
        else:
            (one,) = encode([part])
        ids.append(one[0])
        spans.append(one[1] + np.int32(start))
        start += len(part)
        encode = encode_later or encode_with_offsets
    return np.concatenate(ids), np.concatenate(spans)


def split_at(names: Iterable[str], text: str) -> list[str]:
    """Cuts a text so that each occurrence of a name is a part."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    if not longest_first:
        return [text] if text else []
    cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    return [part for part in cuts.split(text) if part]


def _model_kind(serialized: str) -> roles.Kind:
    """The kind of the model of a tokenizer.json."""
    model = json.loads(serialized)["model"]
    name = str(model.get("type") or ("WordPiece" if "continuing_subword_prefix" in model else "?"))
    kinds: dict[str, roles.Kind] = {
        "WordPiece": "wordpiece", "Unigram": "unigram", "BPE": "bpe", "WordLevel": "wordlevel"
    }  # fmt: skip
    if name not in kinds:
        raise UserError(f"A {name} model is not supported; use one of {', '.join(kinds)}.")
    return kinds[name]


def fingerprint_of(kind: roles.Kind, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()


def save_files(
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    files: Files,
    described: Mapping[str, Any],
    frame: Frame | None,
) -> None:
    """Writes the files unchanged, except for a record in CONFIG_FILE, which is written last."""
    folder = epath.Path(directory)
    config = dict(described)
    if CONFIG_FILE in files:
        config = json.loads(files[CONFIG_FILE])
    record: dict[str, Any] = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    if not tokenizer.facts.trained_here:
        record |= {"published": True, "model": dict(tokenizer.facts.model)}
    if frame is not None:
        record["frame"] = [list(frame.before), list(frame.after)]
        if frame.before_second is not None:
            record["before_second"] = list(frame.before_second)
    text = json.dumps({**config, RECORD: record}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if name != CONFIG_FILE:
                (folder / name).write_bytes(content)
        (folder / CONFIG_FILE).write_text(text)
    except OSError as error:
        raise UserError(f"Cannot save the tokenizer in {folder}: {error}.") from error
