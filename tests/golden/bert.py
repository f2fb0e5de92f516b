"""Writes bert.npz: what Hugging Face's BertForMaskedLM makes of random weights and padded rows.

Run with torch and transformers installed: ``python -m tests.golden.bert``. Of each
case the file holds the logits and last hidden states at attended positions and the masked-LM loss,
of the small cases also the loss's gradient by tensor, computed in float64 so that only one side of
a comparison has rounding errors, and stored in float32. Options, weights and rows are drawn by
name, here and in the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.draw import draw_weights, generator

OUTPUT = Path(__file__).with_suffix(".npz")
CASES = {"exact": "gelu", "tanh": "gelu_new", "rectified": "relu", "sigmoid": "silu"}
"""Name of a case, from which all its numbers are drawn, and its activation."""
GRADIENT_CASES = ("exact", "rectified")


def draw_config(case: str) -> dict[str, Any]:
    """A config.json with an odd number of heads and sizes that divide by nothing."""
    random = generator(f"{case}/config")
    heads = int(random.choice([3, 5, 7]))
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": CASES[case],
        "vocab_size": int(random.randint(100, 140)),
        "num_attention_heads": heads,
        "hidden_size": heads * int(random.choice([4, 6] if case in GRADIENT_CASES else [8, 16])),
        "num_hidden_layers": int(random.randint(2, 4)),
        "intermediate_size": int(random.randint(30, 70)),
        "max_position_embeddings": int(random.randint(17, 40)),
        "type_vocab_size": int(random.randint(2, 5)),
        "layer_norm_eps": float(random.choice([1e-12, 1e-7, 1e-3])),
        "initializer_range": 0.03,
    }


def draw_batch(case: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Five rows of 17: full, padded on the right, on the left, on both sides, and one token long.

    ``labels`` is -100 where nothing is predicted; the other labels stand at attended positions.
    Id 0 stands at padding alone, for torch computes no gradient for looking up its row.
    """
    random = generator(f"{case}/batch")
    shape = (5, 17)
    mask = np.ones(shape, np.int32)
    mask[1, 11:] = mask[2, :4] = mask[3, :2] = mask[3, 14:] = mask[4, 1:] = 0
    ids = np.where(mask == 1, random.randint(1, config["vocab_size"], shape), 0)
    types = np.sort(random.randint(0, config["type_vocab_size"], shape), axis=1)
    labels = random.randint(0, config["vocab_size"], shape)
    predicted = (random.random_sample(shape) < 0.3) & (mask == 1)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": types.astype(np.int32),
        "labels": np.where(predicted, labels, -100).astype(np.int32),
    }


def run_torch(case: str, dtype: str = "float64") -> dict[str, np.ndarray]:
    """The reference's results for one case by name, computed in ``dtype``."""
    import torch
    import transformers

    torch.use_deterministic_algorithms(True)
    config = draw_config(case)
    options = {name: value for name, value in config.items() if name != "architectures"}
    bert_config = transformers.BertConfig(**options, attn_implementation="eager")
    model = transformers.BertForMaskedLM(bert_config).eval().to(getattr(torch, dtype))
    tensors = dict(model.named_parameters())
    weights = draw_weights({name: tuple(t.shape) for name, t in tensors.items()}, case)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(weights[name]))
    batch = {name: torch.tensor(value).long() for name, value in draw_batch(case, config).items()}
    output = model(**batch, output_hidden_states=True)
    output.loss.backward()
    attended = batch["attention_mask"] == 1
    results = {
        "logits": output.logits[attended],
        "last_hidden_state": output.hidden_states[-1][attended],
        "loss": output.loss,
    }
    results |= {f"gradients/{name}": tensor.grad for name, tensor in tensors.items()}
    return {name: value.detach().numpy() for name, value in results.items()}


if __name__ == "__main__":
    results = {
        f"{case}/{name}": value.astype(np.float32)
        for case in CASES
        for name, value in run_torch(case).items()
        if case in GRADIENT_CASES or not name.startswith("gradients/")
    }
    np.savez_compressed(OUTPUT, **results)
