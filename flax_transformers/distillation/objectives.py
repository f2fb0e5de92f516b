"""Classification with a teacher: a student learns from the labels, and from another model's logits.

The logits of the teacher, ``teacher_logits`` float32 [B, C], come with each training batch (see
``batches``). Without them, as in evaluation, these objectives are those of plain classification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    Rngs,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import hidden_states
from flax_transformers.objectives.sequence_classification import SequenceClassification

LOGITS = "teacher_logits"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Settings of distillation (Hinton et al., arXiv:1503.02531; DeiT, arXiv:2012.12877 section 4).

    The loss is ``1 - share`` of the cross-entropy with the labels, and ``share`` of the teacher's:
    "hard", the cross-entropy with the class that the teacher finds likeliest; or "soft", the
    divergence of the student's distribution from the teacher's, both with logits divided by
    ``temperature``, times its square.
    """

    teacher: str
    """Run or folder of the teacher: a classifier of the same classes and inputs."""
    distillation: Literal["hard", "soft"] = "hard"
    temperature: float = 3.0
    """Only with "soft"."""
    share: float = 0.5
    """Share of the teacher in the loss; DeiT has 0.5 with "hard" and 0.1 with "soft"."""

    RANGES: ClassVar[ranges.Ranges] = {
        "temperature": ranges.numbers(0, 1000, above=True),
        "share": ranges.SHARE,
    }

    def added_arrays(self, model: Any) -> Arrays:
        """Zeros for what training batches have besides ``prepare``'s arrays: ``teacher_logits`` of
        an example, float32 [C], for the config of the student."""
        return {LOGITS: np.zeros(model.num_labels, np.float32)}

    def taught(
        self, own: LossTerms, logits_BC: Array, teacher_BC: Array, weights_B: Array
    ) -> LossTerms:
        """The terms of the labels, ``own``, with the loss "distillation" of ``logits_BC``, and the
        metric "teacher_agreement"."""
        import jax
        import jax.numpy as jnp

        label_B = jnp.argmax(teacher_BC, axis=1)
        if self.distillation == "hard":
            log_share_BC = jax.nn.log_softmax(logits_BC)
            loss_B = -jnp.take_along_axis(log_share_BC, label_B[:, None], axis=1)[:, 0]
        else:
            log_share_BC = jax.nn.log_softmax(logits_BC / self.temperature)
            target_BC = jax.nn.log_softmax(teacher_BC / self.temperature)
            divergence_B = jnp.sum(jnp.exp(target_BC) * (target_BC - log_share_BC), axis=1)
            loss_B = divergence_B * self.temperature**2
        count = jnp.sum(weights_B)
        labels = {name: (s, w, c * (1 - self.share)) for name, (s, w, c) in own.losses.items()}
        taught = {"distillation": (jnp.sum(loss_B * weights_B), count, self.share)}
        agrees_B = (jnp.argmax(logits_BC, axis=1) == label_B) * weights_B
        agreement = {"teacher_agreement": (jnp.sum(agrees_B), count)}
        return LossTerms(labels | taught, own.metrics | agreement)


@dataclass(frozen=True, kw_only=True)
class DistilledImageClassification(Teacher, ImageClassification):
    """`ImageClassification` with a teacher, who sees the same augmented and mixed images."""

    distillation_token: bool = False
    """Whether the model is a DeiT, whose distillation token alone learns from the teacher, and its
    class token from the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation_token:
            heads = ("classify_both", "classify")
            object.__setattr__(self, "needs", ModelNeeds(heads, ("pixel_values",)))

    def teacher_logits(self, model: ModelFunctions, params: Params, batch: Batch) -> Array:
        """``teacher_logits`` float32 [B, C] of a batch, by the teacher's functions."""
        return self._logits(model, params, batch, {})

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """See `ImageClassification` and `Teacher.taught`."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        if LOGITS not in batch:
            return super().terms(model, params, batch, rngs)
        pixel_values = self.normalized(batch["pixel_values"])
        hidden_BTD = hidden_states(model, params, rngs, pixel_values).last_hidden_state
        if self.distillation_token:
            class_BC, taught_BC = model.head("classify_both", params, rngs, hidden_BTD)
        else:
            class_BC = taught_BC = model.head("classify", params, rngs, hidden_BTD)
        weights_B = jnp.any(batch["label_weights"] > 0.0, axis=1).astype(jnp.float32)
        return self.taught(self.label_terms(class_BC, batch), taught_BC, batch[LOGITS], weights_B)


@dataclass(frozen=True, kw_only=True)
class DistilledSequenceClassification(Teacher, SequenceClassification):
    """`SequenceClassification` with a teacher, who has the same tokenizer and ``framing``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "mse":
            raise ranges.OutOfRange(
                "objective.loss is 'mse', but a teacher has classes; set it to 'cross_entropy'"
            )

    def teacher_logits(self, model: ModelFunctions, params: Params, batch: Batch) -> Array:
        """``teacher_logits`` float32 [B, C] of a batch, by the teacher's functions."""
        return self._logits(model, params, batch, {})

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """See `SequenceClassification` and `Teacher.taught`."""
        if LOGITS not in batch:
            return super().terms(model, params, batch, rngs)
        logits_BC = self._logits(model, params, batch, rngs)
        own = self.label_terms(logits_BC, batch)
        return self.taught(own, logits_BC, batch[LOGITS], batch["weights"])
