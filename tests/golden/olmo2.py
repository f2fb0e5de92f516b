"""Writes olmo2.npz: what Hugging Face's OLMo 2 makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.olmo2``.
"""

from __future__ import annotations

from functools import partial

from tests.golden.hub import write_goldens
from tests.golden.llama import HIDDEN, ROWS, TOKENS, case

olmo2 = partial(case, model_type="olmo2")

CASES = (
    olmo2("olmo2_usual", "Olmo2ForCausalLM", TOKENS),
    olmo2("olmo2_biased", "Olmo2ForCausalLM", TOKENS, attention_bias=True, num_key_value_heads=1),
    olmo2("olmo2_positions", "Olmo2Model", HIDDEN, positions=True, tie_word_embeddings=True),
    olmo2("olmo2_rows", "Olmo2ForSequenceClassification", ROWS, num_labels=3),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
