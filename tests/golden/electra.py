"""Writes electra.npz: what Hugging Face's ELECTRA makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.electra``.
"""

from __future__ import annotations

from typing import Any

from tests.golden.bert import HIDDEN, ROWS, SPANS, TOKENS, draw_rows, draw_sizes
from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens


def case(name: str, head: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    random = generator(f"{name}/options")
    config = {
        "architectures": [f"Electra{head}"],
        "model_type": "electra",
        "embedding_size": int(random.randint(9, 17)),
        "type_vocab_size": int(random.randint(2, 5)),
        "layer_norm_eps": float(random.choice([1e-12, 1e-7, 1e-3])),
        **draw_sizes(name),
        **fields,
    }
    inputs = draw_rows(name, config["vocab_size"], types=config["type_vocab_size"])
    return Case(name, config, inputs, outputs)


EQUAL_WIDTHS = {"hidden_size": 20, "num_attention_heads": 5, "embedding_size": 20}
"""Where no linear layer follows the embeddings."""

CASES = (
    case("electra_discriminator", "ForPreTraining", TOKENS, hidden_act="gelu_new"),
    case("electra_equal", "ForPreTraining", TOKENS, hidden_act="relu", **EQUAL_WIDTHS),
    case("electra_generator", "ForMaskedLM", TOKENS, hidden_act="silu"),
    case("electra_untied", "ForMaskedLM", TOKENS, tie_word_embeddings=False),
    case("electra_rows", "ForSequenceClassification", ROWS, num_labels=3, hidden_act="relu"),
    case("electra_tokens", "ForTokenClassification", TOKENS, num_labels=4),
    case("electra_spans", "ForQuestionAnswering", SPANS),
    case("electra_bare", "Model", HIDDEN),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
