"""One table of all speed measurements: this package beside what people use otherwise.

    python benchmarks/performance.py --torch-python PYTHON --folder results/ > table.md

runs ``step_time.py``, ``end_to_end.py`` and ``decoding.py``, each with its own table and JSON file
in ``--folder``, and prints one table of all three. A measurement whose JSON file is there is not
run again, so that an interrupted command can be repeated. Nothing else should run on the machine
meanwhile. Options of a script follow its name:
``--step-time "--models bert-base --steps 6"``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = ("scanned", "unrolled")
HEADINGS = (
    "what", "ours (least to most)", "the other (least to most)", "speed of ours / of the other",
)  # fmt: skip
TRAINERS = {"lines": "one padded paragraph per sequence", "blocks": "joined paragraphs"}
GENERATORS = {"gpt2": ("GPT-2 small", "prompt"), "t5": ("T5 small", "source")}


def main() -> None:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = {name: options.folder / f"{name}.json" for name in ("step_time", "end_to_end")}
    files["decoding"] = options.folder / "decoding.jsonl"
    for name, file in files.items():
        if not file.exists():
            flag = "--output" if name == "decoding" else "--json"
            partial = file.with_name(f"{file.name}.part")
            arguments = ["--torch-python", options.torch_python, flag, str(partial)]
            extra = shlex.split(getattr(options, name))
            command = [sys.executable, str(HERE / f"{name}.py"), *arguments, *extra]
            with (options.folder / f"{name}.md").open("w") as table:
                subprocess.run(command, check=True, stdout=table)
            partial.rename(file)
    steps, runs = (json.loads(files[name].read_text()) for name in ("step_time", "end_to_end"))
    cases = [json.loads(line) for line in files["decoding"].read_text().splitlines()]
    lines = [
        *step_lines(steps["rows"]),
        *end_to_end_lines(runs["runs"]),
        *decoding_lines(cases),
    ]
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    print("\n".join(lines))
    parts = {"Steps": steps["about"], "Runs": runs["about"], "Generation": cases[0]["about"]}
    for part, about in parts.items():
        print(f"\n{part}: {', '.join(f'{name} {value}' for name, value in about.items())}.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--folder", type=Path, required=True, help="for the measurements")
    for name in ("step-time", "end-to-end", "decoding"):
        parser.add_argument(f"--{name}", default="", metavar="OPTIONS", help=f"of {name}")
    return parser.parse_args()


def step_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Seconds of a training step, of the faster variant of each side."""
    lines = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        of = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        ours, theirs = (
            min(
                (row for row in of if (row["variant"] in OURS) == side),
                key=lambda row: statistics.median(row["seconds"]),
            )
            for side in (True, False)
        )
        what = f"training step, {model}, {dtype}, {of[0]['count']:,} {of[0]['unit']}"
        named = theirs["variant"].replace("-", ".")
        lines.append(_line(what, ours["seconds"], theirs["seconds"], " s", named, faster_is="less"))
    return lines


def end_to_end_lines(runs: list[dict[str, Any]]) -> list[str]:
    """Useful tokens per second of whole runs, beside each variant of Hugging Face's Trainer."""
    rates = {
        variant: [run["rate"] for run in runs if run["variant"] == variant]
        for variant in dict.fromkeys(run["variant"] for run in runs)
    }
    ours = rates.pop("ours")
    what = "useful tokens/s of a run, masked LM"
    return [
        _line(what, ours, theirs, "", f"Trainer, {TRAINERS.get(name, name)}", faster_is="more")
        for name, theirs in rates.items()
    ]


def decoding_lines(cases: list[dict[str, Any]]) -> list[str]:
    """Seconds of a call that generates text, float32."""
    return [
        _line(
            f"128 new tokens, {_decoded(case['case'])}",
            *(case["seconds"][side] for side in ("ours", "transformers")),
            " s",
            "generate",
            faster_is="less",
        )
        for case in cases
    ]


def _decoded(case: str) -> str:
    """A case of ``decoding.py`` in words: "t5-b8-beam4" is T5 small, 8 sources, 4 beams."""
    model, batch, how = case.split("-")
    name, unit = GENERATORS[model]
    number = batch.removeprefix("b")
    beams = how.removeprefix("beam")
    inputs = f"{number} {unit}{'' if number == '1' else 's'}"
    return f"{name}, {inputs}, {how if how == beams else f'{beams} beams'}"


def _line(
    what: str, ours: list[float], theirs: list[float], unit: str, named: str, *, faster_is: str
) -> str:
    """One row; the last cell is the ratio of medians, above 1 where ours is faster."""
    ratio = statistics.median(theirs) / statistics.median(ours)
    ratio = 1 / ratio if faster_is == "more" else ratio
    cells = [what, _spread(ours, unit), f"{named}: {_spread(theirs, unit)}", f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], unit: str) -> str:
    """The median, the least and the most."""
    digits = 0 if max(values) >= 100 else 2
    middle, least, most = (
        f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle}{unit} ({least} to {most})"


if __name__ == "__main__":
    main()
