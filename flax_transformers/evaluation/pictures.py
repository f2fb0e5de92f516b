"""Grids of small images, written as PNG."""

from __future__ import annotations

import io

import numpy as np
from etils import epath

from flax_transformers.storage.workdir import set_aside_unusable, write_bytes

_GAP = 2  # white pixels between pictures
_SHOWN = 84  # least pixels of the shorter side of a picture


def picture_grid(pictures: np.ndarray) -> np.ndarray:
    """One picture uint8 [.., .., 3] of ``pictures`` float [rows, columns, height, width, 1 or 3]
    in [0, 1]. Small pictures are enlarged by a whole factor.
    """
    rows, columns, height, width, channels = pictures.shape
    times = max(1, round(_SHOWN / min(height, width)))
    large = pictures.repeat(times, axis=2).repeat(times, axis=3)
    gaps = ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0))
    apart = np.pad(large, gaps, constant_values=1.0)
    grid = apart.transpose(0, 2, 1, 3, 4).reshape(
        rows * (height * times + _GAP), columns * (width * times + _GAP), channels
    )
    grid = np.pad(grid, ((_GAP, 0), (_GAP, 0), (0, 0)), constant_values=1.0)
    return np.rint(np.broadcast_to(grid, (*grid.shape[:2], 3)) * 255.0).astype(np.uint8)


def write_png(path: epath.Path, pixels: np.ndarray) -> None:
    """Writes a picture uint8 [height, width, 3]. Raises UserError if the file cannot be written."""
    from matplotlib.image import imsave  # slow to import

    content = io.BytesIO()
    imsave(content, pixels, format="png")
    set_aside_unusable(path)
    write_bytes(path, content.getvalue())
