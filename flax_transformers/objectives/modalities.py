"""Objectives over several modalities with one trunk: masked pretraining, and labels of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Arrays,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_image import mask_noise
from flax_transformers.objectives.signals import SignalSpec, array_of, label_of


class OfSignals:
    """What both objectives have in common."""

    def window_spec(self: Any, sequence_length: int) -> SignalSpec:
        return SignalSpec(sequence_length, names=self.modalities)

    def predictions(self, sequence_length: int) -> int:
        """No logits by position."""
        return 0

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """Nothing: arrays are not text."""
        return []


@dataclass(frozen=True, kw_only=True)
class MaskedModalities(OfSignals):
    """Reconstruct masked tokens of each modality (OmniMAE, arXiv:2206.08356).

    A batch has arrays of all modalities, each in a sequence of its own. The loss of a modality is
    the mean over its masked tokens, and the trained loss their weighted sum, so that none counts
    more for having more tokens.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("masked_errors", "num_tokens"), ("signals",))

    modalities: tuple[str, ...]
    """Names of the modalities, and of the sources of their arrays."""
    coefficients: tuple[float, ...] = ()
    """Factor of each loss; empty: 1 for all."""

    RANGES: ClassVar[ranges.Ranges] = {"coefficients": ranges.numbers(0, 1e6)}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")
        names, count = set(self.modalities), len(self.modalities)
        if not names or len(names) < count or len(self.coefficients) not in (0, count):
            raise ranges.OutOfRange(
                f"objective.modalities are {list(self.modalities)} and objective.coefficients "
                f"{list(self.coefficients)}; name each modality once, with a number"
            )

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The array of each modality by its name; ``mask_keys`` uint32 [modalities, 2] of their
        random masks; ``weights`` float32 [], 1."""
        arrays = {name: array_of(example, name) for name in self.modalities}
        return arrays | {
            "mask_keys": rng.integers(0, 1 << 32, (len(arrays), 2), np.uint32),
            "weights": np.array(1.0, np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """A loss for each modality, a mean over its masked tokens; the metrics "loss_NAME", and
        "loss", the sum that is trained."""
        import jax  # not at the top: data workers must not import jax
        import jax.numpy as jnp

        weights_B = batch["weights"]
        factors = self.coefficients or (1.0,) * len(self.modalities)
        losses, metrics, whole = {}, {}, jnp.zeros(())
        for index, (name, factor) in enumerate(zip(self.modalities, factors, strict=True)):
            tokens = model.head("num_tokens", params, {}, modality=name)
            noise_BT = mask_noise(batch["mask_keys"][:, index], tokens)
            own_rngs = {kind: jax.random.fold_in(key, index) for kind, key in rngs.items()}
            error_BT, mask_BT = model.head(
                "masked_errors", params, own_rngs, batch[name], noise_BT, modality=name
            )
            counted_BT = mask_BT * weights_B[:, None]
            loss, count = jnp.sum(error_BT * counted_BT), jnp.sum(counted_BT)
            losses[name] = (loss, count, factor)
            metrics[f"loss_{name}"] = (loss, count)
            # All examples of a modality have as many masked tokens.
            whole += factor * loss / jnp.sum(mask_BT[0])
        return LossTerms(losses, metrics | {"loss": (whole, jnp.sum(weights_B))})


@dataclass(frozen=True, kw_only=True)
class ModalityClassification(OfSignals):
    """Predict the label of an array of one modality, with the trunk that all have shared."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("signals",))

    modality: str
    """Name of the modality, and of the source of its arrays."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The one modality."""
        return (self.modality,)

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The array by its name; ``labels`` int32 [1] and ``label_weights`` float32 [1], 1."""
        return {
            self.modality: array_of(example, self.modality),
            "labels": np.array([label_of(example)], np.int32),
            "label_weights": np.ones(1, np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """Those of ``ImageClassification``."""
        signals = {self.modality: batch[self.modality]}
        states = model.head("hidden_states", params, rngs, signals)
        logits_BC = model.head("classify", params, rngs, states.last_hidden_state)
        return ImageClassification().label_terms(logits_BC, batch)
