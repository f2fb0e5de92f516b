"""Classification of images, with mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.images import ImageSpec, PixelInput, hidden_states, pixels_of

TOP = 5  # of the metric "top_5"


@dataclass(frozen=True, kw_only=True)
class ImageClassification(PixelInput):
    """Predict the label of an image; with ``mixup`` or ``cutmix``, the labels of two mixed images.

    Every image is mixed with another random image by a share of its own, so that examples do not
    depend on their batch (the papers draw one share for a batch and mix it with itself). Images are
    not mixed in evaluation.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("pixel_values",))

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy over the labels, or the mean of their binary cross-entropies, for which both
    labels of mixed images are true, as in DeiT III (arXiv:2204.07118)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels (only with softmax)."""
    mixup: float = 0.0
    """Parameter of the Beta distribution of shares of two images (arXiv:1710.09412); 0: off."""
    cutmix: float = 0.0
    """Parameter of the Beta distribution of the area that a rectangle of another image replaces
    (arXiv:1905.04899); 0: off. Together with ``mixup``, each applies to half of the images."""

    RANGES: ClassVar[ranges.Ranges] = {
        "label_smoothing": ranges.RATE,
        "mixup": ranges.numbers(0, 1000),
        "cutmix": ranges.numbers(0, 1000),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss == "sigmoid":
            raise ranges.OutOfRange(
                f"objective.label_smoothing is {self.label_smoothing}; it must be 0 with the loss "
                "'sigmoid'"
            )

    def window_spec(self, sequence_length: int) -> ImageSpec:
        return ImageSpec(sequence_length, other=self.mixup > 0.0 or self.cutmix > 0.0)

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``pixel_values`` uint8 [C, side, side]; ``labels`` int32 [2] of the image and of the one
        mixed with it; ``label_weights`` float32 [2], their shares, with the sum one."""
        pixels, share = pixels_of(example), 1.0
        label = other_label = example["label"]
        if "other_image" in example:
            other, other_label = pixels_of(example, "other_image"), example["other_label"]
            pixels, share = self._mixed(pixels, other, rng)
        return {
            "pixel_values": pixels,
            "labels": np.array([label, other_label], np.int32),
            "label_weights": np.array([share, 1.0 - share], np.float32),
        }

    def _mixed(self, pixels: np.ndarray, other: np.ndarray, rng: Rng) -> tuple[np.ndarray, float]:
        cut = self.cutmix > 0.0 and (self.mixup == 0.0 or rng.random() < 0.5)
        if cut:
            return cutmix(pixels, other, rng.beta(self.cutmix, self.cutmix), rng)
        share = rng.beta(self.mixup, self.mixup)
        return mixup(pixels, other, share), share

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "classification"; the metrics "loss", "accuracy" and "top_5".

        Metrics of mixed images are weighted by the shares of their labels. The logits of two heads
        (DeiT's) are averaged, as in prediction.
        """
        return self.label_terms(self._logits(model, params, batch, rngs), batch)

    def label_terms(self, logits_BC: Array, batch: Batch) -> LossTerms:
        """The terms of logits."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        logits_B1C = logits_BC[:, None]
        labels_BM, weights_BM = batch["labels"], batch["label_weights"]
        count = jnp.sum(jnp.any(weights_BM > 0.0, axis=1).astype(jnp.float32))
        scores = cross_entropy(logits_B1C, labels_BM)
        if self.loss == "softmax":
            loss = jnp.sum(scores.smoothed(self.label_smoothing) * weights_BM)
        else:
            loss = jnp.sum(binary_cross_entropy(logits_B1C[:, 0], labels_BM, weights_BM))
        in_top_BM = in_top(logits_B1C, labels_BM)
        return LossTerms(
            losses={"classification": (loss, count, 1.0)},
            metrics={
                "loss": (jnp.sum(scores.nll * weights_BM), count),
                "accuracy": (jnp.sum(scores.correct * weights_BM), count),
                "top_5": (jnp.sum(in_top_BM * weights_BM), count),
            },
        )

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` int32 [B], the likeliest labels, ``labels`` int32 [B], and ``logits``
        float32 [B, C]."""
        import jax.numpy as jnp

        logits_BC = self._logits(model, params, batch, {})
        predicted = jnp.argmax(logits_BC, axis=1)
        return {"predicted": predicted, "labels": batch["labels"][:, 0], "logits": logits_BC}

    def _logits(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> Array:
        pixel_values = self.normalized(batch["pixel_values"])
        hidden_BTD = hidden_states(model, params, rngs, pixel_values).last_hidden_state
        return model.head("classify", params, rngs, hidden_BTD)


def in_top(logits_B1C: Array, labels_BM: Array) -> Array:
    """1 where fewer than `TOP` other labels have a logit as high as the label, float32 [B, M]."""
    import jax.numpy as jnp

    logits_BMC = jnp.broadcast_to(logits_B1C, (*labels_BM.shape, logits_B1C.shape[-1]))
    own_BM1 = jnp.take_along_axis(logits_BMC, labels_BM[:, :, None], axis=2)
    return (jnp.sum(logits_BMC >= own_BM1, axis=2) <= TOP).astype(jnp.float32)


def binary_cross_entropy(logits_BC: Array, labels_BM: Array, weights_BM: Array) -> Array:
    """Mean binary cross-entropy of the labels of each image, float32 [B].

    Labels in ``labels_BM`` with a weight are true; without any, the loss is 0.
    """
    import jax
    import jax.numpy as jnp

    present_BM1 = (weights_BM > 0.0)[:, :, None]
    chosen_BMC = labels_BM[:, :, None] == jnp.arange(logits_BC.shape[1])[None, None]
    true_BC = jnp.any(chosen_BMC & present_BM1, axis=1)
    loss_BC = jax.nn.softplus(jnp.where(true_BC, -logits_BC, logits_BC))
    return jnp.mean(loss_BC, axis=1) * jnp.any(present_BM1[:, :, 0], axis=1)


def mixup(pixels: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """``share`` of one image and the rest of the other, uint8 [C, H, W]."""
    mixed = pixels * np.float32(share) + other * np.float32(1.0 - share)
    return np.rint(mixed).astype(np.uint8)


def cutmix(
    pixels: np.ndarray, other: np.ndarray, share: float, rng: Rng
) -> tuple[np.ndarray, float]:
    """``pixels`` with a random rectangle of ``other`` of 1 - ``share`` of the area.

    The rectangle can extend beyond the image, as its centre is random: the second result is the
    share of ``pixels`` that is left (arXiv:1905.04899 section 3.1).
    """
    height, width = pixels.shape[1:]
    side = np.sqrt(1.0 - share)
    rows, columns = (
        slice(*np.clip(np.rint(centre + np.array([-0.5, 0.5]) * side * size), 0, size).astype(int))
        for size, centre in ((height, rng.uniform(0, height)), (width, rng.uniform(0, width)))
    )
    mixed = pixels.copy()
    mixed[:, rows, columns] = other[:, rows, columns]
    left = 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, left
