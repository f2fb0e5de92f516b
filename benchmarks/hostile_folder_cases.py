"""The changes that ``hostile_folders.py`` makes to intact Hugging Face folders."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """A change of the folder of a family. ``readable``: reading the folder is also correct."""

    kind: str
    name: str
    family: str
    change: Callable[[Path], None]
    readable: bool = True


# Changes of config.json.

_SIZES = {
    "bert": (
        "num_hidden_layers hidden_size vocab_size num_attention_heads intermediate_size "
        "max_position_embeddings layer_norm_eps type_vocab_size"
    ),
    "gpt2": "n_layer n_embd n_head n_positions vocab_size layer_norm_epsilon",
    "llama": "num_hidden_layers num_key_value_heads rope_theta rms_norm_eps head_dim vocab_size",
    "t5": "num_layers num_decoder_layers d_model d_kv relative_attention_num_buckets",
    "bart": "encoder_layers decoder_layers d_model decoder_attention_heads",
    "vit": "image_size patch_size num_channels num_hidden_layers",
    "mixtral": "num_local_experts num_experts_per_tok num_hidden_layers",
    "modernbert": "num_hidden_layers layer_types global_attn_every_n_layers local_attention",
}
_VALUES: tuple[Any, ...] = (
    10**5, math.nan, -1, "12", None, 10**9, [], 0, math.inf, {}, 10**20, True, 1.5, -math.inf,
    10**4,
)  # fmt: skip


def _set(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _write(name: str, content: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return change


def _recode(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return run


def config_cases() -> Iterator[Case]:
    count = 0
    for family, names in _SIZES.items():
        for name in names.split():
            value = _VALUES[count % len(_VALUES)]
            count += 1
            shown = f"{value:.0e}" if isinstance(value, int) and value > 10**4 else repr(value)
            yield Case("config number", f"{name} {shown}", family, _set(**{name: value}))
    texts: dict[str, bytes] = {
        "empty": b"",
        "not JSON": b"model_type: bert\n",
        "a list": b"[]",
        "a number": b"5",
        "cut short": b'{"model_type": "bert", "hidden_si',
        "nested 100,000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "zeros": bytes(4096),
        "300 MB long": b'{"a": "' + b"x" * 300_000_000 + b'"}',
        "a number of 10,000 digits": b'{"model_type": "bert", "hidden_size": '
        + b"9" * 10_000
        + b"}",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\nsize 5\n",
        "HTML": b"<!DOCTYPE html><html>401</html>",
    }
    for name, text in texts.items():
        yield Case("config text", name, "bert", _write("config.json", text), readable=False)
    for name, change in (
        ("byte order mark", lambda data: b"\xef\xbb\xbf" + data),
        ("UTF-16", lambda data: data.decode().encode("utf-16")),
        ("Latin-1 letter", lambda data: data[:-2] + b', "x": "\xe9"}'),
        ("every key twice", lambda data: b"{" + data[1:-2] + b"," + data[1:-2] + b"}"),
    ):
        yield Case("config text", name, "llama", _recode("config.json", change))
    for name, family, changes in (
        ("architectures a word", "bert", {"architectures": "BertForMaskedLM"}),
        ("architectures nested", "bert", {"architectures": [["BertForMaskedLM"]]}),
        ("architecture of a megabyte", "bert", {"architectures": ["B" * 10**6]}),
        ("model_type a list", "bert", {"model_type": ["bert"]}),
        ("architecture of another family", "bert", {"architectures": ["GPT2LMHeadModel"]}),
        ("id2label of nulls", "vit", {"id2label": {"0": None, "1": None}}),
        ("id2label of 10,000", "vit", {"id2label": {str(i): "x" for i in range(10_000)}}),
        ("num_labels 1e9", "vit", {"id2label": None, "num_labels": 10**9}),
        ("rope_scaling garbage", "llama", {"rope_scaling": {"type": ["x"], "factor": math.nan}}),
        ("rope_parameters a list", "llama", {"rope_parameters": [1, 2]}),
        ("eos_token_id nested", "llama", {"eos_token_id": [[1]]}),
        ("pad_token_id 1e12", "gpt2", {"pad_token_id": 10**12}),
        ("tie_word_embeddings a word", "gpt2", {"tie_word_embeddings": "yes"}),
        ("activation a record", "bert", {"hidden_act": {"name": "gelu"}}),
        ("quantised", "llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("quantisation garbage", "llama", {"quantization_config": [1]}),
        ("layer_types of 100,000", "modernbert", {"layer_types": ["full_attention"] * 100_000}),
        ("dropout 2", "bert", {"hidden_dropout_prob": 2}),
        ("pruned heads", "bert", {"pruned_heads": {"0": [1]}}),
    ):  # fmt: skip
        yield Case("config field", name, family, _set(**changes))


# Changes of the weights.


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return run


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the header, without the checksum that this package writes there."""

    def rewrite(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        header = change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _raw(rewrite)


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})

    return run


def _first(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = next(iter(header))
    return header | {name: header[name] | changes}


def _drop(word: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {n: t for n, t in tensors.items() if word not in n}


def _with(**more: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: tensors | more


def _map(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], dict[str, np.ndarray]]:
    return lambda tensors: {n: np.ascontiguousarray(change(t)) for n, t in tensors.items()}


def weight_cases() -> Iterator[Case]:
    for name, change in (
        ("empty", lambda data: b""),
        ("cut in the header", lambda data: data[:100]),
        ("cut in the tensors", lambda data: data[: len(data) // 2]),
        ("last byte missing", lambda data: data[:-1]),
        ("a byte too many", lambda data: data + b"\0"),
        ("header length 2**63", lambda data: struct.pack("<Q", 2**63) + data[8:]),
        ("header length 10**9", lambda data: struct.pack("<Q", 10**9) + data[8:]),
        ("header length 0", lambda data: struct.pack("<Q", 0) + data[8:]),
        ("zeros", lambda data: bytes(len(data))),
        ("a bit of a weight", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        ("git-lfs pointer", lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 5\n"),
        ("a pickle", lambda data: b"\x80\x04\x95" + bytes(500)),
        ("a zip", lambda data: b"PK\x03\x04" + bytes(500)),
    ):
        yield Case("safetensors bytes", name, "bert", _raw(change), readable=False)
    for name, change in (
        ("offsets overlap", lambda h: _first(h, data_offsets=[0, 8])),
        ("offsets backwards", lambda h: _first(h, data_offsets=[8, 0])),
        ("offsets beyond the file", lambda h: _first(h, data_offsets=[0, 10**15])),
        ("offset negative", lambda h: _first(h, data_offsets=[-8, 8])),
        ("dtype unknown", lambda h: _first(h, dtype="F7")),
        ("dtype float8", lambda h: _first(h, dtype="F8_E4M3")),
        ("dtype of integers", lambda h: _first(h, dtype="I32")),
        ("shape 2**62", lambda h: _first(h, shape=[2**62, 2**62])),
        ("shape negative", lambda h: _first(h, shape=[-1])),
        ("shape a word", lambda h: _first(h, shape="x")),
        ("a list", lambda h: [1]),
        ("no tensors", lambda h: {}),
    ):
        yield Case("safetensors header", name, "gpt2", _header(change), readable=False)
    for name, family, change, readable in (
        ("a layer missing", "llama", _drop("layers.1."), False),
        ("one tensor missing", "t5", _drop("block.0.layer.0.SelfAttention.q"), False),
        ("logits' table missing", "llama", _drop("lm_head"), False),
        ("final norm missing", "vit", _drop("vit.layernorm"), False),
        ("all but one missing", "bart", lambda t: dict([next(iter(t.items()))]), False),
        ("an unknown tensor", "bert", _with(**{"bert.extra.weight": np.ones(3, "f4")}), False),
        ("a second word table", "gpt2",
         _with(**{"lm_head.weight": np.ones((96, 32), "f4")}), False),
        ("an expert missing", "mixtral", _drop("experts.1."), False),
        ("an expert too many", "mixtral",
         _with(**{"model.layers.0.block_sparse_moe.experts.99.w1.weight": np.ones((48, 32), "f4")}),
         False),
        ("transposed", "llama", _map(np.transpose), False),
        ("flat", "bert", _map(np.ravel), False),
        ("an axis more", "vit", _map(lambda t: t[None]), False),
        ("NaN", "modernbert", _map(lambda t: t * np.float32(np.nan)), False),
        ("infinite", "t5", _map(lambda t: t + np.float32(np.inf)), False),
        ("integers", "bart", _map(lambda t: t.astype(np.int32)), False),
        ("bytes", "bert", _map(lambda t: t.astype(np.uint8)), False),
        ("booleans", "bert", _map(lambda t: t > 0), False),
        ("float64", "gpt2", _map(lambda t: t.astype(np.float64)), True),
        ("names of a wrapper", "bert", lambda t: {f"module.{n}": v for n, v in t.items()}, True),
        ("names compiled", "t5", lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, True),
        ("wrapped in part", "bert",
         lambda t: t | {f"_orig_mod.{n}": v for n, v in list(t.items())[:1]}, False),
        ("names in capitals", "llama", lambda t: {n.upper(): v for n, v in t.items()}, False),
        ("names with line breaks", "llama", lambda t: {f"{n}\n": v for n, v in t.items()}, False),
        ("10,000 tensors", "bert",
         lambda t: t | {f"x.{i}": np.ones(1, "f4") for i in range(10_000)}, False),
        ("weights of another model", "bert", lambda t: {"a.b": np.ones((3, 3), "f4")}, False),
    ):  # fmt: skip
        yield Case("tensors", name, family, _tensors(change), readable)


def _index(content: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return run


def shard_cases() -> Iterator[Case]:
    shard = "model-00001-of-00002.safetensors"
    for name, content in (
        ("weight_map missing", {}),
        ("weight_map a list", {"weight_map": [shard]}),
        ("weight_map of numbers", {"weight_map": {"a": 5}}),
        ("a shard missing", {"weight_map": {"a": "model-00002-of-00002.safetensors"}}),
        ("a shard outside", {"weight_map": {"a": "../../etc/passwd"}}),
        ("a shard that is a folder", {"weight_map": {"a": "."}}),
        ("a tensor that is not there", {"weight_map": {"ghost": shard}}),
    ):
        yield Case("shards", name, "llama", _index(content), readable=False)


# Changes of the tokenizer.


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content = change(content) or content
        file.write_text(json.dumps(content))

    return run


def _vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = change(content["model"]["vocab"])

    return _tokenizer(run)


def tokenizer_cases() -> Iterator[Case]:
    for name, change in (
        ("empty", _write("tokenizer.json", "")),
        ("cut short", _recode("tokenizer.json", lambda data: data[: len(data) // 2])),
        ("not UTF-8", _write("tokenizer.json", b'{"model": "\xff\xfe"}')),
        ("a list", _write("tokenizer.json", "[]")),
        ("no model", _tokenizer(lambda t: {**t, "model": None})),
        ("model of an unknown type", _tokenizer(lambda t: {**t, "model": {"type": "Magic"}})),
        ("vocabulary a list", _vocabulary(list)),
        ("vocabulary empty", _vocabulary(lambda v: {})),
        ("an id of 10**8", _vocabulary(lambda v: v | {"far": 10**8})),
        ("an id of 10**20", _vocabulary(lambda v: v | {"far": 10**20})),
        ("a negative id", _vocabulary(lambda v: v | {"far": -1})),
        ("ids twice", _vocabulary(lambda v: dict.fromkeys(v, 5))),
        ("no unknown token", _vocabulary(lambda v: {k: i for k, i in v.items() if k != "[UNK]"})),
        ("added token without content", _tokenizer(lambda t: {**t, "added_tokens": [{"id": 3}]})),
        ("nested 100,000 deep", _write("tokenizer.json", "[" * 100_000)),
        ("config a list", _write("tokenizer_config.json", "[]")),
        ("config not JSON", _write("tokenizer_config.json", "{")),
        ("roles of numbers", _write("tokenizer_config.json", '{"pad_token": 5, "eos_token": []}')),
        ("unknown roles", _write("tokenizer_config.json", '{"pad_token": "[NOWHERE]"}')),
        ("special tokens map a list", _write("special_tokens_map.json", "[1]")),
        ("added_tokens.json of words", _write("added_tokens.json", '{"a": "b"}')),
        ("git-lfs pointer", _write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n")),
    ):  # fmt: skip
        yield Case("tokenizer", name, "bert", change)


# Changes of the file system.


def _replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return run


def file_cases() -> Iterator[Case]:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        readable = name == "tokenizer.json"
        for what, make in (
            ("missing", lambda path: None),
            ("a folder", Path.mkdir),
            ("a FIFO", os.mkfifo),
            ("a link to itself", lambda path: path.symlink_to(path)),
            ("a link to nothing", lambda path: path.symlink_to("nowhere")),
            ("an endless device", lambda path: path.symlink_to("/dev/zero")),
        ):
            yield Case("files", f"{name} {what}", "gpt2", _replace(name, make), readable)

        def forbid(folder: Path, name: str = name) -> None:
            (folder / name).chmod(0)

        yield Case("files", f"{name} unreadable", "gpt2", forbid)
    for name in ("adapter_config.json", "generation_config.json"):
        yield Case("files", f"{name} empty", "llama", _write(name, ""))
    pipe = "generation_config.json"
    yield Case("files", f"{pipe} a FIFO", "llama", _replace(pipe, os.mkfifo))
    yield Case("files", "5,000 other files", "llama", _many_files)


def _many_files(folder: Path) -> None:
    for number in range(5_000):
        (folder / f"{number}.txt").touch()


def all_cases() -> list[Case]:
    sources = (config_cases, weight_cases, shard_cases, tokenizer_cases, file_cases)
    return [case for source in sources for case in source()]
