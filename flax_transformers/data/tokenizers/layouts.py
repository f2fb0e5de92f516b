"""Creates tokenizers from published files.

The tokenizer's class (tokenizer_config.json) or the model's type (config.json) defines which file
contains the vocabulary and which ids its pieces have:

    tokenizer.json                 any tokenizer of the `tokenizers` library
    vocab.txt                      BERT's WordPiece, the line number is the id
    vocab.json, merges.txt         byte-level BPE of GPT-2, RoBERTa, BART, Qwen2
    tokenizer.model, spiece.model  sentencepiece, index of a piece = id (Llama 2, Gemma, T5)
    sentencepiece.bpe.model        sentencepiece with fairseq's ids (XLM-R, mBART)
    source.spm, target.spm         sentencepiece for both sides, ids in vocab.json (Marian)
    only a class                   bytes (ByT5)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flax_transformers.data.tokenizers.base import Files, Tokenizer
from flax_transformers.data.tokenizers.facts import AddedToken, Facts
from flax_transformers.data.tokenizers.kinds import ByteTokenizer, PieceTokenizer
from flax_transformers.data.tokenizers.offsets import QWEN2_WORDS
from flax_transformers.data.tokenizers.roles import ROLE_NAMES
from flax_transformers.data.tokenizers.sentencepiece import (
    MarianTokenizer,
    SentencePieceTokenizer,
    parse_sentencepiece,
)
from flax_transformers.errors import UserError

log = logging.getLogger(__name__)

JSON = "tokenizer.json"
MODEL_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model")
VOCABULARY_FILES = (
    JSON, "vocab.txt", "vocab.json", "merges.txt", *MODEL_FILES, "source.spm", "target.spm",
    "target_vocab.json",
)  # fmt: skip
_PARTS = ("vocab.json", "merges.txt", "target.spm", "target_vocab.json")
"""Those of them that are no vocabulary without another."""
_BYTE_LEVEL = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer")
_WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BERT_OPTIONS: dict[str, tuple[str, bool | None]] = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}
"""Fields of BERT's normalizer: their names and defaults in a tokenizer_config.json."""
_FAIRSEQ = ("XLMRobertaTokenizer", "MBartTokenizer", "MBart50Tokenizer")
_SENTENCEPIECE = (
    "T5Tokenizer",
    "LlamaTokenizer",
    "GemmaTokenizer",
    "CamembertTokenizer",
    *_FAIRSEQ,
)
# In the order of their ids, after the pieces (arXiv:2001.08210; the second list arXiv:2008.00401).
_MBART_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT "
    "lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
_MBART50_FURTHER = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF "
    "pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
).split()


def holds_vocabulary(names: Collection[str]) -> bool:
    """Whether files of these names have the pieces of a tokenizer."""
    return any(name in names for name in VOCABULARY_FILES if name not in _PARTS) or (
        "vocab.json" in names and "merges.txt" in names
    )


def tokenizer_of(files: Files, facts: Facts, lowercase: bool | None) -> Tokenizer | None:
    """The tokenizer of the files; None if there is no vocabulary among them.

    ``lowercase``: for a vocab.txt if no file says. Exceptions of the libraries are not caught.
    """
    byte_class = facts.tokenizer_class == "ByT5Tokenizer"
    if byte_class or (facts.trained_here and facts.record.get("kind") == "bytes"):
        return _bytes(files, facts)
    if "source.spm" in files and (JSON not in files or facts.tokenizer_class == "MarianTokenizer"):
        return _marian(files, dataclasses.replace(facts, tokenizer_class="MarianTokenizer"))
    if JSON in files:
        return PieceTokenizer(_settled(files[JSON].decode("utf-8"), facts), facts, files)
    if "vocab.txt" in files:
        return _wordpiece(files, facts, lowercase)
    if "vocab.json" in files and "merges.txt" in files:
        return _byte_level(files, facts)
    name = next((name for name in MODEL_FILES if name in files), None)
    return None if name is None else _sentencepiece(files, facts, name)


def _settled(serialized: str, facts: Facts) -> str:
    """A tokenizer.json with the case, the prefix space and the added tokens that the files beside
    it define; unchanged if they do not differ."""
    if facts.trained_here:
        return serialized
    content = json.loads(serialized)
    changed = _settle_case(content, facts) | _settle_prefix(content, facts)
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # a unigram's pieces with their scores
        vocabulary = {piece: n for n, (piece, _) in enumerate(vocabulary)}
    added = content.setdefault("added_tokens", [])
    ids = vocabulary | {token["content"]: token["id"] for token in added}
    free = 1 + max(ids.values(), default=-1)
    for token in _missing(facts, ids):
        added.append({"id": free, **dataclasses.asdict(token)})
        free, changed = free + 1, True
    return json.dumps(content, ensure_ascii=False) if changed else serialized


def _settle_case(content: dict[str, Any], facts: Facts) -> bool:
    """BERT's options in tokenizer_config.json override those of its tokenizer.json.

    Missing ones do not, while `transformers` then takes the defaults of the class: this is logged.
    """
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer" or facts.tokenizer_class not in _WORDPIECE:
        return False
    wanted = {name: facts.flag(option) for name, (option, _) in _BERT_OPTIONS.items()}
    changed = _overwrite(normalizer, wanted)
    missing = _bert_options(normalizer, facts)
    if missing and not facts.record:
        log.warning(
            "tokenizer.json has a normalizer that transformers replaces by that of %s, because "
            "tokenizer_config.json does not have %s; add it there",
            facts.tokenizer_class, json.dumps(missing),
        )  # fmt: skip
    return changed


def bert_options(serialized: str, facts: Facts) -> dict[str, bool]:
    """Options that a tokenizer_config.json lacks and must have, so that BERT's class, which builds
    its own normalizer in `transformers`, has that of a tokenizer.json."""
    normalizer = json.loads(serialized).get("normalizer") or {}
    is_bert = facts.tokenizer_class in _WORDPIECE and normalizer.get("type") == "BertNormalizer"
    return _bert_options(normalizer, facts) if is_bert else {}


def _bert_options(normalizer: Mapping[str, Any], facts: Facts) -> dict[str, bool]:
    return {
        option: value
        for name, (option, default) in _BERT_OPTIONS.items()
        if facts.flag(option) is None and (value := normalizer.get(name, default)) != default
    }


def _settle_prefix(content: dict[str, Any], facts: Facts) -> bool:
    """The same for the prefix space of byte-level models."""
    if facts.tokenizer_class not in _BYTE_LEVEL:
        return False
    wanted = {"add_prefix_space": facts.flag("add_prefix_space")}
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    changed = [_overwrite(one, wanted) for one in steps if one.get("type") == "ByteLevel"]
    return any(changed)


def _overwrite(record: dict[str, Any], wanted: Mapping[str, bool | None]) -> bool:
    other = {k: v for k, v in wanted.items() if v is not None and v != record.get(k)}
    for name, value in other.items():
        log.warning(
            "tokenizer.json has %s=%s, tokenizer_config.json overrides it with %s",
            name, record.get(name), value,
        )  # fmt: skip
        record[name] = value
    return bool(other)


def _missing(facts: Facts, known: Iterable[str]) -> list[AddedToken]:
    """Tokens in the files that the vocabulary lacks; they get the next ids, in this order."""
    have = set(known)
    listed = [token for _, token in sorted(facts.added.items())]
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    named = [AddedToken(name) for role in roles if (name := facts.named.get(role)) is not None]
    found = []
    for token in [*listed, *named, *map(AddedToken, facts.extra)]:
        if token.content and token.content not in have:
            have.add(token.content)
            found.append(token)
    return found


def _bytes(files: Files, facts: Facts) -> Tokenizer:
    if facts.trained_here:
        return ByteTokenizer(facts=facts, files=files)
    names = {0: "<pad>", 1: "</s>", 2: "<unk>"}
    listed = {i: token.content for i, token in facts.added.items() if i >= 259}
    extra = facts.options.get("extra_ids", 125)
    count = extra if isinstance(extra, int) and 0 <= extra < 10_000 else 125
    given = [name for name in facts.extra if name not in names.values()]
    further = given or [f"<extra_id_{n}>" for n in range(count)]
    names |= listed or {259 + n: name for n, name in enumerate(further)}
    return ByteTokenizer(names, facts, files)


def _marian(files: Files, facts: Facts) -> Tokenizer:
    if "target_vocab.json" in files:
        raise UserError(
            "it has a target_vocab.json, and Marian with two vocabularies is not supported; put a "
            "tokenizer.json there, or call generate_target with ids"
        )
    for name in ("target.spm", "vocab.json"):
        if name not in files:
            raise UserError(f"it has a source.spm but no {name}; add it")
    ids = _ids(json.loads(files["vocab.json"].decode("utf-8")))
    for name in ("<unk>", "</s>", "<pad>"):
        if name not in ids:
            raise UserError(f"vocab.json has no {name}")
    return MarianTokenizer((files["source.spm"], files["target.spm"]), ids, facts, files)


def _ids(content: Any) -> dict[str, int]:
    """A vocab.json: the id of each piece."""
    if not isinstance(content, dict) or not content:
        raise UserError("vocab.json is not a table of ids by piece")
    for piece, i in content.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 10_000_000:
            raise UserError(f"vocab.json gives {piece!r} the id {i!r}")
    return content


def bert_backend(model: models.WordPiece, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's normalizer and word splitting."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def frame_bert(backend: tokenizers.Tokenizer) -> None:
    """Adds [CLS] and [SEP] around texts, for other programs that read the saved file."""
    cls_id, sep_id = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    if cls_id is not None and sep_id is not None:
        backend.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))


WORDPIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _wordpiece(files: Files, facts: Facts, lowercase: bool | None) -> Tokenizer:
    """One WordPiece per line; the line number from 0 is the id (the original BERT release)."""
    if facts.tokenizer_class not in (None, "PreTrainedTokenizerFast", *_WORDPIECE):
        raise UserError(_unsupported("vocab.txt belongs", facts))
    lines = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise UserError("it contains a token twice; every line must differ.")
    unknown = facts.role("unk") or "[UNK]"
    if unknown not in vocabulary:
        raise UserError(f"it has no line {unknown}, which a WordPiece vocabulary needs.")
    backend = bert_backend(
        models.WordPiece(vocabulary, unk_token=unknown), _lowers(vocabulary, facts, lowercase)
    )
    backend.add_special_tokens([name for name in WORDPIECE_SPECIALS if name in vocabulary])
    frame_bert(backend)
    serialized = backend.to_str()
    return PieceTokenizer(_settled(serialized, facts), facts, files)


def _lowers(vocabulary: Iterable[str], facts: Facts, asked: bool | None) -> bool:
    """Whether a vocab.txt is uncased: by its folder, by ``asked``, or by its tokens.

    Raises UserError if capital letters are asked for and the vocabulary has none: every word with
    one would be unknown.
    """
    said = facts.flag("do_lower_case")
    if said is not None:
        return said
    ordinary = [piece for piece in vocabulary if not re.fullmatch(r"\[.*\]", piece)]
    cased = any(piece != piece.lower() for piece in ordinary)
    if asked is False and not cased and any(map(str.isalpha, "".join(ordinary))):
        raise UserError(
            "its tokens have no capital letters, so that every word with one would be unknown; "
            "set the tokenizer's lowercase to True"
        )
    return not cased if asked is None else asked


def _byte_level(files: Files, facts: Facts) -> Tokenizer:
    """The two files of GPT-2's BPE, which other families use too."""
    name = facts.tokenizer_class
    if name not in (None, "PreTrainedTokenizerFast", *_BYTE_LEVEL):
        raise UserError(_unsupported("vocab.json and merges.txt belong", facts))
    vocabulary = _ids(json.loads(files["vocab.json"].decode("utf-8")))
    lines = files["merges.txt"].decode("utf-8").split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError("merges.txt has a line that is not two tokens separated by a space")
    merges = [(left, right) for left, right in pairs]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    prefix = bool(facts.flag("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if name == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    names = [facts.role(role) for role in ROLE_NAMES]
    if facts.known_class is None and not facts.named:
        names = [one for several in ROLE_NAMES.values() for one in several]
    special = {name: AddedToken(name) for name in names if name in vocabulary}
    special |= {t.content: t for t in facts.added.values() if t.content in vocabulary}
    backend.add_tokens([tokenizers.AddedToken(**vars(token)) for token in special.values()])
    backend.post_processor = _processor(facts, vocabulary, prefix)
    return PieceTokenizer(_settled(backend.to_str(), facts), facts, files)


def _processor(facts: Facts, vocabulary: Mapping[str, int], prefix: bool) -> Any:
    """The post-processor of the class."""
    if facts.tokenizer_class in ("RobertaTokenizer", "BartTokenizer"):
        cls, sep = (str(facts.role(role)) for role in ("cls", "sep"))
        if cls in vocabulary and sep in vocabulary:
            return processors.RobertaProcessing(
                (sep, vocabulary[sep]), (cls, vocabulary[cls]), add_prefix_space=prefix
            )
    bos = facts.role("bos")
    if bos is not None and facts.flag("add_bos_token") and bos in vocabulary:
        return processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return processors.ByteLevel(trim_offsets=False)


def _unsupported(belongs: str, facts: Facts) -> str:
    return (
        f"{belongs} to a {facts.tokenizer_class}, which is not supported; add the tokenizer.json "
        "of the same tokenizer, from the published model or as save_pretrained of its fast class "
        "in transformers writes it"
    )


def _sentencepiece(files: Files, facts: Facts, name: str) -> Tokenizer:
    known = facts.tokenizer_class in (None, "PreTrainedTokenizerFast", *_SENTENCEPIECE)
    if not (known or facts.trained_here):  # others change the text before it comes to the model
        raise UserError(_unsupported(f"{name} belongs", facts))
    model = _with_special_pieces_hidden(files[name], facts)
    if name == "sentencepiece.bpe.model" or facts.tokenizer_class in _FAIRSEQ:
        return _fairseq(model, files, facts)
    sampling = facts.options.get("sp_model_kwargs") or {}
    if isinstance(sampling, dict) and sampling.get("enable_sampling"):
        raise UserError(
            "tokenizer_config.json enables sampling (sp_model_kwargs.enable_sampling), which is "
            "not supported; remove that option"
        )
    proto = parse_sentencepiece(model)
    prefix = facts.flag("add_prefix_space")
    if prefix is not None and prefix != proto.normalizer_spec.add_dummy_prefix:
        proto.normalizer_spec.add_dummy_prefix = prefix
        model = proto.SerializeToString()
    pieces = {piece.piece for piece in proto.pieces}
    has_sentinels = any(re.fullmatch(r"▁?<extra_id_\d+>", piece) for piece in pieces)
    count = facts.options.get("extra_ids")
    if count is None:
        published_t5 = facts.tokenizer_class == "T5Tokenizer" and not facts.trained_here
        count = 100 if published_t5 else 0
    if count and not has_sentinels:
        model = with_sentinels(model, int(count))
        pieces |= {f"<extra_id_{n}>" for n in range(int(count))}
    if facts.trained_here:
        return SentencePieceTokenizer(model, facts, files)
    added = {i: token for i, token in facts.added.items() if token.content not in pieces}
    free = max([len(pieces) - 1, *added]) + 1
    have = pieces | {token.content for token in added.values()}
    added |= {free + n: token for n, token in enumerate(_missing(facts, have))}
    return SentencePieceTokenizer(model, facts, files, added=added)


def _fairseq(model: bytes, files: Files, facts: Facts) -> Tokenizer:
    """fairseq's ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then pieces; languages and <mask> last."""
    languages = {
        "XLMRobertaTokenizer": [],
        "MBartTokenizer": _MBART_LANGUAGES,
        "MBart50Tokenizer": [*_MBART_LANGUAGES, *_MBART50_FURTHER],
    }.get(facts.tokenizer_class or "")
    if languages is None:
        raise UserError(
            "the ids of the pieces of sentencepiece.bpe.model are not known, because no "
            "tokenizer_config.json or config.json beside it says that it is XLM-R's or mBART's; "
            "add the model's tokenizer.json"
        )
    names = [piece.piece for piece in parse_sentencepiece(model).pieces]
    first = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    ids = [first.get(name, n + 1) for n, name in enumerate(names)]
    added = {} if "<pad>" in names else {1: AddedToken("<pad>")}
    behind = [*languages, "<mask>"]
    added |= {len(names) + 1 + n: AddedToken(name) for n, name in enumerate(behind)}
    have = {*names, *(token.content for token in added.values())}
    added |= {i: token for i, token in facts.added.items() if token.content not in have}
    return SentencePieceTokenizer(model, facts, files, ids, added)


def with_sentinels(model: bytes, count: int) -> bytes:
    """The model with sentinels as in T5: ``<extra_id_0>`` has the highest id, the others are below.

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


def _with_special_pieces_hidden(model: bytes, facts: Facts) -> bytes:
    """The model with all special pieces as control symbols, which text never yields.

    Published models declare some of them ("[MASK]", "<extra_id_0>") as user-defined symbols, which
    match in the text.
    """
    proto = parse_sentencepiece(model)
    special = {name for names in ROLE_NAMES.values() for name in names}
    special |= {name for name in map(facts.role, ROLE_NAMES) if name is not None}
    exposed = [
        piece
        for piece in proto.pieces
        if piece.type == piece.USER_DEFINED
        and (piece.piece in special or re.fullmatch(r"▁?<extra_id_\d+>", piece.piece))
    ]
    for piece in exposed:
        piece.type = piece.CONTROL
    return proto.SerializeToString() if exposed else model
