"""``flax-transformers fill-mask``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from flax_transformers.cli.parsing import Architecture, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import ENTRIES

if TYPE_CHECKING:
    from flax_transformers.data.tokenizers.load import Tokenizer
    from flax_transformers.runtime import Described

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
        mesh = make_mesh(placed.mesh)
        with watchdog.phase("restore"):
            described = runtime.described_model(self.model, self.architecture)
            tokenizer, limits = self._checked(described)
            restored = runtime.restored_model(described, mesh, placed.compute)
        with jax.set_mesh(restored.mesh), watchdog.phase("evaluation"):
            filled = fill_mask(
                model_functions(restored.model),
                restored.params,
                tokenizer,
                self.text,
                top=self.top,
                pad_id=getattr(restored.model_config, "pad_id", -1),
                **limits,
            )
        for index, one in enumerate(filled.masked, 1):
            if len(filled.masked) > 1:
                print(f"mask {index}")
            for token, probability in one.candidates:
                print(f"{100 * probability:6.2f} %  {token}")
        return 0

    def _checked(self, described: Described) -> tuple[Tokenizer, dict[str, int]]:
        """The tokenizer, and the limits of the model. Raises UserError, before any weights are
        read, for a model that fills no masks and a text that it cannot read."""
        from flax_transformers.generation.fill_mask import masked_prompt, require_filler
        from flax_transformers.huggingface.family import build_model
        from flax_transformers.models.config import ComputeConfig, TextConfig

        config, tokenizer = described.model, described.tokenizer
        if tokenizer is None or not isinstance(config, TextConfig):
            raise UserError(f"{self.model} has no tokenizer; give a model of text")
        require_filler(build_model(config, ComputeConfig()), self.model)
        limits = {
            "vocab_size": config.vocab_size,
            "max_length": config.max_positions or _MAX_LENGTH,
        }
        masked_prompt(tokenizer, self.text, **limits)
        return tokenizer, limits
