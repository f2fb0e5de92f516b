"""Writes modernbert.npz: what Hugging Face's ModernBERT makes of random weights, by head.

Run with torch and transformers installed: ``python -m tests.golden.modernbert``.
"""

from __future__ import annotations

from typing import Any

from tests.golden.bert import (
    HIDDEN,
    ROWS,
    SPANS,
    TOKENS,
    draw_choices,
    draw_rows,
    draw_sizes,
)
from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens

FULL, SLIDING = "full_attention", "sliding_attention"


def make(name: str, architecture: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    """A case of one architecture with some biases; ``fields`` are those of its config.json.

    Windows are smaller than the rows.
    """
    random = generator(f"{name}/options")
    biases = ("attention_bias", "mlp_bias", "norm_bias", "decoder_bias", "classifier_bias")
    config = {
        "architectures": [architecture],
        "model_type": "modernbert",
        **{bias: bool(random.randint(0, 2)) for bias in biases},
        "norm_eps": float(random.choice([1e-12, 1e-5, 1e-3])),
        "local_attention": int(random.randint(3, 8)),
        "pad_token_id": 0,
        **draw_sizes(name),
        **fields,
    }
    draw = draw_choices if architecture.endswith("MultipleChoice") else draw_rows
    return Case(name, config, draw(name, config["vocab_size"]), outputs)


CASES = (
    make(
        "published",
        "ModernBertForMaskedLM",
        TOKENS,
        attention_bias=False,
        mlp_bias=False,
        norm_bias=False,
        decoder_bias=True,
        classifier_bias=False,
        num_hidden_layers=7,
        global_attn_every_n_layers=3,
        global_rope_theta=160.0,
        local_rope_theta=10.0,
        hidden_activation="gelu",
        classifier_activation="gelu",
    ),
    make(
        "untied",
        "ModernBertForMaskedLM",
        TOKENS,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        decoder_bias=False,
        classifier_bias=True,
        tie_word_embeddings=False,
        num_hidden_layers=4,
        layer_types=[SLIDING, FULL, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "default", "rope_theta": 300.0},
            SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        },
        hidden_activation="silu",
        classifier_activation="gelu_pytorch_tanh",
    ),
    make(
        "first_token",
        "ModernBertForSequenceClassification",
        ROWS,
        global_attn_every_n_layers=2,
        num_hidden_layers=4,
        hidden_activation="relu",
        classifier_activation="silu",
        classifier_pooling="cls",
        num_labels=3,
    ),
    make(
        "mean",
        "ModernBertForSequenceClassification",
        ROWS,
        num_hidden_layers=2,
        hidden_activation="gelu_new",
        classifier_pooling="mean",
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0},
            SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        },
    ),
    make("tokens", "ModernBertForTokenClassification", TOKENS, num_labels=5, num_hidden_layers=1),
    make("spans", "ModernBertForQuestionAnswering", SPANS, global_attn_every_n_layers=1),
    make(
        "choices",
        "ModernBertForMultipleChoice",
        ROWS,
        classifier_pooling="cls",
        num_hidden_layers=2,
    ),
    make(
        "mean_choices",
        "ModernBertForMultipleChoice",
        ROWS,
        classifier_pooling="mean",
        num_hidden_layers=1,
    ),
    make("bare", "ModernBertModel", HIDDEN, num_hidden_layers=6),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
