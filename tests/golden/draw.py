"""Random numbers that depend on names alone, so that goldens hold results and never inputs.

They come from numpy's legacy generator, whose stream never changes. Needs numpy only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np


def generator(name: str) -> np.random.RandomState:
    """The generator that belongs to ``name``."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def draw(name: str, shape: tuple[int, ...], seed: str) -> np.ndarray:
    """Standard normal float32 values for tensor ``name`` of the model ``seed``."""
    return np.asarray(generator(f"{seed}/{name}").standard_normal(shape), np.float32)


def draw_weights(shapes: Mapping[str, tuple[int, ...]], seed: str) -> dict[str, np.ndarray]:
    """Every tensor of a model, norms and biases included, at a size that keeps activations near 1.

    Kernels get a standard deviation of 0.2, norm scales lie around 1, and running variances above.
    """
    tensors = {
        name: np.asarray(np.float32(0.2) * draw(name, shape, seed))
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and name.endswith(".weight"):  # only norms have such
            tensor += 1
        if name.endswith(".running_var"):
            tensor[...] = 1 + np.abs(tensor)
    return tensors
