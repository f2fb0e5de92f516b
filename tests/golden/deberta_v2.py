"""Writes deberta_v2.npz: what Hugging Face's DeBERTa-v2 makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.deberta_v2``.
"""

from __future__ import annotations

from typing import Any

from tests.golden.bert import HIDDEN, ROWS, SPANS, TOKENS, draw_rows, draw_sizes
from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens


def case(name: str, head: str, outputs: dict[str, str | None], **fields: Any) -> Case:
    random = generator(f"{name}/options")
    config = {
        "architectures": [f"DebertaV2{head}"],
        "model_type": "deberta-v2",
        "relative_attention": True,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": int(random.choice([6, 8, 10])),
        "layer_norm_eps": float(random.choice([1e-12, 1e-7, 1e-3])),
        **draw_sizes(name),
        **fields,
    }
    return Case(name, config, draw_rows(name, config["vocab_size"]), outputs)


CASES = (
    case("deberta_masked", "ForMaskedLM", TOKENS, hidden_act="gelu_new"),
    case("deberta_untied", "ForMaskedLM", TOKENS, tie_word_embeddings=False),
    case("deberta_new_head", "ForMaskedLM", TOKENS, legacy=False, hidden_act="silu"),
    case("deberta_rows", "ForSequenceClassification", ROWS, num_labels=3, pos_att_type="c2p"),
    case(
        "deberta_tokens", "ForTokenClassification", TOKENS, num_labels=4, hidden_act="relu",
        position_buckets=-1, max_relative_positions=9,
    ),
    case("deberta_spans", "ForQuestionAnswering", SPANS, pos_att_type=["p2c"]),
    case("deberta_bare", "Model", HIDDEN, position_buckets=12, max_relative_positions=14),
    case("deberta_convolution", "Model", HIDDEN, conv_kernel_size=3, conv_act="gelu"),
    case(
        "deberta_wide_convolution", "ForTokenClassification", TOKENS, num_labels=3,
        conv_kernel_size=5, position_buckets=-1, pos_att_type=[],
    ),
)  # fmt: skip

if __name__ == "__main__":
    write_goldens(CASES, __file__)
