"""Notes of the other models that a run depends on, in its folder."""

from __future__ import annotations

import json
import logging
from typing import Any, Protocol

import jax
from etils import epath

from flax_transformers.checkpointing.step_directories import has_checkpoint
from flax_transformers.errors import UserError
from flax_transformers.parallel.distributed import raise_together
from flax_transformers.storage.workdir import read_side_file, write_side_file

log = logging.getLogger(__name__)


class Weights(Protocol):
    """The weights of a model, as this process sees them."""

    def fingerprint(self) -> str | None:
        """Hash of them; None if they are no longer there."""

    def earlier_fingerprint(self) -> str | None:
        """The hash that earlier versions noted."""


def note_weights(workdir: epath.Path, kind: str, path: str, weights: Weights) -> None:
    """Notes a model of a run in ``KIND.json``, or compares it with the one noted at its start.

    ``kind``: what it is to the run, such as "reference". Raises UserError, in all processes, if one
    of them has other weights. A run of an earlier version gets the note, or its new hash, now.
    """
    file, found = workdir / f"{kind}.json", weights.fingerprint()
    noted = _noted(file, kind) if has_checkpoint(workdir) else {}
    known, fault = noted.get("weights"), None
    differs = found is not None and known != found
    if noted and differs and known not in (None, weights.earlier_fingerprint()):
        fault = UserError(
            f"the {kind} model {path} has other weights than when the run in {workdir} "
            "began; restore them, or choose another --workdir"
        )
    raise_together(fault, f"found other weights of the {kind} model than when the run began")
    if jax.process_index() == 0 and (not noted or differs):
        write_side_file(file, json.dumps({"path": path, "weights": found}, indent=2) + "\n")


def _noted(file: epath.Path, kind: str) -> dict[str, Any]:
    """What a run noted; empty, with a warning, if the file is damaged."""
    text = read_side_file(file)
    try:
        noted = json.loads(text or "{}")
        if isinstance(noted, dict):
            return noted
    except ValueError:
        pass
    log.warning("%s is damaged; which %s the run began with is not known", file, kind)
    return {}
