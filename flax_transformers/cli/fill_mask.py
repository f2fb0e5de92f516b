"""``flax-transformers fill-mask``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from flax_transformers.cli.parsing import Architecture, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import ENTRIES

_MAX_LENGTH = 8192
"""Largest number of tokens of a text if the model has no limit."""


@dataclass(frozen=True)
class FillMask:
    """Show the most likely tokens for each [MASK] of a text.

    --mesh.tensor 4 (also --mesh.fsdp) shards the model; --compute.dtype and its neighbours set how
    it is computed.
    """

    model: Model
    text: Annotated[str, option("TEXT")]
    """A text such as "Return a [MASK] object." """
    architecture: Architecture = None
    top: Annotated[int, number("--top", ENTRIES)] = 5
    """Number of candidates for each mask."""

    def run(self, overrides: Sequence[str]) -> int:
        import jax

        from flax_transformers import runtime
        from flax_transformers.generation.fill_mask import fill_mask
        from flax_transformers.parallel.mesh import make_mesh
        from flax_transformers.parallel.watchdog import watchdog
        from flax_transformers.training.step import model_functions

        placed = override(runtime.Placed(), overrides)
        runtime.start(None)
        watchdog.start(placed.limits)
        with watchdog.phase("restore"):
            restored = runtime.restored_model(
                self.model, make_mesh(placed.mesh), placed.compute, self.architecture
            )
        if restored.tokenizer is None:
            raise UserError(f"{self.model} has no tokenizer; give a model of text")
        if not hasattr(restored.model, "unembed"):
            raise UserError(
                f"{self.model} holds a {restored.model_config.architecture}, which predicts no "
                "tokens; give a model with a language-modelling head"
            )
        with jax.set_mesh(restored.mesh), watchdog.phase("evaluation"):
            filled = fill_mask(
                model_functions(restored.model),
                restored.params,
                restored.tokenizer,
                self.text,
                top=self.top,
                vocab_size=getattr(restored.model_config, "vocab_size", None),
                pad_id=getattr(restored.model_config, "pad_id", -1),
                max_length=getattr(restored.model_config, "max_positions", None) or _MAX_LENGTH,
            )
        for index, one in enumerate(filled.masked, 1):
            if len(filled.masked) > 1:
                print(f"mask {index}")
            for token, probability in one.candidates:
                print(f"{100 * probability:6.2f} %  {token}")
        return 0
