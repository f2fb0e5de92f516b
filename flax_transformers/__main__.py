"""``python -m flax_transformers`` is the command ``flax-transformers``."""

import sys

from flax_transformers.cli.main import program

if __name__ == "__main__":
    sys.exit(program())
