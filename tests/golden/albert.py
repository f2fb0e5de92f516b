"""Writes albert.npz: what Hugging Face's ALBERT makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.albert``.
"""

from __future__ import annotations

from typing import Any

from tests.golden.bert import HIDDEN, ROWS, SPANS, TOKENS, draw_rows, draw_sizes
from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens


def case(name: str, head: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    random = generator(f"{name}/options")
    config = {
        "architectures": [f"Albert{head}"],
        "model_type": "albert",
        "embedding_size": int(random.randint(9, 17)),
        "type_vocab_size": int(random.randint(2, 5)),
        "layer_norm_eps": float(random.choice([1e-12, 1e-7, 1e-3])),
        **draw_sizes(name),
        **fields,
    }
    inputs = draw_rows(name, config["vocab_size"], types=config["type_vocab_size"])
    return Case(name, config, inputs, outputs)


PRETRAINING = {"prediction_logits": "attention_mask", "sop_logits": None}
TWO_OF_TWO = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}

CASES = (
    case("albert_masked", "ForMaskedLM", TOKENS, hidden_act="gelu"),
    case("albert_untied", "ForMaskedLM", TOKENS, tie_word_embeddings=False),
    case("albert_groups", "ForPreTraining", PRETRAINING, hidden_act="relu", **TWO_OF_TWO),
    case("albert_rows", "ForSequenceClassification", ROWS, num_labels=3, inner_group_num=3),
    case("albert_tokens", "ForTokenClassification", TOKENS, num_labels=4, hidden_act="silu"),
    case("albert_spans", "ForQuestionAnswering", SPANS, num_hidden_layers=3, num_hidden_groups=3),
    case("albert_bare", "Model", {**HIDDEN, "pooler_output": None}),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
