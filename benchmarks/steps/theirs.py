"""A training step of a model of Hugging Face in torch; started by ``benchmarks/step_time.py``.

    python benchmarks/steps/theirs.py '{"config": "config.json", "batch": "batch.npz", ...}'

It imports nothing of this package, so that the interpreter of another environment can run it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from turns import serve


def main(options: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as JAX does by default
    described = json.loads(Path(options["config"]).read_text())
    config = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    architecture = getattr(transformers, config.architectures[0])
    module = architecture(config).to(device).train()
    optimizer = _adamw(module)
    model = torch.compile(module) if options["compile"] else module
    batch = {name: torch.from_numpy(array).to(device) for name, array in _arrays(options["batch"])}
    narrow = options["dtype"] == "bfloat16"

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    parameters = sum(p.numel() for p in module.parameters())
    serve(step, {"versions": versions, "parameters": parameters, "device": device})


def _adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW by its fused kernel, the default of Hugging Face's Trainer; no decay of vectors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, eps=1e-6, fused=True)


def _arrays(path: str) -> list[tuple[str, np.ndarray]]:
    def known(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int64) if array.dtype == np.int32 else array

    with np.load(path) as file:
        return [(name, known(file[name])) for name in file]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
