"""The table of all speed measurements, from files as the benchmarks write them."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/performance.py"


def test_the_table_has_the_ratio_of_medians_above_one_where_ours_is_faster(tmp_path):
    step = {"model": "bert-base", "dtype": "float32", "count": 1024, "unit": "tokens"}
    seconds = {
        "unrolled": [2.0, 2.0, 9.0],
        "scanned": [3.0],
        "torch": [4.0],
        "torch-compile": [3.0],
    }
    rows = [step | {"variant": name, "seconds": of} for name, of in seconds.items()]
    runs = [{"variant": name, "rate": rate} for name, rate in (("ours", 300.0), ("lines", 150.0))]
    case = {"case": "t5-b1-greedy", "seconds": {"ours": [1.0], "transformers": [0.5]}}
    about = {"date": "2026-01-01", "commit": "abc"}
    written = {"about": about, "rows": rows}
    (tmp_path / "step_time.json").write_text(json.dumps(written))
    (tmp_path / "end_to_end.json").write_text(json.dumps({"about": about, "runs": runs}))
    (tmp_path / "decoding.jsonl").write_text(json.dumps(case | {"about": about}) + "\n")
    command = [sys.executable, SCRIPT, "--folder", tmp_path]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[2][1:] == [
        "2.00 s (2.00 to 9.00)",
        "torch.compile: 3.00 s (3.00 to 3.00)",
        "1.50",
    ]
    assert [line[3] for line in lines[3:5]] == ["2.00", "0.50"]
    assert table.count(": date 2026-01-01, commit abc.\n") == 3
