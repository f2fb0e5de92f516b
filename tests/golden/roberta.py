"""Writes roberta.npz: what Hugging Face's RoBERTa and XLM-RoBERTa make of random weights, by head.

Run with torch and transformers installed: ``python -m tests.golden.roberta``.
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


def make(name: str, architecture: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    """A case of one architecture; ``fields`` are those of its config.json."""
    random = generator(f"{name}/options")
    config = {
        "architectures": [architecture],
        "model_type": "xlm-roberta" if architecture.startswith("XLM") else "roberta",
        "type_vocab_size": 1,
        "layer_norm_eps": float(random.choice([1e-12, 1e-5, 1e-3])),
        "pad_token_id": 1,
        **draw_sizes(name),
        **fields,
    }
    types = config["type_vocab_size"]
    draw = draw_choices if architecture.endswith("MultipleChoice") else draw_rows
    inputs = draw(
        name, config["vocab_size"], types=types if types > 1 else 0, pad=config["pad_token_id"]
    )
    return Case(name, config, inputs, outputs)


CASES = (
    make("roberta", "RobertaForMaskedLM", TOKENS),
    # The head keeps its gelu.
    make("untied", "XLMRobertaForMaskedLM", TOKENS, hidden_act="relu", tie_word_embeddings=False),
    make(
        "other_padding",
        "RobertaForSequenceClassification",
        ROWS,
        hidden_act="gelu_new",
        pad_token_id=3,
        type_vocab_size=2,
        num_labels=3,
    ),
    make("xlm_rows", "XLMRobertaForSequenceClassification", ROWS, hidden_act="silu"),
    make("tokens", "RobertaForTokenClassification", TOKENS, num_labels=5),
    make("xlm_tokens", "XLMRobertaForTokenClassification", TOKENS, hidden_act="gelu_pytorch_tanh"),
    make("spans", "XLMRobertaForQuestionAnswering", SPANS),
    make("choices", "RobertaForMultipleChoice", ROWS, type_vocab_size=2),
    make("bare", "RobertaModel", {**HIDDEN, "pooler_output": None}, type_vocab_size=3),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
