"""Write constraints.txt: what pip picks today for '.[dev,docs]' on each of the Pythons given.

    python .ci/pin_constraints.py python3.11 python3.12 > constraints.txt

The first interpreter stands for every Python below the second's version, the second for its own
version and later. Nothing is installed: pip resolves and reports.
"""

from __future__ import annotations

import json
import subprocess
import sys

HEADER = """\
# The exact versions the suite passes on: pip install -c constraints.txt -e '.[dev]'
# Written by `make constraints`; do not edit by hand.
"""


def resolve(python: str) -> dict[str, str]:
    """Name -> version of all that ``.[dev,docs]`` needs on this interpreter, ourselves left out."""
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
    report = subprocess.run(
        [*command, "--report", "-", ".[dev,docs]"], check=True, stdout=subprocess.PIPE, text=True
    )
    packages = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    return {p["name"]: p["version"] for p in packages if p["name"] != "flax_transformers"}


def version_of(python: str) -> str:
    """Such as "3.12"."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [python, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def main(older: str, newer: str) -> None:
    """Print the merged list, a marker behind each line that is not the same for both."""
    old, new, split = resolve(older), resolve(newer), version_of(newer)
    print(HEADER, end="")
    for name in sorted(old | new, key=str.lower):
        if old.get(name) == new.get(name):
            print(f"{name}=={old[name]}")
            continue
        if name in old:
            print(f'{name}=={old[name]} ; python_version < "{split}"')
        if name in new:
            print(f'{name}=={new[name]} ; python_version >= "{split}"')


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python .ci/pin_constraints.py OLDER_PYTHON NEWER_PYTHON")
    main(sys.argv[1], sys.argv[2])
