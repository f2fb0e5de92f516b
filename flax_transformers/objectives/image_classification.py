"""Labels of images, learned from whole images or from mixtures of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.images import ImageSpec, PixelInput, hidden_states, pixels_of
from flax_transformers.ranges import Ranges

TOP = 5


@dataclass(frozen=True, kw_only=True)
class ImageClassification(PixelInput):
    """Tell what an image shows; with ``mixup`` or ``cutmix``, what two images in one show.

    Every image is mixed with one of its own, drawn anew, by a share of its own (the papers draw
    one share for a batch and mix it with itself): so a row does not depend on its neighbours.
    Evaluation mixes nothing.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("pixel_values",))

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy over the labels, or a yes or no to each (binary cross-entropy, their mean),
    where both labels of a mixture are a yes, as in DeiT III (arXiv:2204.07118)."""
    label_smoothing: float = 0.0
    """The share of the target that is spread over all labels (softmax alone)."""
    mixup: float = 0.0
    """Mix two images by a share from Beta(mixup, mixup) (arXiv:1710.09412); 0: never."""
    cutmix: float = 0.0
    """Put a rectangle of another image into the image, its area from Beta(cutmix, cutmix)
    (arXiv:1905.04899); 0: never. With ``mixup`` too, each is done to half of the images."""

    RANGES: ClassVar[Ranges] = {
        "label_smoothing": ranges.RATE,
        "mixup": ranges.numbers(0, 1000),
        "cutmix": ranges.numbers(0, 1000),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss == "sigmoid":
            raise ValueError(
                "objective.label_smoothing goes with loss='softmax' alone; set it to 0"
            )

    def window_spec(self, sequence_length: int) -> ImageSpec:
        return ImageSpec(sequence_length, other=self.mixup > 0.0 or self.cutmix > 0.0)

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` uint8 [C, side, side]; ``labels`` int32 [2], the image's own and that of
        what is mixed in; ``label_weights`` float32 [2], the share of each, which add up to one.
        """
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

    def _mixed(
        self, pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        cut = self.cutmix > 0.0 and (self.mixup == 0.0 or rng.random() < 0.5)
        if cut:
            return cutmix(pixels, other, rng.beta(self.cutmix, self.cutmix), rng)
        share = rng.beta(self.mixup, self.mixup)
        return mixup(pixels, other, share), share

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "classification"; plain cross-entropy, accuracy and accuracy in the top 5.

        Of a mixture, the metrics are those of both labels, by their shares. Two heads (DeiT's)
        learn as the one they are in prediction: by the mean of their logits.
        """
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        pixel_values = self.normalized(batch["pixel_values"])
        hidden_BTD = hidden_states(model, params, rngs, pixel_values).last_hidden_state
        logits_B1C = model.head("classify", params, rngs, hidden_BTD)[:, None]
        labels_BM, weights_BM = batch["labels"], batch["label_weights"]
        count = jnp.sum(jnp.any(weights_BM > 0.0, axis=1).astype(jnp.float32))
        scores = cross_entropy(logits_B1C, labels_BM)
        if self.loss == "softmax":
            loss = jnp.sum(scores.smoothed(self.label_smoothing) * weights_BM)
        else:
            loss = jnp.sum(yes_or_no(logits_B1C[:, 0], labels_BM, weights_BM))
        in_top_BM = in_top(logits_B1C, labels_BM)
        return LossTerms(
            losses={"classification": (loss, count, 1.0)},
            metrics={
                "loss": (jnp.sum(scores.nll * weights_BM), count),
                "accuracy": (jnp.sum(scores.correct * weights_BM), count),
                "top_5": (jnp.sum(in_top_BM * weights_BM), count),
            },
        )

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        """Nothing to read; the pictures are what there is to see."""
        return []


def in_top(logits_B1C: Array, labels_BM: Array) -> Array:
    """1 where fewer than `TOP` other labels have a logit as high as the label's, float32 [B, M]."""
    import jax.numpy as jnp

    logits_BMC = jnp.broadcast_to(logits_B1C, (*labels_BM.shape, logits_B1C.shape[-1]))
    own_BM1 = jnp.take_along_axis(logits_BMC, labels_BM[:, :, None], axis=2)
    return (jnp.sum(logits_BMC >= own_BM1, axis=2) <= TOP).astype(jnp.float32)


def yes_or_no(logits_BC: Array, labels_BM: Array, weights_BM: Array) -> Array:
    """Binary cross-entropy of each image, its mean over all labels, float32 [B].

    The answer is yes for each of ``labels_BM`` that has a weight; without any the loss is 0.
    """
    import jax
    import jax.numpy as jnp

    present_BM1 = (weights_BM > 0.0)[:, :, None]
    chosen_BMC = labels_BM[:, :, None] == jnp.arange(logits_BC.shape[1])[None, None]
    yes_BC = jnp.any(chosen_BMC & present_BM1, axis=1)
    loss_BC = jax.nn.softplus(jnp.where(yes_BC, -logits_BC, logits_BC))
    return jnp.mean(loss_BC, axis=1) * jnp.any(present_BM1[:, :, 0], axis=1)


def mixup(pixels: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """``share`` of one image and the rest of the other, uint8 [C, height, width]."""
    mixed = pixels * np.float32(share) + other * np.float32(1.0 - share)
    return np.rint(mixed).astype(np.uint8)


def cutmix(
    pixels: np.ndarray, other: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """``pixels`` with a rectangle of ``other`` of 1 - ``share`` of its area, anywhere.

    The rectangle's centre is anywhere too, so that an edge may cut it: the second result is the
    share of ``pixels`` that is really left (arXiv:1905.04899 §3.1).
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
