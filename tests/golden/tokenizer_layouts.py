# ruff: noqa: E501
"""Tokenizer folders in the very layouts in which they are published, small.

Each has the files of the published folder, with its config texts, around a vocabulary that is
trained on a few lines in twenty languages. What `transformers` makes of them is the golden:

    .venv-parity/bin/python -m tests.golden.tokenizer_layouts

writes tokenizer_layouts.tar.xz, with all folders and, for some texts, the ids, roles, frames and
decoded texts of ``AutoTokenizer``.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from tests.golden.multilingual import texts
from tests.golden.tokenizer_vocabularies import (
    GEMMA_PIECES,
    LLAMA2_PIECES,
    LLAMA3_WORDS,
    QWEN2_WORDS,
    T5_PIECES,
    Files,
    byte_level,
    lines_of,
    llama2_json,
    pieces,
    proto_of,
    serialized,
    two_files,
    unigram_json,
    wordpiece,
)

ARCHIVE = Path(__file__).with_suffix("").with_name("tokenizer_layouts.tar.xz")
EXPECTED = "expected.json"
TEXTS = 2  # for each language, in the golden
ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def added(content: str, **changes: Any) -> dict[str, Any]:
    """An entry of ``added_tokens_decoder``."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, "special": True, **changes}


# Layouts: one function for each, named as the folder.


def gpt2() -> Files:
    backend = byte_level(None, [])
    backend.add_special_tokens(["<|endoftext|>"])
    files = two_files(backend)
    files["vocab.json"]["<|endoftext|>"] = len(files["vocab.json"])
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "bos_token_id": 400,
        "eos_token_id": 400, "vocab_size": 401, "n_positions": 1024,
    }  # fmt: skip
    return files | {"tokenizer_config.json": {"model_max_length": 1024}, "config.json": config}


def gpt2_json() -> Files:
    backend = byte_level(None, [])
    backend.add_special_tokens(["<|endoftext|>"])
    return gpt2() | serialized(backend)


def llama2_model() -> Files:
    role = {"__type": "AddedToken", **{k: v for k, v in added("").items() if k != "special"}}
    named = {
        f"{name}_token": role | {"content": content, "normalized": True}
        for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    return {
        "tokenizer.model": pieces("bpe", 900, **LLAMA2_PIECES),
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, **named,
            "clean_up_tokenization_spaces": False, "legacy": False,
            "model_max_length": 1000000000000000019884624838656, "pad_token": None, "padding_side": "right",
            "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
        },
        "special_tokens_map.json": {
            name: {k: v for k, v in token.items() if k != "__type"} for name, token in named.items()
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }  # fmt: skip


def llama2_json_folder() -> Files:
    files = llama2_model()
    return files | serialized(llama2_json(files["tokenizer.model"]))


def vicuna_model() -> Files:
    """Llama 2's files with a padding token in added_tokens.json, as fine-tunes have it."""
    files = llama2_model()
    size = len(proto_of(files["tokenizer.model"]).pieces)
    files["special_tokens_map.json"]["pad_token"] = "<pad>"
    return files | {"added_tokens.json": {"<pad>": size}}


def llama3() -> Files:
    backend = byte_level(LLAMA3_WORDS, [])
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eom_id|>", "<|eot_id|>"]  # fmt: skip
    backend.add_special_tokens(specials)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", 400)],
            ),
        ]
    )
    return serialized(backend) | {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(400 + n): added(name) for n, name in enumerate(specials)},
            "bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": True,
            "eos_token": "<|end_of_text|>",
            "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {
            "bos_token": {k: v for k, v in added("<|begin_of_text|>").items() if k != "special"},
            "eos_token": {k: v for k, v in added("<|end_of_text|>").items() if k != "special"},
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 400,
            "eos_token_id": 401,
        },
        "generation_config.json": {"bos_token_id": 400, "eos_token_id": [401, 406, 407]},
    }  # fmt: skip


def llama3_instruct() -> Files:
    files = llama3()
    files["tokenizer_config.json"] |= {
        "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>",
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }  # fmt: skip
    files.pop("special_tokens_map.json")
    return files


def mistral() -> Files:
    model = pieces("bpe", 900, **LLAMA2_PIECES)
    return {"tokenizer.model": model} | serialized(llama2_json(model)) | {
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False,
            "added_tokens_decoder": {
                "0": added("<unk>"), "1": added("<s>"), "2": added("</s>"),
            },
            "additional_special_tokens": [], "bos_token": "<s>",
            "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": True,
            "model_max_length": 1000000000000000019884624838656, "pad_token": None,
            "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "config.json": {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }  # fmt: skip


def mixtral() -> Files:
    files = mistral()
    files.pop("tokenizer.model")
    files["config.json"] |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return files


def qwen2_files() -> Files:
    backend = byte_level(QWEN2_WORDS, [])
    backend.normalizer = normalizers.NFC()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(400 + n): added(name) for n, name in enumerate(specials)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    return two_files(backend) | {
        "tokenizer_config.json": config,
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 400,
            "eos_token_id": 400,
        },
        "generation_config.json": {"bos_token_id": 400, "eos_token_id": 400, "max_new_tokens": 2048},
    }  # fmt: skip


def qwen2() -> Files:
    backend = byte_level(QWEN2_WORDS, [])
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return qwen2_files() | serialized(backend)


def gemma_model() -> Files:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
             "\n\n"]  # fmt: skip
    return {
        "tokenizer.model": pieces("bpe", 900, **GEMMA_PIECES),
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False,
            "added_tokens_decoder": {
                str(n): added(name, special=n < 4) for n, name in enumerate(names)
            },
            "bos_token": "<bos>", "clean_up_tokenization_spaces": False, "eos_token": "<eos>",
            "legacy": None, "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>", "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
        "special_tokens_map.json": {
            f"{role}_token": {k: v for k, v in added(f"<{role}>").items() if k != "special"}
            for role in ("bos", "eos", "pad", "unk")
        },
        "config.json": {
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0,
        },
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    }  # fmt: skip


def gemma() -> Files:
    files = gemma_model()
    backend = llama2_json(files["tokenizer.model"], bos="<bos>", prefix=False)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_tokens(
        [AddedToken(name, normalized=False) for name in
         ("<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n")]
    )  # fmt: skip
    return files | serialized(backend)


def bert_uncased_vocab() -> Files:
    return {
        "vocab.txt": lines_of(wordpiece(True)),
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
        "config.json": {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
    }


def bert_cased_vocab() -> Files:
    return {
        "vocab.txt": lines_of(wordpiece(False)),
        "tokenizer_config.json": {"do_lower_case": False, "model_max_length": 512},
        "config.json": {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
    }


def bert_cased() -> Files:
    backend = wordpiece(False)
    files = bert_cased_vocab()
    return files | {"vocab.txt": lines_of(backend)} | serialized(backend)


def distilbert() -> Files:
    backend = wordpiece(True)
    return serialized(backend) | {
        "vocab.txt": lines_of(backend),
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
        "config.json": {"architectures": ["DistilBertForMaskedLM"], "model_type": "distilbert"},
    }


def minilm() -> Files:
    """sentence-transformers' folder: padding and truncation are stored in tokenizer.json."""
    backend = wordpiece(True)
    backend.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    backend.enable_truncation(128)
    named = {
        "cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]",
        "unk_token": "[UNK]",
    }  # fmt: skip
    return serialized(backend) | {
        "vocab.txt": lines_of(backend),
        "tokenizer_config.json": {
            "do_lower_case": True, **named, "tokenize_chinese_chars": True, "strip_accents": None,
            "name_or_path": "nreimers/MiniLM-L6-H384-uncased", "do_basic_tokenize": True,
            "never_split": None, "tokenizer_class": "BertTokenizer", "model_max_length": 512,
        },
        "special_tokens_map.json": named,
        "config.json": {"architectures": ["BertModel"], "model_type": "bert"},
    }  # fmt: skip


FAIRSEQ_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


def roberta_backend() -> tokenizers.Tokenizer:
    backend = byte_level(None, [])
    ids = {name: i for i, name in enumerate(FAIRSEQ_SPECIALS)}
    trained = json.loads(backend.to_str())["model"]
    ids |= {piece: i + 4 for piece, i in trained["vocab"].items()}
    ids["<mask>"] = len(ids)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    made = tokenizers.Tokenizer(models.BPE(ids, merges))
    made.pre_tokenizer, made.decoder = backend.pre_tokenizer, backend.decoder
    made.add_special_tokens([*FAIRSEQ_SPECIALS, AddedToken("<mask>", lstrip=True)])
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return made


def roberta_files() -> Files:
    return two_files(roberta_backend()) | {
        "tokenizer_config.json": {"model_max_length": 512},
        "config.json": {
            "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 1,
        },
    }  # fmt: skip


def roberta() -> Files:
    return roberta_files() | serialized(roberta_backend())


def bart() -> Files:
    config = {
        "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2,
    }  # fmt: skip
    return roberta_files() | serialized(roberta_backend()) | {
        "tokenizer_config.json": {"model_max_length": 1024}, "config.json": config,
    }  # fmt: skip


def bart_files() -> Files:
    files = bart()
    files.pop("tokenizer.json")
    return files


def modernbert() -> Files:
    backend = byte_level(None, [])
    backend.normalizer = normalizers.NFC()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend.add_tokens([AddedToken("  ", normalized=True), AddedToken("    ", normalized=True)])
    backend.add_special_tokens(
        ["<|endoftext|>", *specials[:4], AddedToken("[MASK]", lstrip=True, normalized=False)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 404), ("[SEP]", 405)],
    )  # fmt: skip
    backend.enable_truncation(8192)
    decoder = {
        str(i): added(t.content, lstrip=t.lstrip, normalized=t.normalized, special=t.special)
        for i, t in sorted(backend.get_added_tokens_decoder().items())
    }
    named = {f"{n.strip('[]').lower()}_token": n for n in specials}
    return serialized(backend) | {
        "tokenizer_config.json": {
            "added_tokens_decoder": decoder, "clean_up_tokenization_spaces": True, **named,
            "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 8192,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {
            name: {k: v for k, v in added(token).items() if k != "special"}
            for name, token in named.items()
        },
        "config.json": {
            "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert",
            "bos_token_id": 404, "cls_token_id": 404, "eos_token_id": 405, "pad_token_id": 406,
            "sep_token_id": 405,
        },
    }  # fmt: skip


def t5_model() -> Files:
    extra = [f"<extra_id_{n}>" for n in range(100)]
    return {
        "spiece.model": pieces("unigram", **T5_PIECES),
        "tokenizer_config.json": {
            "additional_special_tokens": extra, "eos_token": "</s>", "extra_ids": 100,
            "model_max_length": 512, "name_or_path": "t5-small", "pad_token": "<pad>",
            "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer", "unk_token": "<unk>",
        },
        "config.json": {
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        },
        "generation_config.json": {
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        },
    }  # fmt: skip


def t5() -> Files:
    files = t5_model()
    model = files["spiece.model"]
    vocabulary = [(piece.piece, piece.score) for piece in proto_of(model).pieces]
    vocabulary += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(100))]
    backend = unigram_json(
        model, vocabulary, 2, ["<pad>", "</s>", "<unk>", *(name for name, _ in vocabulary[-100:])]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return files | serialized(backend)


def mt5_model() -> Files:
    proto = proto_of(pieces("unigram", **T5_PIECES, byte_fallback=True, size=900))
    for n in reversed(range(100)):
        proto.pieces.add(piece=f"▁<extra_id_{n}>", score=0.0, type=4)
    return {
        "spiece.model": proto.SerializeToString(),
        "tokenizer_config.json": {
            "additional_special_tokens": None, "eos_token": "</s>", "extra_ids": 0,
            "name_or_path": "google/mt5-small", "pad_token": "<pad>", "sp_model_kwargs": {},
            "special_tokens_map_file": None, "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
        "special_tokens_map.json": {
            "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        },
        "config.json": {
            "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        },
    }  # fmt: skip


def byt5() -> Files:
    extra = [f"<extra_id_{n}>" for n in range(125)]
    names = ["<pad>", "</s>", "<unk>"]
    stripped = {
        f"{role}_token": {
            "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": True, "__type": "AddedToken",
        }
        for role, name in zip(("pad", "eos", "unk"), names, strict=True)
    }  # fmt: skip
    return {
        "tokenizer_config.json": {
            **stripped, "extra_ids": 125, "additional_special_tokens": extra,
            "tokenizer_class": "ByT5Tokenizer",
        },
        "special_tokens_map.json": {
            **{role: {k: v for k, v in token.items() if k != "__type"} for role, token in stripped.items()},
            "additional_special_tokens": extra,
        },
        "config.json": {
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
            "tokenizer_class": "ByT5Tokenizer", "eos_token_id": 1, "pad_token_id": 0,
        },
    }  # fmt: skip


def xlm_roberta_model() -> Files:
    return {
        "sentencepiece.bpe.model": pieces("unigram", unk_id=0, bos_id=1, eos_id=2, pad_id=-1),
        "tokenizer_config.json": {"model_max_length": 512},
        "config.json": {
            "architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta",
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        },
    }  # fmt: skip


def fairseq_vocabulary(model: bytes, further: list[str]) -> list[tuple[str, float]]:
    found = [(name, 0.0) for name in FAIRSEQ_SPECIALS]
    found += [(piece.piece, piece.score) for piece in proto_of(model).pieces[3:]]
    return [*found, *((name, 0.0) for name in further)]


def xlm_roberta() -> Files:
    files = xlm_roberta_model()
    model = files["sentencepiece.bpe.model"]
    backend = unigram_json(
        model, fairseq_vocabulary(model, ["<mask>"]), 3,
        [*FAIRSEQ_SPECIALS, AddedToken("<mask>", lstrip=True)],
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    return files | serialized(backend)


MBART_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT "
    "lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()


def mbart_model() -> Files:
    return {
        "sentencepiece.bpe.model": xlm_roberta_model()["sentencepiece.bpe.model"],
        "tokenizer_config.json": {
            "model_max_length": 1024, "src_lang": "en_XX", "tgt_lang": "ro_RO",
            "tokenizer_class": "MBartTokenizer",
        },
        "config.json": {
            "architectures": ["MBartForConditionalGeneration"], "model_type": "mbart",
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        },
    }  # fmt: skip


def mbart() -> Files:
    files = mbart_model()
    model = files["sentencepiece.bpe.model"]
    backend = unigram_json(
        model, fairseq_vocabulary(model, [*MBART_LANGUAGES, "<mask>"]), 3,
        [*FAIRSEQ_SPECIALS, *MBART_LANGUAGES, AddedToken("<mask>", lstrip=True)],
    )  # fmt: skip
    language = backend.token_to_id("en_XX")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s> en_XX", pair="$A $B </s> en_XX",
        special_tokens=[("</s>", 2), ("en_XX", language)],
    )  # fmt: skip
    return files | serialized(backend)


def mbart50_model() -> Files:
    return mbart_model() | {
        "tokenizer_config.json": {
            "src_lang": None, "tgt_lang": None, "eos_token": "</s>", "sep_token": "</s>",
            "cls_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>", "sp_model_kwargs": {},
            "mask_token": {
                "content": "<mask>", "single_word": False, "lstrip": True, "rstrip": False,
                "normalized": True, "__type": "AddedToken",
            },
            "language_codes": "ML50", "tokenizer_class": "MBart50Tokenizer",
        },
    }  # fmt: skip


def marian() -> Files:
    source, target = pieces("unigram"), pieces("unigram", 600)
    names = dict.fromkeys(
        piece.piece for model in (source, target) for piece in proto_of(model).pieces[3:]
    )
    vocabulary = ["</s>", "<unk>", *names, ">>fra<<", ">>deu<<", "<pad>"]
    return {
        "source.spm": source, "target.spm": target,
        "vocab.json": {name: i for i, name in enumerate(vocabulary)},
        "tokenizer_config.json": {
            "source_lang": "en", "target_lang": "ROMANCE", "model_max_length": 512,
        },
        "config.json": {
            "architectures": ["MarianMTModel"], "model_type": "marian", "eos_token_id": 0,
            "pad_token_id": len(vocabulary) - 1,
        },
    }  # fmt: skip


LAYOUTS: tuple[Callable[[], Files], ...] = (
    gpt2, gpt2_json, llama2_model, llama2_json_folder, vicuna_model, llama3, llama3_instruct,
    mistral, mixtral, qwen2_files, qwen2, gemma_model, gemma, bert_uncased_vocab, bert_cased_vocab,
    bert_cased, distilbert, minilm, roberta_files, roberta, bart, bart_files, modernbert, t5_model,
    t5, mt5_model, byt5, xlm_roberta_model, xlm_roberta, mbart_model, mbart, mbart50_model, marian,
)  # fmt: skip


def write(folder: Path, files: Files) -> None:
    """A layout into a new folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = (json.dumps(content, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(content)


def build(root: Path) -> list[str]:
    """All layouts below a folder; their names."""
    for layout in LAYOUTS:
        write(root / layout.__name__, layout())
    return [layout.__name__ for layout in LAYOUTS]


def given_texts(name: str, count: int) -> list[str]:
    """Texts for a layout, ``count`` for each language.

    Where transformers 5 differs from the model's own sentencepiece, texts without what it differs
    in: it takes a space at the beginning of a text of Llama 2 for the one that is put there, leaves
    mBART's text unnormalised, and keeps a space at its end for mBART-50.
    """
    given = [text for several in texts(count).values() for text in several]
    if name.startswith(("llama2", "vicuna", "mbart")):
        return [unicodedata.normalize("NFKC", text).strip() for text in given]
    return given


def expected(folder: Path, given: list[str]) -> dict[str, Any]:
    """What transformers makes of a folder and of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    framed = tokenizer(given, verbose=False)["input_ids"]
    bare = tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _around(framed[0], bare[0])
    assert all(row == [*before, *ids, *after] for row, ids in zip(framed, bare, strict=True))
    return {
        "roles": {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES},
        "before": before,
        "after": after,
        "size": max(tokenizer.get_vocab().values()) + 1,
        "ids": bare,
        "decoded": [tokenizer.decode(ids) for ids in bare],
    }


def _around(framed: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    for first in range(len(framed) - len(bare) + 1):
        if framed[first : first + len(bare)] == bare:
            return framed[:first], framed[first + len(bare) :]
    raise AssertionError("the text is not in the framed text")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "layouts"
        names = build(root)
        found = {name: expected(root / name, given_texts(name, TEXTS)) for name in names}
        (root / EXPECTED).write_text(json.dumps(found, separators=(",", ":")))
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for file in sorted(root.rglob("*.*"), key=lambda file: (file.name, file.parent.name)):
                if file.is_file():
                    info = tarfile.TarInfo(str(file.relative_to(root)))
                    info.size = file.stat().st_size
                    with file.open("rb") as opened:
                        archive.addfile(info, opened)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes, {len(names)} layouts")


if __name__ == "__main__":
    sys.exit(main())
