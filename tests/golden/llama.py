"""Writes llama.npz: what Hugging Face's Llama makes of random weights, with each head.

Run with torch and transformers installed: ``python -m tests.golden.llama``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens

SHAPE = (5, 13)
PAD = 0
"""Id of padding in every case; no token has it."""


def rows(name: str, vocab_size: int, *, positions: bool = False) -> dict[str, np.ndarray]:
    """Five rows of 13: full, padded on the right, on the left, on both sides, one token long.

    With ``positions`` these are given, counted over tokens alone and starting anywhere.
    """
    random = generator(f"{name}/rows")
    mask = np.ones(SHAPE, np.int32)
    mask[1, 9:] = mask[2, :4] = mask[3, :2] = mask[3, 11:] = mask[4, 1:] = 0
    ids = np.where(mask == 1, random.randint(PAD + 1, vocab_size, SHAPE), PAD)
    inputs = {"input_ids": ids.astype(np.int32), "attention_mask": mask}
    if positions:
        start = random.randint(0, 5, (SHAPE[0], 1))
        ids = np.where(mask == 1, start + np.cumsum(mask, axis=1), 0)
        inputs["position_ids"] = ids.astype(np.int32)
    return inputs


def next_tokens(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Labels for the loss of a causal model: each token but the first of its row, else -100."""
    mask = inputs["attention_mask"]
    before = np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return np.where((mask == 1) & (before == 1), inputs["input_ids"], -100).astype(np.int32)


def draw_config(name: str, architecture: str, **fields: Any) -> dict[str, Any]:
    """A config.json of Llama's kind with sizes that divide by nothing; ``fields`` win."""
    random = generator(f"{name}/config")
    heads, groups = int(random.choice([1, 3])), int(random.choice([2, 3]))
    width = 2 * int(random.choice([3, 4]))
    return {
        "architectures": [architecture],
        "vocab_size": int(random.randint(60, 90)),
        "hidden_size": heads * groups * width,
        "num_hidden_layers": int(random.randint(2, 4)),
        "num_attention_heads": heads * groups,
        "num_key_value_heads": heads,
        "intermediate_size": int(random.randint(20, 50)),
        "max_position_embeddings": int(random.randint(20, 40)),
        "rms_norm_eps": float(random.choice([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": bool(random.randint(0, 2)),
        "pad_token_id": PAD,
        **fields,
    }


def case(
    name: str, architecture: str, outputs: dict[str, str | None], *, positions: bool = False, **more
) -> Case:
    """A case of one architecture; ``more`` are fields of its config.json."""
    config = draw_config(name, architecture, **more)
    return Case(name, config, rows(name, config["vocab_size"], positions=positions), outputs)


TOKENS: dict[str, str | None] = {"logits": "attention_mask"}
ROWS: dict[str, str | None] = {"logits": None}
SPANS: dict[str, str | None] = {
    "start_logits": "attention_mask",
    "end_logits": "attention_mask",
}
HIDDEN: dict[str, str | None] = {"last_hidden_state": "attention_mask"}

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


def llama(name: str, architecture: str, outputs: dict[str, str | None], **more: Any) -> Case:
    return case(name, architecture, outputs, model_type="llama", **more)


def _gradients() -> Case:
    config = draw_config(
        "llama_gradients",
        "LlamaForCausalLM",
        model_type="llama",
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    inputs = rows("llama_gradients", config["vocab_size"])
    return Case("llama_gradients", config, inputs, TOKENS, labels=next_tokens(inputs))


GRADIENTS = _gradients()
CASES = (
    llama("llama_untied", "LlamaForCausalLM", TOKENS, tie_word_embeddings=False, positions=True),
    llama(
        "llama_tied",
        "LlamaForCausalLM",
        TOKENS,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
        rope_theta=500.0,
        rope_scaling={"type": "linear", "factor": 2.5},
    ),
    llama(
        "llama_scaled",
        "LlamaForCausalLM",
        TOKENS,
        rope_parameters={**LLAMA_3, "rope_theta": 300.0},
        hidden_size=30,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
    ),
    llama("llama_old_scaled", "LlamaModel", HIDDEN, rope_theta=300.0, rope_scaling=LLAMA_3),
    llama(
        "llama_dynamic",
        "LlamaForCausalLM",
        TOKENS,
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 300.0},
        max_position_embeddings=9,
    ),
    llama("llama_rows", "LlamaForSequenceClassification", ROWS, num_labels=3),
    llama("llama_tokens", "LlamaForTokenClassification", TOKENS, num_labels=4),
    llama("llama_spans", "LlamaForQuestionAnswering", SPANS),
    GRADIENTS,
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
