"""Writes qwen2.npz: what Hugging Face's Qwen 2 makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.qwen2``.
"""

from __future__ import annotations

from functools import partial

from tests.golden.hub import write_goldens
from tests.golden.llama import HIDDEN, ROWS, SPANS, TOKENS, case

qwen2 = partial(case, model_type="qwen2")

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "rope_theta": 100.0,
}

CASES = (
    qwen2("qwen2_usual", "Qwen2ForCausalLM", TOKENS),
    qwen2("qwen2_yarn", "Qwen2ForCausalLM", TOKENS, rope_parameters=YARN, tie_word_embeddings=True),
    qwen2(
        "qwen2_yarn_options",
        "Qwen2ForCausalLM",
        TOKENS,
        rope_parameters=YARN
        | {"beta_fast": 5.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
    ),
    qwen2(
        "qwen2_window",
        "Qwen2Model",
        HIDDEN,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        positions=True,
    ),
    qwen2("qwen2_rows", "Qwen2ForSequenceClassification", ROWS, num_labels=3),
    qwen2("qwen2_tokens", "Qwen2ForTokenClassification", TOKENS, num_labels=4),
    qwen2("qwen2_spans", "Qwen2ForQuestionAnswering", SPANS),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
