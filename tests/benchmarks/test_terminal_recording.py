"""The animated picture of a recorded terminal."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

from benchmarks.terminal_recording import COLUMNS, ROWS, SECONDS, draw, record, shown_at


def test_a_recording_is_drawn_with_all_its_lines_in_order(tmp_path):
    record(tmp_path / "r.jsonl", ["printf '<a> & b\\n\\033[1mbold\\033[0m\\n'", "echo done"])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    texts = [line["text"] for line in lines if line["kind"] == "output"]
    assert texts == ["<a> & b", "bold", "done"]
    drawn = [node.text for node in ET.fromstring(draw(lines)).iter() if node.tag.endswith("text")]
    assert drawn == [line["text"][:COLUMNS] for line in lines]


def test_longer_waits_stay_longer_and_the_screen_scrolls_past_its_rows():
    shown = shown_at([0.0, 1.0, 101.0])
    assert shown[0] < shown[1] < shown[2] and shown[2] - shown[1] > shown[1] - shown[0]
    assert shown[2] - shown[0] == SECONDS
    lines = [{"at": float(n), "kind": "output", "text": str(n)} for n in range(ROWS + 3)]
    assert len(set(re.findall(r"translateY\(-(\d+)px\)", draw(lines)))) == 3
    assert "translateY(-" not in draw(lines[:ROWS]).replace("translateY(-0px)", "")
