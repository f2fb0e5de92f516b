"""Writes qwen3.npz: what Hugging Face's Qwen 3 makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.qwen3``.
"""

from __future__ import annotations

from functools import partial

from tests.golden.hub import write_goldens
from tests.golden.llama import HIDDEN, ROWS, SPANS, TOKENS, case

qwen3 = partial(case, model_type="qwen3", head_dim=10)

CASES = (
    qwen3("qwen3_usual", "Qwen3ForCausalLM", TOKENS),
    qwen3("qwen3_biased", "Qwen3ForCausalLM", TOKENS, attention_bias=True, num_key_value_heads=1),
    qwen3(
        "qwen3_window",
        "Qwen3Model",
        HIDDEN,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
        positions=True,
    ),
    qwen3("qwen3_rows", "Qwen3ForSequenceClassification", ROWS, num_labels=3),
    qwen3("qwen3_tokens", "Qwen3ForTokenClassification", TOKENS, num_labels=4),
    qwen3("qwen3_spans", "Qwen3ForQuestionAnswering", SPANS),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
