"""Patches of an image and the tables of their positions: plain functions.

Shape letters: C channels, P and Q rows and columns of pixels in a patch; T patches, row by row, and
in tables of positions also the tokens before them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CUBIC = -0.75
"""The free coefficient of cubic interpolation in torch; ``jax.image.resize`` has -0.5."""

SINCOS_BASE = 10000.0


def patch_grid(image_shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches in an image [height, width]."""
    return image_shape[0] // patch_size, image_shape[1] // patch_size


def cut_patches(pixel_values: jax.Array, patch_size: int) -> jax.Array:
    """[B, C, height, width] to patches [B, T, C, P, Q], row by row."""
    rows, columns = patch_grid(pixel_values.shape[2:], patch_size)
    batch, channels = pixel_values.shape[:2]
    cropped = pixel_values[:, :, : rows * patch_size, : columns * patch_size]
    split = cropped.reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = split.transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels, patch_size, patch_size)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] of cubic interpolation of ``old`` values to ``new``, float64.

    As torch's ``interpolate(mode="bicubic", align_corners=False)`` without antialiasing: pixel
    centres lie at halves, and values at the edges are repeated beyond them.
    """
    position = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(position).astype(int)
    rows, matrix = np.arange(new), np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        near = left + step
        d = np.abs(position - near)
        inner = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
        outer = ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC
        np.add.at(matrix, (rows, near.clip(0, old - 1)), np.where(d <= 1, inner, outer))
    return matrix


def resize_positions(
    table: jax.Array | np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> jax.Array:
    """A table of positions [T, D] for another grid of patches, by bicubic interpolation.

    ``old`` and ``new`` are (rows, columns). Rows before the patches are not changed.
    """
    tokens = table.shape[0] - old[0] * old[1]
    table = jnp.asarray(table)
    if old == new:
        return table
    down, across = (
        jnp.asarray(cubic_weights(*sizes), jnp.float32) for sizes in zip(old, new, strict=True)
    )
    patches = table[tokens:].reshape(*old, -1).astype(jnp.float32)
    resized = jnp.einsum("Rr,Cc,rcD->RCD", down, across, patches, precision="highest")
    resized = resized.reshape(new[0] * new[1], -1).astype(table.dtype)
    return jnp.concatenate([table[:tokens], resized])


def sincos_table(grid: tuple[int, int], width: int, tokens: int = 0) -> np.ndarray:
    """Fixed positions of MAE (arXiv:2111.06377), float32 [T, width]; zeros for the tokens.

    A quarter of the width each for sine and cosine of the column, then of the row, at frequencies
    ``10000 ** (-i / (width / 4))``. (big_vision divides by ``width / 4 - 1``.)
    """
    quarter = width // 4
    frequency = 1.0 / SINCOS_BASE ** (np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [np.outer(position, frequency) for position in (column, row)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.pad(np.concatenate(waves, axis=1), ((tokens, 0), (0, 0))).astype(np.float32)
