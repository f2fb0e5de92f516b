"""Writes cohere.npz: what Hugging Face's Command R makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.cohere``.
"""

from __future__ import annotations

from functools import partial

from tests.golden.hub import write_goldens
from tests.golden.llama import HIDDEN, TOKENS, case

cohere = partial(case, model_type="cohere", layer_norm_eps=1e-3, logit_scale=0.3)

CASES = (
    cohere("cohere_usual", "CohereForCausalLM", TOKENS, tie_word_embeddings=True),
    cohere("cohere_plus", "CohereForCausalLM", TOKENS, use_qk_norm=True, logit_scale=1.7),
    cohere("cohere_biased", "CohereForCausalLM", TOKENS, attention_bias=True),
    cohere("cohere_positions", "CohereModel", HIDDEN, positions=True, use_qk_norm=True),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
