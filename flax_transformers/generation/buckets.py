"""Sizes of compiled programs: prompts of nearly equal lengths share one."""

from __future__ import annotations

import numpy as np

_FINE = 64
"""Above this size there are two buckets for each doubling."""


def bucket(size: int) -> int:
    """The smallest power of two from ``size`` on or, above 64, power of two and a half."""
    power = 1 << max(0, size - 1).bit_length()
    between = power // 4 * 3
    return between if between > _FINE and size <= between else power


def padded_to_bucket(
    ids_BT: np.ndarray, mask_BT: np.ndarray, pad: int, *, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask with padding up to the bucket of their length, on the left or the right."""
    missing = bucket(ids_BT.shape[1]) - ids_BT.shape[1]
    widths = ((0, 0), (missing, 0) if left else (0, missing))
    return np.pad(ids_BT, widths, constant_values=pad), np.pad(mask_BT, widths)
