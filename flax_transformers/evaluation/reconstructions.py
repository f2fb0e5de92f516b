"""Pictures that a masked autoencoder reconstructs, and its baseline."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.evaluation.pictures import picture_grid, write_png
from flax_transformers.evaluation.predictions import once_per_shape
from flax_transformers.families.mae import NORM_PIX_EPS, MaeConfig, hide_patches, patch_targets
from flax_transformers.objectives.base import Batch, Params
from flax_transformers.objectives.masked_image import MaskedImage, mask_noise
from flax_transformers.parallel.rules import batch_sharding, host_rows, place_rows
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step

PICTURES = 12
GREY = 0.5
MAX_IMAGES, MAX_VALUES = 10_000, 200_000_000
"""Largest number of images, and of pixel values, that a baseline is fitted and scored on."""


def reconstruction_evaluator(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path
) -> Evaluator:
    """A function of a snapshot that writes samples/step_N.png: held-out images, their visible
    patches, and the reconstruction, with visible patches unchanged."""
    objective, model = config.objective, config.model
    assert isinstance(objective, MaskedImage) and isinstance(model, MaeConfig)

    def painter(snapshot: Snapshot) -> Callable[..., Any]:
        def paint(params: Params, batch: Batch) -> Any:
            reconstruction = objective.reconstruct(snapshot.functions, params, batch, {})
            pixels = objective.normalized(batch["pixel_values"])
            found = pixels, reconstruction.predicted_BTK, reconstruction.masked_BT, batch["weights"]
            return tuple(values[:PICTURES] for values in found)

        return compile_evaluation_step(paint, snapshot.params, snapshot.mesh)

    compiled = once_per_shape(painter)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        size = config.evaluation.batch_size
        sharding = batch_sharding(snapshot.mesh)
        rows = host_rows(sharding, size)
        local = next(held_out_batches(config, prepared, snapshot.phase.sequence_length, rows), None)
        if local is None:
            return {}
        local.pop("example_id")
        batch = place_rows(local, rows, sharding, size)
        found = jax.device_get(compiled(snapshot)(snapshot.params, batch))
        pixels, predicted_BTK, masked_BT, weights = found
        if jax.process_index() == 0:
            real = weights > 0
            rows_of = three_rows(
                objective, model, pixels[real], predicted_BTK[real], masked_BT[real]
            )
            path = workdir / "samples" / f"step_{snapshot.step:08d}.png"
            write_png(path, picture_grid(rows_of))
        return {}

    return evaluate


def three_rows(
    objective: MaskedImage,
    model: MaeConfig,
    pixel_values: np.ndarray,
    predicted_BTK: np.ndarray,
    masked_BT: np.ndarray,
) -> np.ndarray:
    """Original, visible part and reconstruction of B images, [3, B, height, width, C] in [0, 1].

    ``pixel_values`` float32 [B, C, height, width] are normalised for the model. Pixels at the right
    and bottom that do not fill a patch are dropped.
    """
    plain = replace(model, norm_pix_loss=False)
    patches_BTK = np.asarray(patch_targets(plain, jnp.asarray(pixel_values)))
    if model.norm_pix_loss:  # the model does not predict the mean and variance of a patch
        mean_BT1 = patches_BTK.mean(axis=-1, keepdims=True)
        variance_BT1 = patches_BTK.var(axis=-1, ddof=1, keepdims=True)
        predicted_BTK = predicted_BTK * np.sqrt(variance_BT1 + NORM_PIX_EPS) + mean_BT1
    masked_BTK = np.broadcast_to(masked_BT[:, :, None] > 0, patches_BTK.shape)
    columns = pixel_values.shape[3] // model.patch_size
    seen, hidden, reconstruction = (
        _joined(model, columns, values)
        for values in (patches_BTK, masked_BTK, np.where(masked_BTK, predicted_BTK, patches_BTK))
    )
    seen, reconstruction = objective.pixels(seen), objective.pixels(reconstruction)
    return np.stack([seen, np.where(hidden, GREY, seen), reconstruction]).transpose(0, 1, 3, 4, 2)


def _joined(model: MaeConfig, columns: int, patches_BTK: np.ndarray) -> np.ndarray:
    """Patches as images [B, C, height, width]."""
    batch, side, channels = len(patches_BTK), model.patch_size, model.num_channels
    split = patches_BTK.reshape(batch, -1, columns, side, side, channels)
    return split.transpose(0, 5, 1, 3, 2, 4).reshape(batch, channels, -1, columns * side)


def reconstruction_baselines(config: TrainConfig, prepared: Dataset) -> list[Baseline]:
    """The error of the mean patch of the training images."""
    return [
        constant_guess(
            config,
            prepared,
            "mean patch",
            lambda mean_TK: np.broadcast_to(mean_TK.mean(axis=0), mean_TK.shape),
        )
    ]


def constant_guess(
    config: TrainConfig,
    prepared: Dataset,
    name: str,
    guess: Callable[[np.ndarray], np.ndarray],
) -> Baseline:
    """A baseline that guesses the same patches float32 [T, K] for every image, scored on the hidden
    patches of ``eval/loss``.

    ``guess`` makes them of the mean training image, as patches [T, K]. At most `MAX_IMAGES` images
    are read.
    """
    objective, model, length = config.objective, config.model, config.phases[-1].sequence_length
    assert isinstance(objective, MaskedImage) and isinstance(model, MaeConfig)

    @jax.jit
    def targets(pixel_values: jax.Array) -> jax.Array:
        return patch_targets(model, objective.normalized(pixel_values))

    @jax.jit
    def error(batch: Batch, guess_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
        target_BTK = targets(batch["pixel_values"])
        _, masked_BT, _ = hide_patches(
            mask_noise(batch["mask_key"], target_BTK.shape[1]), model.mask_ratio
        )
        masked_BT = masked_BT * batch["weights"][:, None]
        error_BT = jnp.mean((target_BTK - guess_TK[None]) ** 2, axis=-1)
        return jnp.sum(error_BT * masked_BT), jnp.sum(masked_BT)

    most = min(MAX_IMAGES, MAX_VALUES // (length**2 * model.num_channels))
    total, count = np.zeros(1), 0
    examples = training_examples(prepared, objective.window_spec(length))
    with TrainStream(
        examples,
        objective,
        prepared.vocabulary,
        sequence_length=length,
        batch_size=config.evaluation.batch_size,
        workers=config.data.workers,
        seed=(config.seed, "baseline"),
    ) as stream:
        while stream.position < min(most, len(examples)):
            target_BTK = np.asarray(targets(next(stream)["pixel_values"]), np.float64)
            total, count = total + target_BTK.sum(axis=0), count + len(target_BTK)
    guess_TK = jnp.asarray(guess((total / count).astype(np.float32)))
    held_out = held_out_batches(config, prepared, length)
    batches = itertools.islice(held_out, -(-most // config.evaluation.batch_size))
    sums = np.array([error(batch, guess_TK) for batch in batches], np.float64)
    squared, hidden = sums.sum(axis=0).tolist()
    return Baseline(name, "eval/loss", squared / hidden, round(hidden), "hidden patches", unit="")
