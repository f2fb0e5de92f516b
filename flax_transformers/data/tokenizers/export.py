"""Writes tokenizers in files that `transformers` loads with equal ids.

Its classes for sentencepiece do not support byte fallback with unigram models, and ByT5's class
appends the end of a sequence to every prompt. Therefore a tokenizer.json of the `tokenizers`
library is written, which supports every model, with the frame that the model was trained with.
Published tokenizers with a class of their own keep their files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flax_transformers.data.tokenizers.base import Tokenizer
from flax_transformers.data.tokenizers.facts import CONFIG_FILE, RECORD, ROLES, parsed
from flax_transformers.data.tokenizers.kinds import ByteTokenizer, PieceTokenizer
from flax_transformers.data.tokenizers.layouts import JSON, VOCABULARY_FILES, bert_options
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.data.tokenizers.offsets import QWEN2_WORDS
from flax_transformers.data.tokenizers.sentencepiece import (
    SentencePieceTokenizer,
    parse_sentencepiece,
)
from flax_transformers.objectives.base import Frame
from flax_transformers.objectives.rows import run_frame

log = logging.getLogger(__name__)

_SPACE = "▁"
_GENERIC = (None, "PreTrainedTokenizerFast")
"""Classes of tokenizers that are not those of a family."""


def exported_files(
    tokenizer: Tokenizer, frame: Frame | None, max_length: int | None, token_types: int = 0
) -> dict[str, bytes]:
    """The files of a tokenizer for an exported model, by name.

    ``frame``: the special tokens around texts that the model was trained with; None: those that the
    run noted, if any. ``max_length``: the maximum length of the model, None without a limit;
    ``token_types``: the number of its token types.
    """
    facts = tokenizer.facts
    if not facts.trained_here and facts.tokenizer_class not in _GENERIC:
        return _published(tokenizer, max_length)
    backend = _backend(tokenizer)
    frame = _frame_to_write(tokenizer, frame or facts.run_frame)
    if frame is not None:
        backend.post_processor = _processor(tokenizer, frame)
    described: dict[str, Any] = {"tokenizer_class": _GENERIC[1]}
    kept = tokenizer.files.keys() - {*VOCABULARY_FILES, CONFIG_FILE}
    files = {name: tokenizer.files[name] for name in sorted(kept)}
    is_bert = isinstance(tokenizer, PieceTokenizer) and tokenizer.kind == "wordpiece"
    framed_as_bert = frame is None or (
        _names(tokenizer, frame) == (["[CLS]"], ["[SEP]"]) and not frame.before_second
    )
    if facts.trained_here and is_bert and framed_as_bert:
        described = {"tokenizer_class": "BertTokenizer"}
        normalizer = json.loads(backend.to_str()).get("normalizer") or {}
        described["do_lower_case"] = bool(normalizer.get("lowercase", False))
        lines = tokenizer.pieces(range(tokenizer.vocabulary.size))
        files["vocab.txt"] = "".join(f"{line}\n" for line in lines).encode()
    roles = tokenizer.vocabulary.roles
    described |= {
        f"{role}_token": tokenizer.pieces([roles[role]])[0] for role in ROLES if role in roles
    }
    if described["tokenizer_class"] == _GENERIC[1]:
        typed = ["token_type_ids"] if token_types > 1 else []
        described["model_input_names"] = ["input_ids", *typed, "attention_mask"]
    described["clean_up_tokenization_spaces"] = False
    if max_length is not None:
        described["model_max_length"] = max_length
    if not facts.trained_here:
        described |= _config(tokenizer) | {"tokenizer_class": _GENERIC[1]}
    files[JSON] = backend.to_str().encode()
    files[CONFIG_FILE] = _json(described)
    return files


def _frame_to_write(tokenizer: Tokenizer, frame: Frame | None) -> Frame | None:
    """The special tokens that a post-processor has to add for ``frame``; None if that of the file
    remains."""
    facts, own = tokenizer.facts, tokenizer.vocabulary.frame
    if facts.trained_here or own is None or not isinstance(tokenizer, PieceTokenizer):
        return frame or own
    if facts.tokenizer_class is not None:
        return frame if own == Frame() else None
    same = frame is None or replace(frame, before_second=None) == own
    return None if same and (frame is None or frame.before_second is None) else frame


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json without this package's record."""
    config: dict[str, Any] = json.loads(tokenizer.files.get(CONFIG_FILE, b"{}"))
    return {name: value for name, value in config.items() if name != RECORD}


def _published(tokenizer: Tokenizer, max_length: int | None) -> dict[str, bytes]:
    """The original files, without this package's record, and with the options of the normalizer."""
    files, config = dict(tokenizer.files), _config(tokenizer)
    if max_length is not None:
        config.setdefault("model_max_length", max_length)
    config.setdefault("tokenizer_class", tokenizer.facts.tokenizer_class)
    if isinstance(tokenizer, PieceTokenizer):
        config |= bert_options(tokenizer.serialized, tokenizer.facts)
    files[CONFIG_FILE] = _json(config)
    return files


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _names(tokenizer: Tokenizer, frame: Frame) -> tuple[list[str], list[str]]:
    return tokenizer.pieces(frame.before), tokenizer.pieces(frame.after)


def _processor(tokenizer: Tokenizer, frame: Frame) -> Any:
    """A post-processor that adds a frame around one text, and around each of two."""
    before, after = _names(tokenizer, frame)
    ids = dict(zip([*before, *after], [*frame.before, *frame.after], strict=True))
    inner = before if frame.before_second is None else tokenizer.pieces(frame.before_second)
    # RoBERTa, which has tokens before the second text, has one token type.
    token_type = 0 if frame.before_second else 1
    second = [f"{part}:{token_type}" for part in (*inner, "$B", *after)]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second],
        special_tokens=list(ids.items()),
    )


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if isinstance(tokenizer, PieceTokenizer):
        return tokenizers.Tokenizer.from_str(tokenizer.serialized)
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = sentencepiece_backend(tokenizer.model)
        _warn_of_other_ids(tokenizer.model)
        added = [token for _, token in sorted(tokenizer.added.items())]
        backend.add_tokens([tokenizers.AddedToken(**vars(token)) for token in added])
        return backend
    assert isinstance(tokenizer, ByteTokenizer)  # Marian tokenizers have a class
    return _byte_backend(tokenizer)


def _warn_of_other_ids(model: bytes) -> None:
    """Logs which part of a sentencepiece model the `tokenizers` library has no counterpart of."""
    proto = parse_sentencepiece(model)
    symbols = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and len(p.piece) > 1]
    other = [f"the symbol {symbols[0]!r}"] if symbols and _is_bpe(proto) else []
    other += ["whitespace as a suffix"] * proto.trainer_spec.treat_whitespace_as_suffix
    if other:
        log.warning(
            "the exported tokenizer gives other ids than the sentencepiece model, which has %s; "
            "load the model itself with sentencepiece", " and ".join(other),
        )  # fmt: skip


def _is_bpe(proto: Any) -> bool:
    return bool(proto.trainer_spec.model_type == proto.trainer_spec.BPE)


def _byte_backend(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """Bytes as byte-level BPE without merges: a byte's id is its number + 3."""
    letters = _letters_of_bytes()
    vocabulary = {letter: byte + tokenizer.OFFSET for byte, letter in enumerate(letters)}
    special = {name: i for i, name in tokenizer.names.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary | special, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted(special, key=special.__getitem__))
    return backend


def _letters_of_bytes() -> list[str]:
    """The character of each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    further = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(further)) for byte in range(256)]


def sentencepiece_backend(model: bytes) -> tokenizers.Tokenizer:
    """A sentencepiece model as a tokenizer of the `tokenizers` library, with the same ids."""
    proto = parse_sentencepiece(model)
    pieces, spec = proto.pieces, proto.trainer_spec
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == piece.UNKNOWN)
    if _is_bpe(proto):
        ids = {piece.piece: i for i, piece in enumerate(pieces)}
        built: Any = models.BPE(
            ids, merges_of(model), unk_token=pieces[unknown].piece, fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )  # fmt: skip
    else:
        scored = [(piece.piece, piece.score) for piece in pieces]
        built = models.Unigram(scored, unknown, spec.byte_fallback)
    backend = tokenizers.Tokenizer(built)
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme == "always" else []),
        ]
    )
    backend.add_special_tokens(
        [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    )
    return backend


def merges_of(model: bytes) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model, in order.

    The model contains only pieces: pieces with better scores are merged earlier, from any two
    pieces that form them.
    """
    proto = parse_sentencepiece(model)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                merges.append((-score, -scores[left], -scores[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def export_folder(
    source: Path,
    target: Path,
    max_length: int | None,
    token_types: int = 0,
    objective: object = None,
) -> Path:
    """A folder with the files of ``source`` in the form that `transformers` reads.

    That is ``source``, or ``target`` if a run of this package saved the tokenizer; other files are
    then copied to it. ``max_length`` and ``token_types``: see `exported_files`. ``objective``: that
    of the run, for one that did not note the special tokens around its texts. Raises UserError for
    a damaged file.
    """
    config = source / CONFIG_FILE
    if not config.is_file():
        return source
    if RECORD not in parsed({CONFIG_FILE: config.read_bytes()}, CONFIG_FILE, source):
        return source
    tokenizer = load_tokenizer(source)
    frame = tokenizer.facts.run_frame or run_frame(objective, tokenizer.vocabulary)
    files = exported_files(tokenizer, frame, max_length, token_types)
    target.mkdir(parents=True)
    kept = {file.relative_to(source): file for file in source.rglob("*") if file.is_file()}
    for path, file in kept.items():
        if str(path) not in {*files, *VOCABULARY_FILES, CONFIG_FILE}:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(file.read_bytes())
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target


def warn_of_another_class(folder: str | os.PathLike[str] | None, model_type: str) -> None:
    """Logs that `AutoTokenizer` gives other ids than the tokenizer in ``folder``.

    "qwen2" is the only type of ours for which it ignores the class in tokenizer_config.json
    (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS) and has another (ModernBERT is read as it is).
    """
    file = None if folder is None else Path(folder) / JSON
    if model_type != "qwen2" or file is None or not file.is_file():
        return
    content = parsed({JSON: file.read_bytes()}, JSON, folder)
    normalizer, step = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    patterns = [one.get("pattern") for one in step.get("pretokenizers", [])]
    if normalizer.get("type") != "NFC" or {"Regex": QWEN2_WORDS} not in patterns:
        log.warning(
            "AutoTokenizer of transformers takes every tokenizer of a qwen2 model for that of "
            "Qwen2, and gives other ids than this one; load it with "
            "PreTrainedTokenizerFast.from_pretrained"
        )
