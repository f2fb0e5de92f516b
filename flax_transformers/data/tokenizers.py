"""Train a tokenizer on text, or load one that was saved: the room's door to `tokenizer_kinds`.

Training is deterministic for sentencepiece and bytes. It is not for WordPiece (the `tokenizers`
library orders equal counts as it likes): train once, save, and compare fingerprints.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flax_transformers import ranges
from flax_transformers.data.tokenizer_kinds import (
    CONFIG_FILE,
    ROLE_NAMES,
    ByteTokenizer,
    Kind,
    PieceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    parse_sentencepiece,
)
from flax_transformers.errors import UserError
from flax_transformers.ranges import Ranges

__all__ = ["Kind", "Tokenizer", "TokenizerConfig", "load_tokenizer", "train_tokenizer"]

_WORDPIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model")
_LINE_CHARACTERS = 1000  # sentencepiece silently drops training lines longer than 4192 bytes
_THREADS = 4  # fixed: sentencepiece models are byte-identical only at equal thread counts


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train, or to load when ``path`` is set.

    ``vocab_size``: pieces, specials included; bytes always has 262 and does not look at it.
    ``lowercase``: WordPiece also strips accents then (as BERT uncased), sentencepiece folds case
    (nmt_nfkc_cf instead of nmt_nfkc); bytes keeps every character and refuses it. A loaded file
    knows its own case, except vocab.txt, which takes it from here.
    ``path``: a directory saved by ``Tokenizer.save`` or by Hugging Face, or a file:
    tokenizer.json, vocab.txt, a sentencepiece .model. ``kind`` must agree with it.
    ``training_documents``: train on the first so many texts, None for all of them.
    ``sentinels``: so many of the ``vocab_size`` pieces, the last ones, stand for missing spans (T5
    has 100); for sentencepiece alone, as bytes has its own and a loaded file knows them.
    """

    kind: Kind = "wordpiece"
    vocab_size: int = 30_522
    lowercase: bool = False
    path: str | None = None
    training_documents: int | None = 1_000_000
    sentinels: int = 0

    RANGES: ClassVar[Ranges] = {
        "vocab_size": ranges.ENTRIES,
        "training_documents": ranges.integers(),
        "sentinels": ranges.integers(0, 2**24),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.tokenizer")

    @property
    def needs_training(self) -> bool:
        """Whether it is made of the corpus; what is not is the same wherever it is made."""
        return self.path is None and self.kind != "bytes"


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that ``config`` asks for; ``texts`` are read only if it has to be trained.

    Raises UserError for an empty corpus, a vocabulary that the corpus does not support, and a
    ``path`` that holds another kind.
    """
    if config.kind == "bytes" and config.lowercase:
        raise UserError("The bytes tokenizer keeps text as it is; set lowercase to False.")
    _check_sentinels(config)
    if config.path is not None:
        tokenizer = load_tokenizer(config.path, lowercase=config.lowercase)
        if tokenizer.kind != config.kind:
            raise UserError(
                f"The tokenizer at {config.path} is of kind {tokenizer.kind}, the configuration "
                f"says {config.kind}; set kind to {tokenizer.kind} or choose another path."
            )
        return tokenizer
    if config.kind == "bytes":
        return ByteTokenizer()
    lines = _training_lines(itertools.islice(texts, config.training_documents))
    first = next(lines, None)
    if first is None:
        raise UserError(
            "There is no text to train a tokenizer on; check the data source (every document "
            "read was empty) or set the tokenizer's path to a trained one."
        )
    lines = itertools.chain([first], lines)
    train = _train_wordpiece if config.kind == "wordpiece" else _train_sentencepiece
    return train(config, lines)


def _check_sentinels(config: TokenizerConfig) -> None:
    if config.sentinels and (config.kind in ("wordpiece", "bytes") or config.path is not None):
        raise UserError(
            "Sentinels are added when a sentencepiece tokenizer (unigram or bpe) is trained; leave "
            "the tokenizer's sentinels at 0 for other kinds and for those that are loaded."
        )
    if not 0 <= config.sentinels < config.vocab_size:
        raise UserError(
            f"The tokenizer's sentinels are {config.sentinels}; give a number from 0 to less than "
            f"its vocab_size, {config.vocab_size}."
        )


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of bounded length, cut at whitespace where there is any."""
    bounded = re.compile(rf".{{1,{_LINE_CHARACTERS}}}(?!\S)|.{{1,{_LINE_CHARACTERS}}}", re.S)
    for text in texts:
        for line in text.splitlines():
            if len(line) <= _LINE_CHARACTERS:
                if not line.isspace() and line:
                    yield line
            else:
                yield from (part for part in bounded.findall(line) if not part.isspace())


def _train_wordpiece(config: TokenizerConfig, lines: Iterator[str]) -> Tokenizer:
    """BERT's normaliser and word splitting; specials get ids 0 to 4."""
    backend = _bert_backend(models.WordPiece(unk_token="[UNK]"), config.lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=_WORDPIECE_SPECIALS, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    found = backend.get_vocab_size()
    if found < config.vocab_size:
        raise UserError(_too_large(config.vocab_size, found))
    if found > config.vocab_size:
        raise UserError(_too_small(config.vocab_size, found))
    return _finished_bert(backend)


def _bert_backend(model: models.WordPiece, lowercase: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _finished_bert(backend: tokenizers.Tokenizer) -> Tokenizer:
    """Adds what other programs need from the saved file: [CLS] and [SEP] around the text."""
    cls_id, sep_id = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    if cls_id is not None and sep_id is not None:
        backend.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    return PieceTokenizer(backend.to_str())


def _train_sentencepiece(config: TokenizerConfig, lines: Iterator[str]) -> Tokenizer:
    model = io.BytesIO()
    failures: list[Exception] = []

    def remembered() -> Iterator[str]:
        try:
            yield from lines
        except Exception as error:  # the library would wrap it in a RuntimeError of its own
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=remembered(), model_writer=model, model_type=config.kind,
            vocab_size=config.vocab_size - config.sentinels, num_threads=_THREADS, minloglevel=2,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True,
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            normalization_rule_name="nmt_nfkc_cf" if config.lowercase else "nmt_nfkc",
        )  # fmt: skip
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        message = str(error)
        if high := re.search(r"too high .*<= (\d+)", message):
            largest = int(high[1]) + config.sentinels
            raise UserError(_too_large(config.vocab_size, largest)) from error
        if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            smallest = int(low[1]) + config.sentinels
            raise UserError(_too_small(config.vocab_size, smallest)) from error
        raise UserError(f"sentencepiece cannot train on this text: {message}") from error
    return SentencePieceTokenizer(_with_sentinels(model.getvalue(), config.sentinels))


def _with_sentinels(model: bytes, count: int) -> bytes:
    """The model with pieces ``<extra_id_0>`` at the highest id and further ones below it, as T5's.

    They are control symbols: text never yields them.
    """
    if not count:
        return model
    proto = parse_sentencepiece(model)
    for number in reversed(range(count)):
        piece = proto.pieces.add(piece=f"<extra_id_{number}>", score=0.0)
        piece.type = piece.CONTROL
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _too_large(asked: int, largest: int) -> str:
    return (
        f"A vocabulary of {asked} pieces is more than the training text supports; "
        f"set vocab_size to {largest} or less, or use more text."
    )


def _too_small(asked: int, smallest: int) -> str:
    return (
        f"A vocabulary of {asked} pieces cannot hold the {smallest} single characters and special "
        f"pieces of the training text; set vocab_size well above {smallest}."
    )


def load_tokenizer(path: str | os.PathLike[str], lowercase: bool = False) -> Tokenizer:
    """A saved directory of ours or of Hugging Face, a tokenizer.json, vocab.txt or .model file.

    Our own directories are verified against their recorded fingerprint. ``lowercase`` matters for
    a bare vocab.txt only. Raises UserError for what is missing, damaged or unreadable.
    """
    location = epath.Path(path)
    if not location.exists():
        raise UserError(f"There is no tokenizer at {location}; check the path.")
    if not location.is_dir():
        return _load_file(location, lowercase)
    config_path = location / CONFIG_FILE
    ours = _read_json(config_path).get("flax_transformers") if config_path.exists() else None
    file = next((location / name for name in _FILES if (location / name).exists()), None)
    if ours and ours.get("kind") == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif file is None:
        raise UserError(
            f"The folder {location} holds no tokenizer: none of {', '.join(_FILES)} is there."
        )
    else:
        tokenizer = _load_file(file, lowercase)
    if ours and (tokenizer.kind, tokenizer.fingerprint) != (ours["kind"], ours["fingerprint"]):
        raise UserError(
            f"The tokenizer in {location} is damaged: its content does not match the fingerprint "
            f"in {CONFIG_FILE}; restore the folder or train the tokenizer again."
        )
    return tokenizer


def _load_file(file: epath.Path, lowercase: bool) -> Tokenizer:
    try:
        if file.suffix == ".json":
            return PieceTokenizer(file.read_text())
        if file.suffix == ".txt":
            return _load_vocab_txt(file, lowercase)
        if file.suffix == ".model":
            return _load_sentencepiece(file)
    except UserError as error:
        raise UserError(f"Cannot use the tokenizer {file}: {error}") from error
    except Exception as error:  # the libraries raise bare Exception, RuntimeError, ValueError
        raise UserError(
            f"The tokenizer file {file} is damaged or of an unknown format: {error}"
        ) from error
    raise UserError(
        f"The tokenizer file {file} has an unknown ending; it should be a tokenizer.json, "
        "a vocab.txt or a sentencepiece .model."
    )


def _load_sentencepiece(file: epath.Path) -> Tokenizer:
    """Published T5 models lack the sentinels; the file beside them says how many there are."""
    model = _with_special_pieces_hidden(file.read_bytes())
    tokenizer = SentencePieceTokenizer(model)
    config = file.parent / CONFIG_FILE
    asked = _read_json(config).get("extra_ids") if config.exists() else None
    if not asked or tokenizer.vocabulary.sentinel_ids:
        return tokenizer
    return SentencePieceTokenizer(_with_sentinels(model, int(asked)))


def _load_vocab_txt(file: epath.Path, lowercase: bool) -> Tokenizer:
    """One WordPiece per line, its id the line number from 0 (the original BERT release)."""
    lines = file.read_text().removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise UserError("it has a piece twice; every line must differ.")
    if "[UNK]" not in vocabulary:
        raise UserError("it has no [UNK] line, as a WordPiece vocabulary must.")
    backend = _bert_backend(models.WordPiece(vocabulary, unk_token="[UNK]"), lowercase)
    backend.add_special_tokens([name for name in _WORDPIECE_SPECIALS if name in vocabulary])
    return _finished_bert(backend)


def _with_special_pieces_hidden(model: bytes) -> bytes:
    """The model with special pieces out of reach of user text.

    Published models declare some of them ("[MASK]", "<extra_id_0>") as user-defined symbols,
    which match in the text; as control symbols they keep their ids and never do.
    """
    proto = parse_sentencepiece(model)
    special = {name for names in ROLE_NAMES.values() for name in names}
    exposed = [
        piece
        for piece in proto.pieces
        if piece.type == piece.USER_DEFINED
        and (piece.piece in special or re.fullmatch(r"▁?<extra_id_\d+>", piece.piece))
    ]
    for piece in exposed:
        piece.type = piece.CONTROL
    return proto.SerializeToString() if exposed else model


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"The file {path} is damaged: it is not JSON ({error}).") from error
    return content if isinstance(content, dict) else {}
