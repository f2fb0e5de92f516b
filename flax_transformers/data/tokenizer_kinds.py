"""The kinds of tokenizer behind one interface: WordPiece, sentencepiece and bytes.

Made by `tokenizers.train_tokenizer` and `tokenizers.load_tokenizer`. What holds for every kind:

* ``encode_batch`` adds no special tokens, and user text never yields a special id: "[MASK]" or
  "</s>" written in a document is encoded as ordinary characters. (Characters that WordPiece does
  not know become the unknown id; bytes and sentencepiece with byte fallback know them all.)
* A tokenizer pickles as its serialized model, so spawned data workers can receive one.
* ``fingerprint`` is the sha256 of what defines the mapping from text to ids.

Strings with lone surrogates are no Unicode text: bytes takes them, the other kinds raise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from sentencepiece import sentencepiece_pb2 as sentencepiece_text

from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import Vocabulary

Kind = Literal["wordpiece", "unigram", "bpe", "bytes"]

CONFIG_FILE = "tokenizer_config.json"
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")  # T5 (arXiv:1910.10683); mT5's file has the "▁"
_BYTE_SENTINELS = 100  # of ByT5
# Which pieces play a role, by the names that published vocabularies use, first found wins.
ROLE_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "[BOS]"),
    "eos": ("</s>", "[EOS]", "<|endoftext|>"),
}


class Tokenizer(Protocol):
    """Text to ids and back. Objects are immutable and picklable."""

    kind: Kind
    vocabulary: Vocabulary
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [n] per text, without special tokens."""

    def offsets(self, text: str) -> np.ndarray:
        """Where each token that ``encode_batch`` makes of a text begins and ends in it, int32
        [n, 2] in characters; a token that is a part of a character touches all of it."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special ids other than the unknown one are left out."""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One readable string per id, specials included."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what ``load_tokenizer`` reads; the config file comes last."""


class ByteTokenizer:
    """UTF-8 bytes as ids (ByT5, arXiv:2105.13626): byte + 3; pad 0, eos 1, unk 2.

    259 [CLS], 260 [SEP] and 261 [MASK] follow the bytes, 262 ids in all. Every string comes back
    exactly. A word begins at a whitespace byte, as it does at "▁" in sentencepiece. The sentinels
    are the ids of the last 100 bytes, from 258 down, as in the paper: the first eleven of these
    bytes are in no UTF-8 text, the others may be.
    """

    kind: Kind = "bytes"
    _offset = 3
    _names: ClassVar[dict[int, str]] = {
        0: "<pad>", 1: "</s>", 2: "<unk>", 259: "[CLS]", 260: "[SEP]", 261: "[MASK]"
    }  # fmt: skip

    def __init__(self) -> None:
        specials = tuple(self._names)
        word_start = np.zeros(262, bool)
        word_start[list(specials) + [byte + self._offset for byte in b" \t\n\v\f\r"]] = True
        self.vocabulary = Vocabulary(
            size=262, pad_id=0, eos_id=1, unk_id=2, cls_id=259, sep_id=260, mask_id=261,
            special_ids=specials, word_start=word_start,
            sentinel_ids=tuple(range(258, 258 - _BYTE_SENTINELS, -1)),
        )  # fmt: skip
        self.fingerprint = _fingerprint("bytes", b"byte+3 " + repr(self._names).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
        return [np.frombuffer(b, np.uint8).astype(np.int32) + self._offset for b in encoded]

    def offsets(self, text: str) -> np.ndarray:
        lengths = [len(character.encode("utf-8", "surrogatepass")) for character in text]
        start = np.repeat(np.arange(len(text), dtype=np.int32), lengths)
        return np.stack([start, start + 1], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        data = bytes(int(i) - self._offset for i in ids if int(i) not in self._names)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a model may write any bytes
            return data.decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._names.get(int(i)) or _readable_byte(int(i) - self._offset) for i in ids]

    def save(self, directory: str | os.PathLike[str]) -> None:
        _save(self, directory, {}, {})


def _readable_byte(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>"


class PieceTokenizer:
    """A model of the `tokenizers` library: WordPiece as trained here, or any tokenizer.json.

    WordPiece splits words as BERT does (arXiv:1810.04805): control characters go, whitespace
    separates, punctuation and CJK characters stand alone; words over 100 characters are unknown.
    """

    def __init__(self, serialized: str) -> None:
        self._serialized = serialized
        self._backend = backend = tokenizers.Tokenizer.from_str(serialized)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # read special tokens in the text as plain text
        self.kind: Kind = _model_kind(serialized)
        self.fingerprint = _fingerprint(self.kind, serialized.encode())
        size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        names = [backend.id_to_token(i) or "" for i in range(size)]
        starts = [_starts_word(self.kind, name) for name in names]
        sentinels = _sentinel_ids(names[i] if i in special else "" for i in range(size))
        self.vocabulary = _vocabulary(backend.token_to_id, size, special, starts, sentinels)
        # The unknown id may come from text: it stands for characters that are not in the model.
        forbidden = set(self.vocabulary.special_ids) - {self.vocabulary.unk_id}
        self._forbidden = np.isin(np.arange(size), list(forbidden))
        literals = "|".join(re.escape(names[i]) for i in sorted(forbidden) if names[i])
        self._literals = re.compile(literals or r"(?!)")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (type(self), (self._serialized,))

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
        """For models (unigram) whose own pieces include "</s>": cut such text in two."""
        ids = np.concatenate([np.array(ids, np.int32) for ids in self._ids(self._cut(text))])
        return ids[~self._forbidden[ids]]

    def _cut(self, text: str) -> list[str]:
        cuts = [match.start() + 1 for match in self._literals.finditer(text)]
        return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]

    def offsets(self, text: str) -> np.ndarray:
        whole = self._backend.encode(text, add_special_tokens=False)
        if not self._forbidden[np.array(whole.ids, np.int32)].any():
            return np.array(whole.offsets, np.int32).reshape(-1, 2)
        found, start = [], 0
        for part in self._cut(text):
            encoding = self._backend.encode(part, add_special_tokens=False)
            kept = ~self._forbidden[np.array(encoding.ids, np.int32)]
            found.append(start + np.array(encoding.offsets, np.int32).reshape(-1, 2)[kept])
            start += len(part)
        return np.concatenate(found)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if not self._forbidden[int(i)]]
        return self._backend.decode(kept, skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._backend.id_to_token(int(i)) or f"<id {int(i)}>" for i in ids]

    def save(self, directory: str | os.PathLike[str]) -> None:
        files = {"tokenizer.json": self._serialized.encode()}
        hugging_face: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
            token_id = getattr(self.vocabulary, f"{role}_id")
            if token_id is not None:
                hugging_face[f"{role}_token"] = self._backend.id_to_token(token_id)
        if self.kind == "wordpiece":
            normalizer = json.loads(self._serialized).get("normalizer") or {}
            hugging_face["tokenizer_class"] = "BertTokenizer"
            hugging_face["do_lower_case"] = bool(normalizer.get("lowercase", False))
            lines = self.pieces(range(self.vocabulary.size))
            files["vocab.txt"] = "".join(f"{line}\n" for line in lines).encode()
        _save(self, directory, files, hugging_face)


def _starts_word(kind: Kind, piece: str) -> bool:
    return not piece.startswith("##") if kind == "wordpiece" else piece.startswith(("▁", "Ġ", "Ċ"))


class SentencePieceTokenizer:
    """A sentencepiece model, unigram (arXiv:1804.10959) or BPE (arXiv:1508.07909).

    Trained here: pad 0, eos 1, unk 2, then [CLS] [SEP] [MASK] as control symbols and the 256
    byte-fallback pieces. Text is first normalised as T5's is (nmt_nfkc): compatibility characters
    are replaced (the ligature ﬁ by fi), each run of whitespace, line ends included, becomes one
    space and none is left at either end, U+2581 reads as a space. No character of the normalised
    text is lost: ``decode(encode(text))`` is exactly that text.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.kind: Kind = _sentencepiece_kind(model)
        self.fingerprint = _fingerprint(self.kind, model)
        size = processor.get_piece_size()
        names = processor.id_to_piece(list(range(size)))
        ids = {name: i for i, name in enumerate(names)}
        special = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
        starts = [_starts_word(self.kind, name) for name in names]
        declared = {
            "pad": processor.pad_id(), "unk": processor.unk_id(),
            "bos": processor.bos_id(), "eos": processor.eos_id(),
        }  # fmt: skip
        sentinels = _sentinel_ids(names[i] if i in special else "" for i in range(size))
        self.vocabulary = _vocabulary(ids.get, size, special, starts, sentinels, declared)
        self._skipped = set(self.vocabulary.special_ids) - {self.vocabulary.unk_id}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return (type(self), (self._model,))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def offsets(self, text: str) -> np.ndarray:
        serialized = self._processor.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_text.SentencePieceText.FromString(serialized).pieces
        found = np.array([(piece.begin, piece.end) for piece in pieces], np.int32).reshape(-1, 2)
        # Of a character in several pieces, the last has all of it and the others have nothing.
        for place in range(len(found) - 2, -1, -1):
            if found[place, 0] == found[place, 1]:
                found[place] = found[place + 1]
        lengths = [len(character.encode()) for character in text]
        character_of = np.repeat(np.arange(len(text), dtype=np.int32), lengths)
        return np.append(character_of, np.int32(len(text)))[found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if int(i) not in self._skipped])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, directory: str | os.PathLike[str]) -> None:
        hugging_face = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        _save(self, directory, {"spiece.model": self._model}, hugging_face)


def _vocabulary(
    find: Callable[[str], int | None],
    size: int,
    special: set[int],
    word_start: list[bool],
    sentinels: tuple[int, ...],
    declared: dict[str, int] | None = None,
) -> Vocabulary:
    """Roles by name, or as ``declared`` (-1: by name); every special begins a word."""
    roles: dict[str, int | None] = {}
    for role, names in ROLE_NAMES.items():
        found = (i for i in map(find, names) if i is not None)
        known = (declared or {}).get(role, -1)
        roles[role] = known if known >= 0 else next(found, None)
    pad = roles.pop("pad")
    if pad is None:
        raise UserError(
            "The tokenizer has no padding token ([PAD] or <pad>); add one to its vocabulary."
        )
    special_ids = sorted(special | {pad} | {i for i in roles.values() if i is not None})
    starts = np.array(word_start, bool)
    starts[special_ids] = True
    return Vocabulary(
        size=size, pad_id=pad, special_ids=tuple(special_ids), word_start=starts,
        sentinel_ids=sentinels, unk_id=roles["unk"], cls_id=roles["cls"], sep_id=roles["sep"],
        mask_id=roles["mask"], bos_id=roles["bos"], eos_id=roles["eos"],
    )  # fmt: skip


def _sentinel_ids(names: Iterable[str]) -> tuple[int, ...]:
    """Ids of the pieces named ``<extra_id_0>``, ``<extra_id_1>`` and so on, up to the first gap."""
    matches = ((i, _SENTINEL.fullmatch(name)) for i, name in enumerate(names))
    found = {int(match[1]): i for i, match in matches if match}
    return tuple(found[n] for n in itertools.takewhile(found.__contains__, itertools.count()))


def _model_kind(serialized: str) -> Kind:
    """The kind of a tokenizer.json: its model's type in our words."""
    model = json.loads(serialized)["model"]
    name = str(model.get("type") or ("WordPiece" if "continuing_subword_prefix" in model else "?"))
    kinds: dict[str, Kind] = {"WordPiece": "wordpiece", "Unigram": "unigram", "BPE": "bpe"}
    if name not in kinds:
        raise UserError(f"A {name} model is no tokenizer we read; use one of {', '.join(kinds)}.")
    return kinds[name]


def parse_sentencepiece(model: bytes) -> Any:
    """The model as a protocol buffer message (generated code, without types)."""
    return sentencepiece_proto.ModelProto.FromString(model)


def _sentencepiece_kind(model: bytes) -> Kind:
    trainer = parse_sentencepiece(model).trainer_spec
    kinds: dict[int, Kind] = {trainer.UNIGRAM: "unigram", trainer.BPE: "bpe"}
    if trainer.model_type not in kinds:
        raise UserError("The sentencepiece model is neither unigram nor BPE; train one of these.")
    return kinds[trainer.model_type]


def _fingerprint(kind: Kind, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()


def _save(
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    files: dict[str, bytes],
    hugging_face: dict[str, Any],
) -> None:
    folder = epath.Path(directory)
    ours = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    text = json.dumps({**hugging_face, "flax_transformers": ours}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / CONFIG_FILE).write_text(text)
    except OSError as error:
        raise UserError(f"Cannot save the tokenizer in {folder}: {error}.") from error
