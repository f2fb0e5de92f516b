"""What a run prints at its end."""

from __future__ import annotations

from etils import epath

from flax_transformers.evaluation import report
from flax_transformers.training.loop import Outcome


def test_a_metric_of_the_users_own_is_no_component_of_a_mixture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flax_transformers.monitoring.plots.plot_metrics", lambda *given: None)
    own = {"train/examples_long": 0.5, "train/examples_de": 40.0, "train/tokens_de": 900.0}
    metrics = own | {"train/epochs_de": 0.25, "train/loss": 3.0}
    report.report_results(epath.Path(tmp_path), Outcome(2, False, metrics), [])
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "de: 40 examples, 900 tokens, 0.25 epochs"
    assert not any("long" in line for line in others)
