"""The page of ``flax-transformers report``, as text and in a browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli import report
from flax_transformers.cli.main import main
from flax_transformers.reporting.attention_charts import AttentionMaps
from flax_transformers.reporting.charts import (
    Line,
    Reference,
    line_chart,
    short_number,
    thinned,
    ticks,
)
from flax_transformers.reporting.runs import read
from flax_transformers.testing import tiny_config, write_corpus

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000"
    "008200817cd2b4d60000000049454e44ae426082"
)


def write_run(folder, rate, losses):
    (folder / "samples").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    config = {"seed": 0, "optimizer": {"learning_rate": rate}, "phases": [{"steps": 30}]}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [  # the last one is of step 30, of which there are files
        {
            "step": 30 - 10 * (len(losses) - 1 - n),
            "train/loss": loss,
            "eval/loss": loss + 1,
            "perf/mfu": 0.5,
        }
        | {"optimizer/skipped_steps": 0}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    baselines = [{"name": "unigram", "metric": "eval/loss", "score": 6.5}]
    (folder / "baselines.json").write_text(json.dumps(baselines))
    for step in (10, 30):
        (folder / "samples" / f"step_{step:08d}.txt").write_text(f"<b>step {step}</b> & more\n")
    (folder / "samples" / "step_00000030.png").write_bytes(PNG)
    (folder / "evaluation" / "step_00000030.classes.txt").write_text("   f1\na 0.5\n")
    (folder / "evaluation" / "step_00000030.confusion.png").write_bytes(PNG)


def with_maps(run):
    """A run with attention of a text in many heads, and of an image."""
    names = tuple(f"<{i}>long_token" for i in range(20))
    text = AttentionMaps("text", np.full((2, 16, 20, 20), 0.05), (0, 5), names, names)
    image = AttentionMaps("image", np.ones((2, 16, 3, 4)), (0, 5), picture=np.ones((6, 8, 1)))
    return replace(run, attention=[text, image], attention_note="step 7")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The file of a report on two runs and a sweep."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "a run", 0.1, [5.0, 4.0, 3.0])
    write_run(folder / "other", 0.2, [5.5, math.nan, 2.5])
    (folder / "sweep").mkdir()
    records = [{"rank": 1, "point": "x" * 60, "median": 0.25, "values": {"0": 0.25}, "sd": None}]
    (folder / "sweep" / "table.jsonl").write_text(json.dumps(records[0]) + "\n")
    (folder / "sweep" / "plot.png").write_bytes(PNG)
    output = folder / "report.html"
    runs = [str(folder / name) for name in ("a run", "other", "sweep")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_with_attention", with_maps)
        assert main(["report", *runs, "--output", str(output), "--attention"]) == 0
    return output


class Elements(html.parser.HTMLParser):
    """Checks that tags are closed in order, and keeps texts by tag and the values of sources."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources = [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_has_all_parts_and_needs_no_other_file(page):
    text = page.read_text()
    found = Elements(text)
    assert found.texts["h2"] == [
        "Runs", "Held-out scores", "Training", "Throughput", "Differences of the configs",
        "Samples", "Pictures", "Classes", "Attention", "Sweep sweep",
    ]  # fmt: skip
    assert len(found.sources) == 5  # a reconstruction and a confusion matrix each, and the plot
    assert all(one.startswith("data:image/png;base64,") for one in found.sources)
    assert "http" not in text and "<script" not in text
    ids = re.findall(r'id="(.*?)"', text)
    assert len(set(ids)) == len(ids) and set(re.findall(r'href="#(.*?)"', text)) == set(ids)


def test_the_page_has_the_curves_of_rollouts(tmp_path):
    write_run(tmp_path / "run", 0.1, [5.0])
    rows = [{"step": step, "rollout/reward": step / 10} for step in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h3>rollout/reward</h3>" in text and "Rollouts" in Elements(text).texts["h2"]


def test_runs_share_a_chart_with_their_baseline_once(page):
    chart = re.search(r'aria-label="eval/loss".*?</svg></svg>', page.read_text()).group()
    assert re.findall(r"<title>(.*?)</title>", chart) == [
        "eval/loss", "a run, last 4", "other, last 3.5",
    ]  # fmt: skip
    assert chart.count('class="reference"') == 1 and "unigram 6.5" in chart
    first, second = re.findall(r'<path d="(.*?)"', chart)
    assert first.count("M") == 1 and first.count("L") == 2
    assert second.count("M") == 2  # not a number: a gap


def test_only_what_differs_is_among_the_differences(page):
    rows = Elements(page.read_text()).texts["td"]
    place = rows.index("optimizer.learning_rate")
    assert rows[place : place + 3] == ["optimizer.learning_rate", "0.1", "0.2"]
    assert "seed" not in rows and "phases.0.steps" not in rows


def test_texts_are_those_of_the_newest_step_and_no_markup(page):
    text = page.read_text()
    assert text.count("&lt;b&gt;step 30&lt;/b&gt; &amp; more") == 2
    assert "step 10" not in text
    assert '<pre class="table" tabindex="0">   f1\na 0.5</pre>' in text


def test_evaluation_sets_and_components_have_their_name_in_the_title(tmp_path):
    write_run(tmp_path / "run", 0.1, [4.0, 3.0])
    folder = tmp_path / "run" / "evaluation"
    for name in ("step_00000030.cs", "step_00000030.a.b", "step_00000010", "best", "step_x"):
        (folder / f"{name}.classes.txt").write_text(f"of {name}\n")
        (folder / f"{name}.confusion.png").write_bytes(PNG)
    ((run,), _) = read([tmp_path / "run"])
    assert [(one.title, one.content) for one in run.reports] == [
        ("step 30", "   f1\na 0.5"), ("step 30, a.b", "of step_00000030.a.b"),
        ("step 30, cs", "of step_00000030.cs"),
    ]  # fmt: skip
    matrices = [f"confusion matrix, step 30{part}" for part in ("", ", a.b", ", cs")]
    assert [one.title for one in run.pictures] == ["reconstructions, step 30", *matrices]
    assert run.samples.title == "step 30"
    # The run goes back to step 20 and has not come to step 30 again.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))
    ((run,), _) = read([tmp_path / "run"])
    assert (run.samples.title, [one.title for one in run.reports]) == ("step 10", ["step 10"])


def test_a_run_alone_has_its_whole_config(tmp_path, capsys):
    write_run(tmp_path / "run", 0.1, [2.0])
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "a.html")]) == 0
    rows = Elements((tmp_path / "a.html").read_text()).texts["td"]
    assert {"seed", "phases.0.steps", "30"} <= set(rows)


def test_a_run_whose_attention_fails_does_not_stop_the_report(tmp_path, monkeypatch):
    def fail(folder):
        raise ValueError("not enough values")

    write_run(tmp_path / "run", 0.1, [2.0])
    monkeypatch.setattr(report, "_newest_attention", fail)
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(output), "--attention"]) == 0
    note = "run: no attention maps, because of ValueError: not enough values"
    assert note in output.read_text()


def test_the_report_of_a_sweep_that_was_stopped_has_its_runs(tmp_path):
    sweep, output = tmp_path / "rates", tmp_path / "a.html"
    for rate, losses in ((0.1, [3.0, 2.0]), (0.2, [2.5])):
        write_run(sweep / f"rate={rate}", rate, losses)
        record = {"config": {}, "finished_step": 20 if len(losses) > 1 else None}
        (sweep / f"rate={rate}" / "sweep.json").write_text(json.dumps(record))
    runs = [f"rate={rate}" for rate in (0.1, 0.2, 0.3, 0.4)]
    (sweep / "sweep.json").write_text(json.dumps({"base": {}, "runs": runs}))
    named = [str(sweep), str(sweep / "rate=0.2")]  # one of them twice
    assert main(["report", *named, "--output", str(output)]) == 0
    text = output.read_text()
    assert "1 of 4 runs are finished." in text
    assert Elements(text).texts["h1"] == ["rates"]
    assert {"Held-out scores", "Samples", "Sweep rates"} <= set(Elements(text).texts["h2"])
    rows = Elements(text).texts["td"]
    place = rows.index("optimizer.learning_rate")
    assert rows[place : place + 3] == ["optimizer.learning_rate", "0.1", "0.2"]


@pytest.mark.slow
def test_the_attention_of_a_run_is_that_of_its_newest_checkpoint(
    tmp_path, one_device, compiled_once
):
    write_corpus(tmp_path / "corpus.txt")
    config = tiny_config(tmp_path / "corpus.txt", tmp_path / "store", steps=2)
    ft.train(config, tmp_path / "run")
    write_run(tmp_path / "other", 0.1, [2.0])
    output, runs = tmp_path / "report.html", [str(tmp_path / name) for name in ("run", "other")]
    assert main(["report", *runs, "--output", str(output), "--attention"]) == 0
    text = output.read_text()
    assert "run: step 2" in text and text.count("<figcaption>") == 2 * 4
    tokens = re.search(r'class="tokens">(.*?)</g>', text).group(1)
    assert tokens.count("[CLS]") == 2 and tokens.count("<text") == 2 * 20
    assert "other: no attention maps, because" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN"),
        (["nowhere"], "nowhere has none of metrics.jsonl, table.jsonl and"),
        (["nowhere", "nowhere"], "a run is given twice"),
    ],
)
def test_what_is_no_run_is_refused(arguments, message, capsys):
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ticks_are_round_and_numbers_short():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.42) == pytest.approx([0.2, 0.3, 0.4])
    assert [short_number(one) for one in (0, 8e-4, 0.0125, 1234.5, 85_000, 1.25e6)] == [
        "0", "0.0008", "0.0125", "1,234", "85k", "1.25M",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999_499, "999k"),
        (999_500, "1M"),
        (-999_999, "-1M"),
        (999_499_999, "999M"),
        (999_500_000, "1B"),
        (1.75e9, "1.75B"),
        (3e12, "3e+12"),
    ],
)
def test_large_numbers_have_a_unit_of_their_size(value, text):
    assert short_number(value) == text


def test_of_many_points_the_extremes_stay():
    values = [math.sin(n / 50) for n in range(5000)]
    values[1234], values[2345] = 9.0, -9.0
    kept = dict(thinned(Line("a", 0, range(5000), values)))
    assert len(kept) <= 302 and kept[1234] == 9.0 and kept[2345] == -9.0


def test_a_run_that_logs_rarely_is_within_the_chart_of_one_that_logs_often():
    often, rarely = Line("a", 0, range(600), [1.0] * 600), Line("b", 1, [0, 300], [3.0, 2.0])
    path = re.search(r'class="line c1">.*?<path d="([^"]+)"', line_chart("a", [often, rarely]))[1]
    assert min(float(point.split()[1]) for point in re.split("[ML]", path)[1:]) > 10  # the margin


def test_a_chart_without_numbers_is_left_out_and_names_are_escaped():
    assert line_chart("a", [Line("b", 0, [1], [math.nan])]) == ""
    assert "&lt;i&gt;" in line_chart("<i>", [Line("b", 0, [1], [2.0])], [Reference("c", 2.0)])


PROBE = """<script>
const style = name => getComputedStyle(document.querySelector(name));
const wide = [...document.querySelectorAll("body *")].filter(
  one => !one.closest(".wide, pre, svg") && one.getBoundingClientRect().right > innerWidth + 1);
document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth,
  wide: wide.length, back: style("body").backgroundColor, line: style(".line.c1 path").stroke,
  charts: [...document.querySelectorAll("svg.chart")].map(
    one => one.getBoundingClientRect().height),
  images: [...document.images].map(one => one.naturalWidth),
  maps: [...document.querySelectorAll("figure .maps, .wide > .maps")].map(
    one => one.getBoundingClientRect().height)});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)], ids=["wide", "narrow"])
def test_a_browser_shows_the_page_without_overflow(page, tmp_path, width, dark):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--host-resolver-rules=MAP * ~NOTFOUND", probed.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", shown).group(1))
    assert found["width"] <= width and found["scroll"] <= found["width"] and found["wide"] == 0
    assert min(found["charts"]) > 150 and set(found["images"]) == {1}
    assert len(found["maps"]) == 2 * (2 + 2 * 16) and min(found["maps"]) > 60
    assert found["back"] == ("rgb(20, 21, 23)" if dark else "rgb(251, 251, 250)")
    assert found["line"] == ("rgb(240, 153, 79)" if dark else "rgb(194, 90, 12)")


@pytest.mark.parametrize("name", ["config.json", "baselines.json"])
def test_a_damaged_file_of_a_run_is_named(name, tmp_path, capsys):
    write_run(tmp_path / "run", 0.1, [2.0])
    (tmp_path / "run" / name).write_text("{")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err


def test_runs_and_report_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", 0.1, [2.0])
    assert main(["report", "~/run", "--output", "~/a.html"]) == 0
    assert (tmp_path / "a.html").exists() and not (tmp_path / "~").exists()
