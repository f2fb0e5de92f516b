"""Notes of the other models that a run depends on, in its folder."""

from __future__ import annotations

import json
import logging
from typing import Any

import jax
from etils import epath

from flax_transformers.checkpointing.step_directories import has_checkpoint
from flax_transformers.errors import UserError
from flax_transformers.storage.workdir import read_side_file, write_side_file

log = logging.getLogger(__name__)


def note_weights(workdir: epath.Path, kind: str, path: str, fingerprint: str | None) -> None:
    """Notes a model of a run in ``KIND.json``, or compares it with the one noted at its start.

    ``kind``: what it is to the run, such as "reference". ``fingerprint``: hash of its weights; None
    if they are no longer there. Raises UserError for other weights. A run of an earlier version,
    without the note, gets it now.
    """
    file = workdir / f"{kind}.json"
    noted = _noted(file, kind) if has_checkpoint(workdir) else {}
    if noted:
        if fingerprint not in (None, noted.get("weights")):
            raise UserError(
                f"the {kind} model {path} has other weights than when the run in {workdir} "
                "began; restore them, or choose another --workdir"
            )
    elif jax.process_index() == 0:
        write_side_file(file, json.dumps({"path": path, "weights": fingerprint}, indent=2) + "\n")


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
