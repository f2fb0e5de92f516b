"""Comparison of a converted model with transformers, if torch and transformers are installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig

_ROWS, _LENGTH = 2, 8
_COMPARED = (
    "logits",
    "prediction_logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "pooler_output",
)
"""Names of output fields; the first that both implementations have is compared."""


def describe(model: Any, params: Any, directory: Path) -> str:
    """The largest relative difference as text, or why there is none."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return "not compared: torch and transformers are not installed (extra 'convert')"
    try:
        value, field = largest_difference(model, params, directory)
    except Exception as error:  # the conversion itself is complete
        return f"not compared: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return f"{value:.1e} of the largest value, in {field} of random inputs (float32)"


def largest_difference(model: Any, params: Any, directory: Path) -> tuple[float, str]:
    """max |ours - theirs| / max |theirs| over random inputs, in float32, and the field compared."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    inputs = random_inputs(model)
    original = getattr(transformers, model.config.architecture).from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        theirs = original.eval()(**{name: torch.from_numpy(v) for name, v in inputs.items()})
    exact = build_model(model.config, ComputeConfig(dtype="float32"))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(exact.apply)({"params": params}, **inputs)
    for field in _COMPARED:
        mine = getattr(ours, field, None)
        other = theirs.get(field)
        if mine is not None and other is not None and mine.shape == tuple(other.shape):
            expected = other.numpy()
            return float(np.abs(mine - expected).max() / np.abs(expected).max()), field
    raise LookupError("the outputs have no field in common")


def random_inputs(model: Any) -> dict[str, np.ndarray]:
    """A batch of random inputs with the names and dtypes of the model's example inputs.

    Rows end with the end token, if the model has one, and have none inside, because classifiers
    pool there. A decoder has ids of its own unless the original derives them from the source.
    """
    random = np.random.default_rng(0)
    c, inputs = model.config, {}
    for name, example in model.example_inputs().items():
        if jnp.issubdtype(example.dtype, jnp.integer):
            inputs[name] = random.choice(_ordinary_ids(c), (_ROWS, _LENGTH))
        elif example.dtype == bool:  # a mask with as many ones as the model expects
            inputs[name] = np.repeat(example, _ROWS, axis=0)
        else:
            shape = (_ROWS, *example.shape[1:])
            inputs[name] = random.standard_normal(shape).astype(np.float32)
    # Configs of small models may name an end token beyond their vocabulary.
    ends = [i for i in getattr(c, "eos_ids", ()) if i < c.vocab_size]
    if "input_ids" in inputs and ends:
        inputs["input_ids"][:, -1] = ends[0]
    reads_target = "decoder_input_ids" in getattr(model, "inputs", ())
    if reads_target and not c.architecture.endswith("ForSequenceClassification"):
        inputs["decoder_input_ids"] = random.choice(_ordinary_ids(c.decoder), (_ROWS, _LENGTH))
    return inputs


def _ordinary_ids(config: Any) -> np.ndarray:
    """Ids of ordinary tokens, int64 [n]; the first ids are special in most vocabularies."""
    special = [config.pad_id, *getattr(config, "eos_ids", ())]
    for first in (10, 0):
        ids = np.setdiff1d(np.arange(first, config.vocab_size), special)
        if ids.size:
            return ids
    return np.arange(config.vocab_size)
