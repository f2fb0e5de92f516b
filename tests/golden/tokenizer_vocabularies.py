"""Vocabularies trained on a few lines in twenty languages, as tokenizers of several kinds."""

from __future__ import annotations

import io
import json
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from flax_transformers.data.tokenizers.export import merges_of
from tests.golden.multilingual import corpus

Files = dict[str, Any]  # bytes and str as they are, others as JSON

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(words: str | None, specials: list[str], size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE; ``words`` divides a text first, None as GPT-2 does."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(corpus(), trainer)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def two_files(backend: tokenizers.Tokenizer) -> Files:
    """vocab.json and merges.txt."""
    model = json.loads(backend.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    }


def serialized(backend: tokenizers.Tokenizer) -> Files:
    return {"tokenizer.json": backend.to_str()}


def pieces(kind: str, size: int = 640, **options: Any) -> bytes:
    """A sentencepiece model."""
    model = io.BytesIO()
    settings = {
        "character_coverage": 1.0, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False,
        "max_sentence_length": 100_000, "num_sub_iterations": 2,
    } | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type=kind, vocab_size=size,
        **settings,
    )  # fmt: skip
    return model.getvalue()


def proto_of(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)


LLAMA2_PIECES = {
    "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
}  # fmt: skip
GEMMA_PIECES = LLAMA2_PIECES | {
    "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False,
    "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>",
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n"],
}  # fmt: skip
T5_PIECES = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def llama2_json(model: bytes, *, bos: str = "<s>", prefix: bool = True) -> tokenizers.Tokenizer:
    """The tokenizer.json of Llama 2, Mistral and Gemma, which have no pre-tokenizer."""
    proto = proto_of(model)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(ids, merges_of(model), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    control = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]
    backend.add_special_tokens(sorted(control, key=ids.__getitem__))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    return backend


def unigram_json(
    model: bytes, vocabulary: list[tuple[str, float]], unknown: int, specials: list[Any]
) -> tokenizers.Tokenizer:
    """The tokenizer.json of T5, XLM-R and mBART."""
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown))
    backend.normalizer = normalizers.Precompiled(
        proto_of(model).normalizer_spec.precompiled_charsmap
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    backend.decoder = decoders.Metaspace("▁", "always")
    backend.add_special_tokens(specials)
    return backend


def wordpiece(lowercase: bool, size: int = 900) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return backend


def lines_of(backend: tokenizers.Tokenizer) -> str:
    return "".join(f"{backend.id_to_token(i)}\n" for i in range(backend.get_vocab_size()))
