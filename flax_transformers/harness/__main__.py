"""The command of lm_eval with one more model: ``python -m flax_transformers.harness run --model
flax_transformers --model_args pretrained=runs/x --tasks ...``."""

from lm_eval.__main__ import cli_evaluate

import flax_transformers.harness.model  # noqa: F401 (registers the model)

if __name__ == "__main__":
    cli_evaluate()
