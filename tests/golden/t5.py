"""Writes t5.npz: what Hugging Face's T5, mT5 and umT5 make of random weights and padded rows.

Run with torch and transformers installed: ``python -m tests.golden.t5``.
"""

from __future__ import annotations

from typing import Any

from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens
from tests.golden.pairs import draw_ended, draw_labels, draw_pair

LOGITS = {"logits": "decoder_attention_mask", "encoder_last_hidden_state": "attention_mask"}


def draw_config(name: str, architecture: str, proj: str, **options: Any) -> dict[str, Any]:
    """A config.json whose heads do not fill the width, and whose buckets run out in eleven places.

    The two sides differ in depth.
    """
    random = generator(f"{name}/config")
    heads = int(random.choice([3, 5]))
    layers = int(random.randint(1, 4))
    return {
        "architectures": [architecture],
        "model_type": architecture.partition("5")[0].lower() + "5",
        "vocab_size": int(random.randint(40, 60)),
        "d_model": int(random.choice([12, 18])),
        "d_kv": int(random.choice([4, 6])),
        "d_ff": int(random.randint(15, 30)),
        "num_layers": layers,
        "num_decoder_layers": 4 - layers,
        "num_heads": heads,
        "relative_attention_num_buckets": int(random.choice([8, 10, 12])),
        "relative_attention_max_distance": int(random.randint(7, 10)),
        "layer_norm_epsilon": float(random.choice([1e-6, 1e-3])),
        "feed_forward_proj": proj,
        "decoder_start_token_id": 0,
        "num_labels": 3,
        **options,
    }


def generation(
    name: str,
    architecture: str,
    proj: str,
    *,
    gradients: bool = False,
    head: bool = False,
    **options: Any,
) -> Case:
    """A language model; with ``head`` its file has a table for the logits, as published."""
    small = {"d_model": 10, "d_kv": 4, "d_ff": 13} if gradients else {}
    config = draw_config(name, architecture, proj, **small, **options)
    inputs = draw_pair(name, config["vocab_size"])
    return Case(
        name,
        config,
        inputs,
        LOGITS,
        labels=draw_labels(name, config["vocab_size"], inputs) if gradients else None,
        added={"lm_head.weight": (config["vocab_size"], config["d_model"])} if head else {},
    )


def classification(name: str, architecture: str) -> Case:
    config = draw_config(name, architecture, "relu")
    return Case(name, config, draw_ended(name, config["vocab_size"], 1), {"logits": None})


def others() -> tuple[Case, ...]:
    """The architectures that no language model covers."""
    bare = draw_config("bare", "T5Model", "gated-silu")
    encoder = draw_config("encoder", "T5EncoderModel", "gelu")
    tagger = draw_config("tagger", "MT5ForTokenClassification", "gated-gelu")
    spans = draw_config("spans", "UMT5ForQuestionAnswering", "gated-gelu", num_labels=2)
    pair = draw_pair("encoder", 40)  # which every vocabulary here has
    alone = {name: pair[name] for name in ("input_ids", "attention_mask")}
    both = {"start_logits": "decoder_attention_mask", "end_logits": "decoder_attention_mask"}
    return (
        Case(
            "bare",
            bare,
            draw_pair("bare", bare["vocab_size"]),
            {"last_hidden_state": "decoder_attention_mask"},
        ),
        Case("encoder", encoder, alone, {"last_hidden_state": "attention_mask"}),
        Case("tagger", tagger, alone, {"logits": "attention_mask"}),
        Case("spans", spans, draw_pair("spans", spans["vocab_size"]), both),
    )


CASES = (
    generation("original", "T5ForConditionalGeneration", "relu", gradients=True),
    generation(
        "newer",
        "T5ForConditionalGeneration",
        "gated-gelu",
        head=True,
        tie_word_embeddings=False,
    ),
    generation(
        "many_languages",
        "MT5ForConditionalGeneration",
        "gated-gelu",
        head=True,
        tie_word_embeddings=False,
    ),
    generation("tied", "MT5ForConditionalGeneration", "gated-silu"),
    generation("every_layer", "UMT5ForConditionalGeneration", "gated-gelu", gradients=True),
    classification("classifier", "T5ForSequenceClassification"),
    *others(),
)

PUBLISHED_UMT5 = generation(
    "published_umt5",
    "UMT5ForConditionalGeneration",
    "gated-gelu",
    head=True,
    tie_word_embeddings=False,
)
"""The original scales these logits, against what the model was trained to."""

if __name__ == "__main__":
    write_goldens((*CASES, PUBLISHED_UMT5), __file__)
