"""Writes distilbert.npz: what Hugging Face's DistilBERT makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.distilbert``.
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
from tests.golden.hub import Case, write_goldens

_NAMES = {
    "num_attention_heads": "n_heads",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
}


def case(name: str, head: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    sizes = {_NAMES.get(field, field): value for field, value in draw_sizes(name).items()}
    config = {"architectures": [f"DistilBert{head}"], "model_type": "distilbert", **sizes, **fields}
    draw = draw_choices if head.endswith("MultipleChoice") else draw_rows
    return Case(name, config, draw(name, config["vocab_size"]), outputs)


CASES = (
    case("distilbert_masked", "ForMaskedLM", TOKENS, tie_word_embeddings=True),
    case("distilbert_untied", "ForMaskedLM", TOKENS, tie_word_embeddings=False, activation="relu"),
    case("distilbert_rows", "ForSequenceClassification", ROWS, num_labels=3),
    case("distilbert_tokens", "ForTokenClassification", TOKENS, num_labels=4),
    case("distilbert_spans", "ForQuestionAnswering", SPANS),
    case("distilbert_choices", "ForMultipleChoice", ROWS),
    case("distilbert_bare", "Model", HIDDEN),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
