"""Writes flax_files.tar.xz: folders saved by the Flax classes of transformers 4, with outputs.

Run where these classes still are, from the root of the repository, for example with

    pip install transformers==4.57.1 flax==0.10.6 jax==0.6.2
    JAX_DEFAULT_MATMUL_PRECISION=highest python -m tests.golden.flax_files
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
VOCABULARY = 30
LAYERS: dict[str, Any] = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 10,
}  # fmt: skip
TEXT = LAYERS | {"vocab_size": VOCABULARY, "max_position_embeddings": 12}
IMAGE = LAYERS | {"image_size": 8, "patch_size": 4}
PAIRS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 12, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 10,
    "decoder_ffn_dim": 10, "max_position_embeddings": 12,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 2,
    "num_heads": 3, "decoder_start_token_id": 0,
}  # fmt: skip

IDS = np.array([[3, 5, 6, 7, 8, 9, 2], [4, 5, 10, 11, 12, 13, 14]], np.int32)
WORDS = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, ::-1].copy()}
PIXELS = {"pixel_values": np.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).astype(np.float32)}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, np.ndarray], str]] = {
    "bert": ("FlaxBertForMaskedLM", "BertConfig", TEXT, WORDS, "logits"),
    "bert_bare": ("FlaxBertModel", "BertConfig", TEXT, WORDS, "last_hidden_state"),
    "roberta": ("FlaxRobertaForMaskedLM", "RobertaConfig", TEXT, WORDS, "logits"),
    "gpt2": (
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": VOCABULARY, "n_positions": 12},
        WORDS,
        "logits",
    ),
    "llama": ("FlaxLlamaForCausalLM", "LlamaConfig", TEXT, WORDS, "logits"),
    "mistral": (
        "FlaxMistralForCausalLM",
        "MistralConfig",
        TEXT | {"num_key_value_heads": 3, "sliding_window": 9},
        WORDS,
        "logits",
    ),
    "gemma": (
        "FlaxGemmaForCausalLM",
        "GemmaConfig",
        TEXT | {"num_key_value_heads": 1, "head_dim": 4},
        WORDS,
        "logits",
    ),
    "t5": ("FlaxT5ForConditionalGeneration", "T5Config", T5, BOTH, "logits"),
    "mt5": ("FlaxMT5ForConditionalGeneration", "MT5Config", T5, BOTH, "logits"),
    "bart": ("FlaxBartForConditionalGeneration", "BartConfig", PAIRS, BOTH, "logits"),
    "marian": (
        "FlaxMarianMTModel",
        "MarianConfig",
        PAIRS
        | {"pad_token_id": 29, "decoder_start_token_id": 29, "eos_token_id": 0}
        | {"forced_eos_token_id": 0},
        BOTH,
        "logits",
    ),
    "vit": (
        "FlaxViTForImageClassification",
        "ViTConfig",
        IMAGE | {"num_labels": 3},
        PIXELS,
        "logits",
    ),
    "clip": (
        "FlaxCLIPModel",
        "CLIPConfig",
        {
            "text_config": TEXT | {"eos_token_id": 2},
            "vision_config": IMAGE,
            "projection_dim": 6,
        },
        WORDS | PIXELS,
        "logits_per_image",
    ),
}
"""Class, config class, config, inputs and output of each."""


def _write(folder: Path, name: str) -> None:
    import transformers
    from flax.traverse_util import flatten_dict, unflatten_dict

    kind, config, fields, inputs, output = CASES[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    random = np.random.default_rng(len(name))
    drawn = {
        path: (np.asarray(value) + 0.1 * random.standard_normal(value.shape)).astype(np.float32)
        for path, value in flatten_dict(model.params).items()
    }
    model.params = unflatten_dict(drawn)
    model.save_pretrained(folder / name)
    np.save(folder / name / "output.npy", np.asarray(getattr(model(**inputs), output)))


def main() -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(ARCHIVE, "w:xz") as archive:
        for name in CASES:
            _write(Path(folder), name)
            for file in sorted(Path(folder, name).iterdir()):
                entry = tarfile.TarInfo(f"{name}/{file.name}")
                content = file.read_bytes()
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
