"""The shapes of a phase's batches, without any data.

An objective returns arrays of fixed shapes for any example: here it prepares a dummy example, and
the shapes are those of the result.
"""

from __future__ import annotations

import jax
import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.training.config import AnyPhase, TrainConfig

Arrays = dict[str, np.ndarray]

_SPECIALS = 7


def abstract_batch(config: TrainConfig, phase: AnyPhase) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes [batch_size, ...] and dtypes of the arrays that a training step is given.

    Raises UserError where the objective finds fault with the config.
    """
    row, added = dummy_row(config, phase), getattr(config.objective, "added_arrays", None)
    if added is not None:  # to each batch, as the logits of a teacher are
        row = row | added(config.model)
    return {
        name: jax.ShapeDtypeStruct((phase.batch_size, *array.shape), array.dtype)
        for name, array in row.items()
    }


def dummy_row(config: TrainConfig, phase: AnyPhase, vocabulary: Vocabulary | None = None) -> Arrays:
    """What the objective makes of a made-up example, with the ids of ``vocabulary`` or of one that
    has every kind of token. Raises UserError as ``abstract_batch`` does, and where the vocabulary
    lacks a token that the objective needs."""
    spec = config.objective.window_spec(phase.sequence_length)
    if spec.length < 1:
        raise UserError(
            f"phases.sequence_length is {phase.sequence_length}, but the special tokens of "
            f"{type(config.objective).__name__} take {phase.sequence_length - spec.length}; use "
            "longer sequences"
        )
    vocabulary = vocabulary or _vocabulary(config, phase)
    example = config.data.dummy_example(spec, _ordinary_id(vocabulary))
    if config.data.has_prepared_rows:
        return example
    rng = np.random.default_rng(0)
    return config.objective.prepare(example, rng, vocabulary, phase.sequence_length)


def _ordinary_id(vocabulary: Vocabulary) -> int:
    """The first id of an ordinary token, in the vocabulary of the targets too if there is one."""
    special = {*vocabulary.special_ids, *vocabulary.of_targets.special_ids}
    size = min(vocabulary.size, vocabulary.of_targets.size)
    return next((i for i in range(size) if i not in special), 0)


def _vocabulary(config: TrainConfig, phase: AnyPhase) -> Vocabulary:
    """One that has every kind of token, and sentinels for any number of spans. Roles share the last
    id if the model has fewer ids than roles."""
    size = getattr(config.model, "vocab_size", _SPECIALS)
    pad, unk, cls, sep, mask, bos, eos = (min(i, size - 1) for i in range(_SPECIALS))
    return Vocabulary(
        size=size,
        pad_id=pad,
        unk_id=unk,
        cls_id=cls,
        sep_id=sep,
        mask_id=mask,
        bos_id=bos,
        eos_id=eos,
        special_ids=tuple(range(min(_SPECIALS, size))),
        sentinel_ids=(size - 1,) * phase.sequence_length,
        word_start=np.ones(size, bool),
    )
