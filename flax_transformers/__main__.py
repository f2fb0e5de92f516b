"""``python -m flax_transformers`` is the command ``flax-transformers``."""

import sys

from flax_transformers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
