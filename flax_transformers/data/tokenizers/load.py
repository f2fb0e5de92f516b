"""Trains a tokenizer on text, or loads a saved one.

Training is deterministic for sentencepiece, but not for WordPiece, because the order of equal
counts in the `tokenizers` library is not: train once, save, and compare fingerprints.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import sentencepiece
from etils import epath
from tokenizers import models, trainers

from flax_transformers import ranges
from flax_transformers.data.tokenizers.base import Tokenizer
from flax_transformers.data.tokenizers.byte_level_training import train_byte_level, training_blocks
from flax_transformers.data.tokenizers.facts import (
    CONFIG_FILE,
    FACT_FILES,
    MODEL_FILES,
    TEMPLATE_FILE,
    TRAINED_HERE,
    read_facts,
)
from flax_transformers.data.tokenizers.kinds import ByteTokenizer, PieceTokenizer
from flax_transformers.data.tokenizers.layouts import (
    VOCABULARY_FILES,
    WORDPIECE_SPECIALS,
    bert_backend,
    frame_bert,
    holds_vocabulary,
    tokenizer_of,
    with_sentinels,
)
from flax_transformers.data.tokenizers.roles import Kind
from flax_transformers.data.tokenizers.sentencepiece import SentencePieceTokenizer
from flax_transformers.errors import UserError
from flax_transformers.storage.hub import BESIDE_WEIGHTS, Repository
from flax_transformers.storage.paths import is_there

__all__ = [
    "Kind", "Tokenizer", "TokenizerConfig", "load_tokenizer", "published_files", "train_tokenizer",
]  # fmt: skip

log = logging.getLogger(__name__)

_LINE_CHARACTERS = 1000  # sentencepiece silently drops training lines longer than 4192 bytes
_KEEP_WHITESPACE = {
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n", "\t", "\r"],
}  # fmt: skip
_THREADS = 4  # fixed: sentencepiece models are byte-identical only at equal thread counts


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer to train, or to load if ``path`` is set.

    ``kind``: None is WordPiece, or the kind of the files at ``path``.
    ``vocab_size``: number of tokens, special tokens included; ignored for bytes (262) and ``path``.
    ``lowercase``: WordPiece then also strips accents (as BERT uncased), sentencepiece folds case
    (nmt_nfkc_cf instead of nmt_nfkc); an error for bytes. None is False, or what the files at
    ``path`` do.
    ``path``: a directory saved by ``Tokenizer.save`` or by Hugging Face, the workdir of a run, or a
    file: tokenizer.json, vocab.txt, a sentencepiece .model. ``kind`` must agree with it.
    ``training_documents``: train on the first so many texts; None for all.
    ``sentinels``: number of the last tokens of ``vocab_size`` that stand for masked spans (T5 has
    100). Only for training sentencepiece; bytes and loaded files have their own.
    ``keep_whitespace``: only for sentencepiece: decoding restores every text exactly, except
    U+2581, with its line ends, tabs and runs of spaces, as byte_level_bpe and bytes always do.
    """

    kind: Kind | None = None
    vocab_size: int = 30_522
    lowercase: bool | None = None
    path: str | None = None
    training_documents: int | None = 1_000_000
    sentinels: int = 0
    keep_whitespace: bool = False

    RANGES: ClassVar[ranges.Ranges] = {
        "vocab_size": ranges.ENTRIES,
        "training_documents": ranges.integers(),
        "sentinels": ranges.integers(0, 2**24),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.tokenizer")

    @property
    def needs_training(self) -> bool:
        """Whether it is trained on the corpus."""
        return self.path is None and self.kind != "bytes"

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields, with None replaced by the values used in training."""
        trained = {"kind": self.kind or "wordpiece", "lowercase": bool(self.lowercase)}
        fields = asdict(self)
        if not self.keep_whitespace:  # as in older stores
            del fields["keep_whitespace"]
        return {**fields, **trained}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of ``config``; ``texts`` are read only if it has to be trained.

    Raises UserError for an empty corpus, a vocabulary that the corpus does not support, and a
    ``path`` with another kind of tokenizer.
    """
    if config.kind in ("bytes", "byte_level_bpe") and config.lowercase:
        raise UserError(
            f"The {config.kind} tokenizer does not change text; set lowercase to False."
        )
    _check_sentinels(config)
    _check_keep_whitespace(config)
    if config.path is not None:
        tokenizer = load_tokenizer(config.path, lowercase=config.lowercase)
        kind = "bpe" if config.kind == "byte_level_bpe" else config.kind
        if kind is not None and tokenizer.kind != kind:
            raise UserError(
                f"The tokenizer at {config.path} is of kind {tokenizer.kind}, the configuration "
                f"asks for {config.kind}; set the tokenizer's kind to None, which accepts any "
                "kind, or choose another path."
            )
        return tokenizer
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "wordlevel":
        raise UserError(
            "A word-level tokenizer can only be loaded, not trained; set the tokenizer's path, "
            "or another kind."
        )
    texts = itertools.islice(texts, config.training_documents)
    if config.kind == "byte_level_bpe":
        lines = training_blocks(texts)
    else:
        lines = _training_lines(texts, keep_ends=config.keep_whitespace)
    first = next(lines, None)
    if first is None:
        raise UserError(
            "There is no text to train a tokenizer on; check the data source (every document "
            "read was empty) or set the tokenizer's path to a trained one."
        )
    lines = itertools.chain([first], lines)
    if config.kind == "byte_level_bpe":
        return _train_byte_level(config, lines)
    train = _train_wordpiece if config.kind in (None, "wordpiece") else _train_sentencepiece
    return train(config, lines)


def _check_keep_whitespace(config: TokenizerConfig) -> None:
    if config.keep_whitespace and (
        config.kind not in ("unigram", "bpe") or config.path is not None or config.lowercase
    ):
        raise UserError(
            "keep_whitespace is for a sentencepiece tokenizer (unigram or bpe) that is trained and "
            "not lower-cased; leave it False for other kinds and for those that are loaded, or set "
            "lowercase to False."
        )


def _check_sentinels(config: TokenizerConfig) -> None:
    if config.path is not None:  # files have their own
        return
    if config.sentinels and config.kind not in ("unigram", "bpe"):
        raise UserError(
            "Sentinels are added when a sentencepiece tokenizer (unigram or bpe) is trained; leave "
            "the tokenizer's sentinels at 0 for other kinds."
        )
    if not 0 <= config.sentinels < config.vocab_size:
        raise UserError(
            f"The tokenizer's sentinels are {config.sentinels}; give a number from 0 to less than "
            f"its vocab_size, {config.vocab_size}."
        )


def _training_lines(texts: Iterable[str], keep_ends: bool = False) -> Iterator[str]:
    """Lines of bounded length, cut at whitespace if there is any; with ``keep_ends``, pieces of
    text that include line ends."""
    bounded = re.compile(rf".{{1,{_LINE_CHARACTERS}}}(?!\S)|.{{1,{_LINE_CHARACTERS}}}", re.S)
    for text in texts:
        for line in [text] if keep_ends else text.splitlines():
            if len(line) <= _LINE_CHARACTERS:
                if not line.isspace() and line:
                    yield line
            else:
                yield from (part for part in bounded.findall(line) if not part.isspace())


def _train_wordpiece(config: TokenizerConfig, lines: Iterator[str]) -> Tokenizer:
    """BERT's normalizer and word splitting; special tokens have the ids 0 to 4."""
    backend = bert_backend(models.WordPiece(unk_token="[UNK]"), bool(config.lowercase))
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=WORDPIECE_SPECIALS, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    _check_size(config.vocab_size, backend.get_vocab_size())
    frame_bert(backend)
    return PieceTokenizer(backend.to_str(), TRAINED_HERE)


def _train_byte_level(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    backend, found = train_byte_level(config.vocab_size, texts)
    _check_size(config.vocab_size, found)
    return PieceTokenizer(backend, TRAINED_HERE)


def _check_size(asked: int, found: int) -> None:
    if found < asked:
        raise UserError(_too_large(asked, found))
    if found > asked:
        raise UserError(_too_small(asked, found))


def _train_sentencepiece(config: TokenizerConfig, lines: Iterator[str]) -> Tokenizer:
    model = io.BytesIO()
    rule = {"normalization_rule_name": "nmt_nfkc_cf" if config.lowercase else "nmt_nfkc"}
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
            **(_KEEP_WHITESPACE if config.keep_whitespace else rule),
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
    return SentencePieceTokenizer(with_sentinels(model.getvalue(), config.sentinels), TRAINED_HERE)


def _too_large(asked: int, largest: int) -> str:
    return (
        f"A vocabulary of {asked} tokens is larger than the training text supports; "
        f"set vocab_size to {largest} or less, of the tokenizer and of the model, or use more text."
    )


def _too_small(asked: int, smallest: int) -> str:
    return (
        f"A vocabulary of {asked} tokens is too small for the {smallest} single characters and "
        f"special tokens of the training text; set vocab_size well above {smallest}, of the "
        "tokenizer and of the model."
    )


def load_tokenizer(path: str | os.PathLike[str], lowercase: bool | None = None) -> Tokenizer:
    """Loads a directory saved by this package or Hugging Face, a tokenizer.json, vocab.txt or
    .model file, or the tokenizer of a run's workdir or of a Hugging Face id.

    The roles of special tokens are read from the files beside the vocabulary. Directories of this
    package are verified against their recorded fingerprint. ``lowercase`` is used for a vocab.txt
    if no file beside it says; for other files a contradiction is an error or a warning. Raises
    UserError for files that are missing, damaged or unreadable.
    """
    location = find_tokenizer(path)
    if not location.exists():
        raise UserError(f"There is no tokenizer at {location}; check the path.")
    folder = location if location.is_dir() else location.parent
    names = VOCABULARY_FILES if location.is_dir() else (_canonical(location),)
    files = {name: read_file(folder / name) for name in FACT_FILES if is_there(folder / name)}
    facts = read_facts(files, folder)
    if location.is_dir():
        names = (*names, TEMPLATE_FILE)
        files |= {name: read_file(folder / name) for name in names if is_there(folder / name)}
    else:
        files[names[0]] = read_file(location)
    kept = {name: files[name] for name in files if name not in MODEL_FILES}
    try:
        tokenizer = tokenizer_of(kept, facts, lowercase)
    except UserError as error:
        raise UserError(f"Cannot use the tokenizer {location}: {error}") from error
    except Exception as error:  # the libraries raise bare Exception, RuntimeError, ValueError
        raise UserError(
            f"The tokenizer {location} is damaged or of an unknown format: {error}"
        ) from error
    if tokenizer is None:
        raise UserError(
            f"The folder {location} contains no tokenizer: none of {', '.join(VOCABULARY_FILES)} "
            "exists."
        )
    recorded = facts.record if location.is_dir() else {}
    if recorded and (tokenizer.kind, tokenizer.fingerprint) != (
        recorded.get("kind"), recorded.get("fingerprint"),
    ):  # fmt: skip
        raise UserError(
            f"The tokenizer in {location} is damaged: its content does not match the fingerprint "
            f"in {CONFIG_FILE}; restore the folder or train the tokenizer again."
        )
    _check_case(tokenizer, location, lowercase)
    return tokenizer


def find_tokenizer(path: str | os.PathLike[str], *, download: bool = True) -> epath.Path:
    """``path``, the folder "tokenizer" in the workdir of a run, or the snapshot of a Hugging Face
    id, "gpt2" or "gpt2@REVISION"; its tokenizer is downloaded if the local cache does not have it
    and ``download`` allows it."""
    location = epath.Path(path).expanduser()
    repository = None if location.exists() else Repository.of_id(os.fspath(path))
    if repository is None:
        of_run = not any((location / name).exists() for name in VOCABULARY_FILES)
        own = location / "tokenizer"
        return own if of_run and own.is_dir() else location
    found = repository.cached()
    if download and found is None:
        found = repository.download(_beside_weights)
    elif download and found is not None and not published_files(found):
        found = repository.complete(found, _beside_weights) or found
    return location if found is None else epath.Path(found)


def _beside_weights(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(BESIDE_WEIGHTS)]


def published_files(folder: str | os.PathLike[str]) -> dict[str, epath.Path]:
    """The files of a folder that define its tokenizer, by name: the vocabulary, the files beside
    it and, because they may name its class, config.json and generation_config.json.

    Empty without a tokenizer. Raises UserError for damaged files.
    """
    place = epath.Path(folder)
    names = (*FACT_FILES, TEMPLATE_FILE, *VOCABULARY_FILES)
    found = {name: place / name for name in names if is_there(place / name)}
    facts = read_facts(
        {name: read_file(found[name]) for name in FACT_FILES if name in found}, place
    )
    in_bytes = facts.tokenizer_class == "ByT5Tokenizer" or facts.record.get("kind") == "bytes"
    return found if in_bytes or holds_vocabulary(found) else {}


def _canonical(file: epath.Path) -> str:
    """The usual name of a file with this ending."""
    names = {".json": "tokenizer.json", ".txt": "vocab.txt", ".model": "tokenizer.model"}
    if file.name in VOCABULARY_FILES and file.suffix in names and file.stem != "vocab":
        return file.name
    if file.suffix not in names:
        raise UserError(
            f"The tokenizer file {file} has an unknown ending; it should be a tokenizer.json, "
            "a vocab.txt or a sentencepiece .model."
        )
    return names[file.suffix]


def read_file(file: epath.Path) -> bytes:
    """The contents of one file of a tokenizer. Raises UserError if it is not a regular file, or
    cannot be read."""
    path = os.fspath(file)
    if os.path.lexists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise UserError(f"The file {file} is not a regular file; copy the tokenizer again.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"The file {file} cannot be read ({error.strerror or error}).") from error


def _check_case(tokenizer: Tokenizer, location: epath.Path, lowercase: bool | None) -> None:
    """Raises UserError if lower-casing is asked for and the files do not do it; warns if they do it
    and it is not asked for."""
    if lowercase is None or (tokenizer.facts.trained_here and not lowercase):
        return
    probe = "QUICK"
    lowers = (
        tokenizer.encode_batch([probe])[0].tolist()
        == tokenizer.encode_batch([probe.lower()])[0].tolist()
    )
    if lowercase and not lowers:
        raise UserError(
            f"The tokenizer at {location} keeps capital letters, but lowercase is True; set it "
            "to None, or choose a tokenizer that folds case."
        )
    if lowers and not lowercase:
        log.warning("the tokenizer at %s lower-cases all text, as its files say", location)
