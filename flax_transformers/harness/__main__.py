"""The command of lm_eval with one more model: ``python -m flax_transformers.harness run --model
flax_transformers --model_args pretrained=runs/x --tasks ...``."""

import sys

from lm_eval.__main__ import cli_evaluate

import flax_transformers.harness.model  # noqa: F401 (registers the model)
from flax_transformers.errors import UserError


def evaluate() -> int:
    """The exit code: 2 for a UserError, which is one line on stderr."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"flax-transformers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(evaluate())
