"""Writes bert.npz: what Hugging Face's BERT makes of random weights and padded rows, by head.

Run with torch and transformers installed: ``python -m tests.golden.bert``. Two cases also hold the
masked-LM loss and its gradient by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.golden.draw import generator
from tests.golden.hub import Case, write_goldens

TOKENS: dict[str, str | None] = {"logits": "attention_mask"}
ROWS: dict[str, str | None] = {"logits": None}
SPANS: dict[str, str | None] = {"start_logits": "attention_mask", "end_logits": "attention_mask"}
HIDDEN: dict[str, str | None] = {"last_hidden_state": "attention_mask"}


def draw_sizes(name: str) -> dict[str, Any]:
    """Fields of a config.json: an odd number of heads and sizes that divide by nothing."""
    random = generator(f"{name}/config")
    heads = int(random.choice([3, 5, 7]))
    return {
        "vocab_size": int(random.randint(50, 80)),
        "num_attention_heads": heads,
        "hidden_size": heads * 2 * int(random.choice([2, 3])),
        "num_hidden_layers": int(random.randint(2, 4)),
        "intermediate_size": int(random.randint(30, 50)),
        "max_position_embeddings": int(random.randint(21, 40)),
        "initializer_range": 0.03,
    }


def draw_rows(name: str, vocab_size: int, *, types: int = 0, pad: int = 0) -> dict[str, np.ndarray]:
    """Five rows of 17: full, padded on the right, on the left, on both sides, and one token long.

    Id ``pad`` stands at padding alone, for torch computes no gradient for looking up its row. Rows
    have token types, in ascending order, if there are any ``types``.
    """
    random = generator(f"{name}/batch")
    shape = (5, 17)
    mask = np.ones(shape, np.int32)
    mask[1, 11:] = mask[2, :4] = mask[3, :2] = mask[3, 14:] = mask[4, 1:] = 0
    ids = random.randint(0, vocab_size - 1, shape)
    ids = np.where(mask == 1, ids + (ids >= pad), pad)
    inputs = {"input_ids": ids.astype(np.int32), "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = np.sort(random.randint(0, types, shape), axis=1).astype(np.int32)
    return inputs


def draw_choices(name: str, vocab_size: int, **how: int) -> dict[str, np.ndarray]:
    """Two questions with five choices each: arrays [2, 5, 17]."""
    questions = [draw_rows(f"{name}/{number}", vocab_size, **how) for number in range(2)]
    return {key: np.stack([rows[key] for rows in questions]) for key in questions[0]}


def draw_labels(name: str, inputs: Mapping[str, np.ndarray], vocab_size: int) -> np.ndarray:
    """What is to be predicted, at some of the tokens; -100 elsewhere."""
    random = generator(f"{name}/labels")
    labels = random.randint(0, vocab_size, inputs["input_ids"].shape)
    predicted = (random.random_sample(labels.shape) < 0.3) & (inputs["attention_mask"] == 1)
    return np.where(predicted, labels, -100).astype(np.int32)


def make(
    name: str,
    architecture: str,
    outputs: dict[str, str | None],
    *,
    labels: bool = False,
    stored: Mapping[str, str] | None = None,
    **fields: Any,
) -> Case:
    """A case of one architecture; ``fields`` are those of its config.json."""
    random = generator(f"{name}/options")
    config = {
        "architectures": [architecture],
        "model_type": "bert",
        "type_vocab_size": int(random.randint(2, 5)),
        "layer_norm_eps": float(random.choice([1e-12, 1e-7, 1e-3])),
        **draw_sizes(name),
        **fields,
    }
    draw = draw_choices if architecture.endswith("MultipleChoice") else draw_rows
    inputs = draw(name, config["vocab_size"], types=config["type_vocab_size"])
    expected = draw_labels(name, inputs, config["vocab_size"]) if labels else None
    return Case(name, config, inputs, outputs, labels=expected, stored=stored or {})


SMALL = {"hidden_size": 18, "num_attention_heads": 3, "num_hidden_layers": 2}
"""Where gradients are kept too."""

PRETRAINING = {"prediction_logits": "logits", "seq_relationship_logits": "next_sentence_logits"}

CASES = (
    make("exact", "BertForMaskedLM", TOKENS, labels=True, hidden_act="gelu", **SMALL),
    make(
        "untied",
        "BertForMaskedLM",
        TOKENS,
        labels=True,
        hidden_act="relu",
        tie_word_embeddings=False,
        **SMALL,
    ),
    make(
        "pretraining",
        "BertForPreTraining",
        {"prediction_logits": "attention_mask", "seq_relationship_logits": None},
        stored=PRETRAINING,
        hidden_act="gelu_new",
    ),
    make(
        "untied_pretraining",
        "BertForPreTraining",
        {"prediction_logits": "attention_mask", "seq_relationship_logits": None},
        stored=PRETRAINING,
        hidden_act="silu",
        tie_word_embeddings=False,
    ),
    make("next_sentence", "BertForNextSentencePrediction", ROWS, hidden_act="gelu_pytorch_tanh"),
    make("rows", "BertForSequenceClassification", ROWS, hidden_act="silu", num_labels=3),
    make("tokens", "BertForTokenClassification", TOKENS, hidden_act="relu", num_labels=5),
    make("spans", "BertForQuestionAnswering", SPANS, hidden_act="gelu_new"),
    make("choices", "BertForMultipleChoice", ROWS, hidden_act="relu"),
    make("bare", "BertModel", {**HIDDEN, "pooler_output": None}, hidden_act="gelu"),
)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
