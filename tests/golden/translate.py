"""Writes translate.npz: what Hugging Face's T5 and BART write greedily, with random weights.

Run with torch and transformers installed: ``python -m tests.golden.translate``. Of each case the
file holds the new tokens of every row, and the id that ended them: the third token of the first
row, so that rows end at different places.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import bart, t5
from tests.golden.hub import Case, load_original

OUTPUT = Path(__file__).with_suffix(".npz")
NEW_TOKENS = 8


def cases() -> tuple[Case, ...]:
    """Models whose target is long enough for the new tokens."""
    named = {case.name: case for case in (*t5.CASES, *bart.CASES)}
    chosen = [named[name] for name in ("newer", "every_layer", "bart", "three_tables")]
    return tuple(dataclasses.replace(case, config=dict(case.config)) for case in chosen)


def run(case: Case) -> dict[str, np.ndarray]:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model = load_original(case, Path(folder))
    source = {name: torch.tensor(case.inputs[name]) for name in ("input_ids", "attention_mask")}

    def write(eos: int | None) -> Any:
        settings = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            decoder_start_token_id=case.config.get("decoder_start_token_id", 2),
            pad_token_id=0,
            eos_token_id=eos,
            use_cache=False,  # which is too short where the decoder is the deeper side
        )
        model.generation_config = settings
        return model.generate(**source, generation_config=settings)[:, 1:].numpy()

    eos = int(write(None)[0, 2])
    return {"eos": np.int32(eos), "tokens": write(eos).astype(np.int32)}


if __name__ == "__main__":
    np.savez_compressed(
        OUTPUT,
        **{f"{case.name}/{name}": v for case in cases() for name, v in run(case).items()},
    )
