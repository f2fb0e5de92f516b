"""Show what a checkpoint puts in the gaps of a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flax_transformers.cli.shared_arguments import MODEL_HELP, add_architecture
from flax_transformers.ranges import ENTRIES, argument

_LONGEST = 8192
"""Tokens of a text where the model sets no limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=MODEL_HELP)
    add_architecture(parser, "CKPT", "BertForMaskedLM")
    parser.add_argument("--text", required=True, help='for example "Return a [MASK] object."')
    parser.add_argument(
        "--top", type=argument("--top", ENTRIES), default=5, help="how many candidates a gap"
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from flax_transformers import runtime
    from flax_transformers.cli.config_file import refuse
    from flax_transformers.errors import UserError
    from flax_transformers.generation.fill_mask import fill_mask
    from flax_transformers.training.step import model_functions

    refuse(overrides)
    runtime.start(None)
    restored = runtime.restored_model(arguments.checkpoint, architecture=arguments.architecture)
    if restored.tokenizer is None:
        raise UserError(
            f"{arguments.checkpoint} has no tokenizer, so there are no words to fill in; give a "
            "checkpoint of a model of text"
        )
    if not hasattr(restored.model, "unembed"):
        raise UserError(
            f"{arguments.checkpoint} holds a {restored.model_config.architecture}, which has no "
            "words to offer; use a model with a language-modelling head"
        )
    with jax.set_mesh(restored.mesh):
        filled = fill_mask(
            model_functions(restored.model),
            restored.params,
            restored.tokenizer,
            arguments.text,
            top=arguments.top,
            vocab_size=getattr(restored.model_config, "vocab_size", None),
            max_length=getattr(restored.model_config, "max_positions", None) or _LONGEST,
        )
    for number, gap in enumerate(filled.gaps, 1):
        if len(filled.gaps) > 1:
            print(f"gap {number}")
        for piece, probability in gap.candidates:
            print(f"{100 * probability:6.2f} %  {piece}")
    return 0
