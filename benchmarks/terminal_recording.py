"""Record commands in a terminal, and draw the recording as an animated SVG (docs/demo.svg).

    python benchmarks/terminal_recording.py record docs/demo.jsonl 'COMMAND' 'COMMAND' ...
    python benchmarks/terminal_recording.py draw docs/demo.jsonl docs/demo.svg

The recording has one line for each line of output, with the seconds since the start. The picture
plays it in SECONDS, waits of a minute as well as of a second, in the order and in the proportions
in which the lines came; nothing is left out or changed but what is longer than COLUMNS.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

COLUMNS, ROWS = 112, 24
SECONDS, HOLD = 24.0, 6.0
"""Seconds of the recording in the picture, and of its last state before it starts again."""
_WIDTH, _HEIGHT, _SIZE = 7.25, 17, 12  # of a character, of a line, of the font, in pixels
_MARGIN, _BAR = 14, 30
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(target: Path, commands: list[str]) -> None:
    """Run the commands one after another; what they print is shown here, too."""
    start, lines = time.monotonic(), []

    def add(text: str, kind: str) -> None:
        lines.append({"at": round(time.monotonic() - start, 2), "kind": kind, "text": text})
        print(text, flush=True)

    for command in commands:
        add(f"$ {command}", "command")
        process = subprocess.Popen(
            command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        for line in process.stdout:
            add(_ESCAPES.sub("", line.rstrip("\n")), "output")
        if process.wait():
            sys.exit(f"{command} ended with {process.returncode}")
    target.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def shown_at(times: list[float]) -> list[float]:
    """When lines appear in the picture, in seconds: waits grow with the root of the real ones."""
    waits = [max(0.0, after - before) ** 0.5 for before, after in itertools.pairwise(times)]
    scale, at, shown = SECONDS / (sum(waits) or 1.0), 0.5, [0.5]
    for wait in waits:
        at += wait * scale
        shown.append(round(at, 2))
    return shown


def draw(lines: list[dict]) -> str:
    """The SVG of a recording: lines appear in turn, and the screen scrolls."""
    shown = shown_at([line["at"] for line in lines])
    total = shown[-1] + HOLD
    width, height = COLUMNS * _WIDTH + 2 * _MARGIN, ROWS * _HEIGHT + _BAR + 2 * _MARGIN
    styles, texts, scrolls = [], [], ["0%{transform:translateY(0)}"]
    for number, (line, at) in enumerate(zip(lines, shown, strict=True)):
        percent = 100 * at / total
        styles.append(
            f"@keyframes l{number}{{0%{{opacity:0}}{percent:.2f}%{{opacity:1}}100%{{opacity:1}}}}"
            f"#l{number}{{animation:l{number} {total:.1f}s step-end infinite}}"
        )
        text = html.escape(line["text"][:COLUMNS])
        texts.append(
            f'<text id="l{number}" class="{line["kind"]}" x="{_MARGIN}" '
            f'y="{_BAR + _MARGIN + (number + 0.75) * _HEIGHT:.1f}">{text}</text>'
        )
        if number >= ROWS:
            up = (number - ROWS + 1) * _HEIGHT
            scrolls.append(f"{percent:.2f}%{{transform:translateY(-{up}px)}}")
    last = max(0, len(lines) - ROWS) * _HEIGHT
    scrolls.append(f"100%{{transform:translateY(-{last}px)}}")
    style = (
        f"text{{font:{_SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
        "white-space:pre;fill:#d0d4dc}.command{fill:#8fd18b;font-weight:bold}"
        f"@keyframes scroll{{{''.join(scrolls)}}}"
        f"#screen{{animation:scroll {total:.1f}s step-end infinite}}{''.join(styles)}"
        "@media (prefers-reduced-motion:reduce){text,#screen{animation:none!important}"
        f"#screen{{transform:translateY(-{last}px)}}}}"
    )
    dots = "".join(
        f'<circle cx="{18 + 18 * n}" cy="16" r="5.5" fill="{color}"/>'
        for n, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" role="img"><title>A terminal: a small model is '
        f"trained, and fills in a masked word</title><style>{style}</style>"
        f'<clipPath id="c"><rect y="{_BAR}" width="{width:.0f}" height="{height - _BAR}"/>'
        f'</clipPath><rect width="{width:.0f}" height="{height}" rx="8" fill="#1b1f27"/>{dots}'
        f'<g clip-path="url(#c)"><g id="screen">{"".join(texts)}</g></g></svg>\n'
    )


def main(arguments: list[str]) -> None:
    match arguments:
        case ["record", target, *commands] if commands:
            record(Path(target), commands)
        case ["draw", source, target]:
            lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
            Path(target).write_text(draw(lines))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
