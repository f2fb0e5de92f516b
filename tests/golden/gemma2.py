"""Writes gemma2.npz: what Hugging Face's Gemma 2 makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.gemma2``.
"""

from __future__ import annotations

from functools import partial

from tests.golden.hub import write_goldens
from tests.golden.llama import HIDDEN, ROWS, TOKENS, case

gemma2 = partial(
    case,
    model_type="gemma2",
    head_dim=14,
    sliding_window=4,
    query_pre_attn_scalar=9,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=0.7,
)

CASES = (
    gemma2("gemma2_usual", "Gemma2ForCausalLM", TOKENS, tie_word_embeddings=True),
    gemma2(
        "gemma2_unbounded",
        "Gemma2ForCausalLM",
        TOKENS,
        attention_bias=True,
        num_key_value_heads=1,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        hidden_activation="silu",
    ),
    gemma2("gemma2_positions", "Gemma2Model", HIDDEN, positions=True, num_hidden_layers=3),
    gemma2("gemma2_rows", "Gemma2ForSequenceClassification", ROWS, num_labels=3),
    gemma2("gemma2_tokens", "Gemma2ForTokenClassification", TOKENS, num_labels=4),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
