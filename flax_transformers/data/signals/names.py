"""Names of modalities."""

from __future__ import annotations

from flax_transformers.ranges import OutOfRange, shown

RESERVED = ("label", "labels", "label_weights", "weights", "mask_keys", "example_id")
"""Names that examples and batches have for other arrays."""


def check_modality(name: str, setting: str) -> None:
    """Raise OutOfRange if ``name``, the value of ``setting``, cannot be that of a modality: it is
    a key of batches and a part of the names of parameters and metrics."""
    if not name.isidentifier() or name in RESERVED:
        raise OutOfRange(
            f"{setting} is {shown(name)}; it must have only letters, digits and underscores, not "
            f"begin with a digit, and be none of {', '.join(RESERVED)}"
        )
