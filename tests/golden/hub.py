"""Runs the original of a model on random weights, and keeps what comes out.

A golden script lists ``CASES``; ``write_goldens`` computes them with torch and transformers in
float64 and stores float32. The weights are drawn by the names in a *saved file*, which the original
then loads: what is compared is the published layout. Importing this file needs numpy only.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.golden.draw import draw_weights


@dataclass(frozen=True)
class Case:
    """One comparison.

    ``config``: a config.json with ``architectures``. ``inputs``: the arguments of the forward call.
    ``outputs``: the fields of the result to keep, and the input whose ones say at which places
    ([B, T], 1: keep), or None for all. ``kept``: patterns of tensors that stay as the original
    initialises them (fixed tables). ``labels``: with them the loss and its gradients are kept too.
    """

    name: str
    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: Mapping[str, str | None]
    kept: Sequence[str] = ()
    labels: np.ndarray | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the forward call, which are no arrays."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Names that the file of goldens has for outputs, where it was written under older ones."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names in the saved file, and what published files have in their place."""
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of tensors that the published file has besides those of a freshly saved one."""

    def attended(self, output: str, value: np.ndarray) -> np.ndarray:
        """The places of an output that count."""
        mask = self.outputs[output]
        return value if mask is None else value[self.inputs[mask] == 1]


def load_original(case: Case, folder: Path, dtype: str = "float64") -> Any:
    """The original with drawn weights, by way of a saved file."""
    import safetensors.numpy
    import torch
    import transformers

    torch.use_deterministic_algorithms(True)
    kind = getattr(transformers, case.config["architectures"][0])
    config = kind.config_class(**{k: v for k, v in case.config.items() if k != "architectures"})
    config._attn_implementation = "eager"
    kind(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    saved = safetensors.numpy.load_file(path)
    for pattern, published in case.renames.items():
        saved = {re.sub(pattern, published, name): value for name, value in saved.items()}
    fixed = {n for n in saved if any(re.search(pattern, n) for pattern in case.kept)}
    shapes = {n: v.shape for n, v in saved.items() if n not in fixed} | dict(case.added)
    tensors = saved | draw_weights(shapes, case.name)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.config))
    model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one takes no float64
    return model.eval()


@contextlib.contextmanager
def full_precision_softmax() -> Iterator[None]:
    """Many originals ask the softmax of attention for float32, in which the number that masks in
    float64 is minus infinity: rows of padding would be NaN. Inside, such a request is ignored."""
    import torch

    softmax = torch.nn.functional.softmax

    def wide(scores: Any, dim: int, dtype: Any = None) -> Any:
        return softmax(scores, dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype))

    with mock.patch.object(torch.nn.functional, "softmax", wide):
        yield


def torch_inputs(case: Case, dtype: str = "float64") -> dict[str, Any]:
    """The inputs of a case as tensors: numbers of ``dtype``, ids as long, masks as bool."""
    import torch

    kinds = {"f": getattr(torch, dtype), "b": torch.bool}
    return {
        name: torch.tensor(value).to(kinds.get(value.dtype.kind, torch.long))
        for name, value in case.inputs.items()
    }


def run_original(case: Case, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Outputs by name; with labels also ``loss`` and ``gradients/<name of the tensor>``."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load_original(case, Path(folder), dtype)
    inputs = torch_inputs(case, dtype)
    if case.labels is not None:
        inputs["labels"] = torch.tensor(case.labels).long()
    with full_precision_softmax():
        output = model(**inputs, **case.extra)
    results = {name: case.attended(name, output[name].detach().numpy()) for name in case.outputs}
    if case.labels is not None:
        output.loss.backward()
        results["loss"] = output.loss.detach().numpy()
        for name, tensor in model.named_parameters():
            if tensor.grad is not None:
                results[f"gradients/{name}"] = tensor.grad.numpy()
    return results


def write_goldens(cases: Sequence[Case], script: str) -> None:
    """Runs all cases and writes the results beside the golden script (its ``__file__``)."""
    results = {
        f"{case.name}/{case.stored.get(name, name)}": value.astype(np.float32)
        for case in cases
        for name, value in run_original(case).items()
    }
    np.savez_compressed(Path(script).with_suffix(".npz"), **results)


def read_golden(script: str, case: Case) -> dict[str, np.ndarray]:
    """What ``write_goldens`` stored for one case."""
    ours = {stored: name for name, stored in case.stored.items()}
    with np.load(Path(script).with_suffix(".npz")) as file:
        names = {
            name: name.removeprefix(f"{case.name}/")
            for name in file.files
            if name.startswith(f"{case.name}/")
        }
        return {ours.get(stored, stored): file[name] for name, stored in names.items()}
