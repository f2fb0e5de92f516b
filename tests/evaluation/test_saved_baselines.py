"""Baselines of a run: kept in its workdir, and computed for each component of a mixture."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.evaluation import saved_baselines
from flax_transformers.evaluation.saved_baselines import BASELINES, baselines_of_run, keep_baselines
from flax_transformers.evaluation.tasks import baselines, evaluators
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import Phase


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A config, its data, its workdir, and a list that grows with each computation."""
    write_corpus(tmp_path / "text.txt", 40)
    data = TextData(
        source=TextSource(str(tmp_path / "text.txt")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.2,
        shards=1,
        store=str(tmp_path / "store"),
    )
    config = tiny_config("text.txt", "store", objective=MaskedLM())
    config = dataclasses.replace(config, data=data)
    computed = []
    monkeypatch.setattr(
        saved_baselines, "baselines", lambda *both: computed.append(both) or baselines(*both)
    )
    return config, prepare(data), epath.Path(tmp_path / "run"), computed


def test_a_restart_reads_the_saved_baselines(run):
    config, prepared, workdir, computed = run
    first = baselines_of_run(config, prepared, workdir)
    assert [one.name for one in first] == ["unigram cross-entropy"]
    longer = dataclasses.replace(config, phases=(dataclasses.replace(config.phases[0], steps=99),))
    assert baselines_of_run(longer, prepared, workdir) == first
    assert len(computed) == 1


@pytest.mark.parametrize(
    "changes", [{"seed": 7}, {"objective": MaskedLM(mask_share=0.4)}], ids=["seed", "objective"]
)
def test_baselines_of_another_run_are_not_used_and_only_replaced_by_keep_baselines(run, changes):
    config, prepared, workdir, computed = run
    baselines_of_run(config, prepared, workdir)
    kept = (workdir / BASELINES).read_text()
    other = dataclasses.replace(config, **changes)
    found = baselines_of_run(other, prepared, workdir)
    assert len(computed) == 2
    assert (workdir / BASELINES).read_text() == kept
    keep_baselines(other, prepared, workdir, found)
    assert baselines_of_run(other, prepared, workdir) == found
    assert len(computed) == 2


@pytest.mark.parametrize("text", ["", "[{}]", '[{"name": 3}]', "3", "null"])
def test_a_damaged_file_is_computed_again(run, text):
    config, prepared, workdir, computed = run
    workdir.mkdir()
    (workdir / BASELINES).write_text(text)
    assert len(baselines_of_run(config, prepared, workdir)) == 1
    assert len(computed) == 1


def test_each_component_of_a_mixture_has_its_own_baselines_and_scores(tmp_path):
    for name, classes in (("de", "aab"), ("en", "bba")):
        for split, count in (("train", 12), ("test", 6)):
            rows = [
                json.dumps({"text": f"{name} words {n}", "label": classes[n % 3]})
                for n in range(count)
            ]
            (tmp_path / f"{name}_{split}.jsonl").write_text("\n".join(rows))
    data = MixedText(
        components=tuple(
            Component(
                name=name,
                source=LabelledSource(str(tmp_path / f"{name}_train.jsonl")),
                validation_source=LabelledSource(str(tmp_path / f"{name}_test.jsonl")),
            )
            for name in ("de", "en")
        ),
        tokenizer=TokenizerConfig("bytes"),
        store=str(tmp_path / "store"),
        shards=1,
    )
    prepared = prepare(data)
    config = tiny_config("text.txt", "store", objective=SequenceClassification())
    config = dataclasses.replace(config, data=data)
    found = {one.metric: one for one in baselines(config, prepared)}
    assert {metric: (one.score, one.count) for metric, one in found.items()} == {
        "eval/accuracy": (2 / 3, 12),
        "eval/accuracy_de": (2 / 3, 6),
        "eval/accuracy_en": (2 / 3, 6),
    }
    assert len(evaluators(config, prepared, None, None)) == 1  # also reads the classes of each

    def classify(name, params, rngs, hidden, ids, mask):
        return jnp.broadcast_to(jnp.array([1.0, 0.0]), (len(ids), 2))  # always "a"

    functions = ModelFunctions(
        hidden_states=lambda params, batch, rngs: HiddenStates(batch["input_ids"]),
        unembedding=None,
        head=classify,
    )
    mesh = make_mesh(MeshConfig(data=8))
    phase = Phase(1, 32, 8)
    (score,) = evaluators(config, prepared, None, None)
    with jax.set_mesh(mesh):
        scores = score(Snapshot(1, {}, phase, mesh, functions, None))
    assert scores["eval/accuracy"] == pytest.approx(6 / 12)
    for name, share in (("de", 4 / 6), ("en", 2 / 6)):
        assert scores[f"eval/accuracy_{name}"] == pytest.approx(share)
        assert scores[f"eval/macro_f1_{name}"] == pytest.approx(share / (share + 1))
