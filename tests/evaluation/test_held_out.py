"""Held-out scores: each example once, whatever the batch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_transformers as ft
from flax_transformers.data.dataset import prepare
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError
from flax_transformers.evaluation import held_out
from flax_transformers.evaluation.held_out import (
    Readers,
    evenly_spread,
    held_out_batches,
    held_out_evaluator,
)
from flax_transformers.evaluation.predictions import scored_prediction_step
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import LossTerms, ModelFunctions, ModelNeeds, WindowSpec
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_bert, tiny_config, write_corpus
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import Evaluation, Phase
from flax_transformers.training.step import (
    compile_evaluation_step,
    make_evaluation_step,
    model_functions,
)
from flax_transformers.training.trainer import Trainer

LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of each window: how many tokens it has, and how many of them are an "e"."""

    needs: ClassVar[ModelNeeds] = ModelNeeds()

    def predictions(self, sequence_length):
        return 0

    def example_views(self, row):
        return []

    def window_spec(self, sequence_length):
        return WindowSpec(sequence_length, cross_documents=False)

    def prepare(self, example, rng, vocab, sequence_length):
        tokens = example["tokens"]
        # A share of the tokens is drawn, as masks are: scores show whether draws are fixed.
        drawn = rng.random(len(tokens)) < 0.5
        counts = [len(tokens), np.sum(tokens == ord("e") + 3), drawn.sum()]
        return {"counts": np.array(counts, np.float32)}

    def terms(self, model, params, batch, rngs):
        counts = model.hidden_states(params, batch, rngs).last_hidden_state
        tokens, es, drawn = jnp.split(counts, 3, axis=-1)
        rows = jnp.sum(tokens > 0)
        total = jnp.sum(tokens)
        return LossTerms(
            losses={},
            metrics={
                "rows": (rows, 1.0 * (rows > 0)),
                "e": (jnp.sum(es), total),
                "drawn": (jnp.sum(drawn), total),
            },
        )


FUNCTIONS = ModelFunctions(
    hidden_states=lambda params, batch, rngs: HiddenStates(params["one"] * batch["counts"]),
    unembedding=lambda params, hidden: hidden,
    head=lambda *_: None,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, documents in (("text", 6), ("held_out", 5)):
        write_corpus(folder / f"{name}.txt", documents)
    data = tiny_config(folder / "text.txt", folder / "store").data
    held_out = TextSource(str(folder / "held_out.txt"))
    return prepare(dataclasses.replace(data, validation_source=held_out))


def score(prepared: PreparedText, mesh=(1, 1, 1), length=LENGTH, **evaluation):
    config = tiny_config(
        "text.txt", "store", objective=Shares(), evaluation=Evaluation(0, **evaluation)
    )
    devices = jax.devices()[: int(np.prod(mesh))]
    mesh = make_mesh(MeshConfig(*mesh), devices)
    params = jax.device_put({"one": jnp.ones(())}, jax.NamedSharding(mesh, jax.P()))
    step = make_evaluation_step(config.objective, FUNCTIONS)
    calls = []

    def counted(params, batch):
        calls.append(batch["counts"].shape)
        return compiled(params, batch)

    with jax.set_mesh(mesh):
        compiled = compile_evaluation_step(step, params, mesh)
        snapshot = Snapshot(7, params, Phase(1, length, 8), mesh, FUNCTIONS, counted)
        return held_out_evaluator(config, prepared)(snapshot), calls


def by_hand(prepared, count=None, length=LENGTH):
    """The share of "e" among the tokens of so many windows, evenly spread."""
    examples = TextExamples(prepared.validation, Shares().window_spec(length))
    total = len(examples)
    taken = range(total) if count is None else [i * total // count for i in range(count)]
    windows = [examples.read(i, np.random.default_rng(0))["tokens"] for i in taken]
    return np.mean(np.concatenate(windows) == ord("e") + 3), len(windows)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_each_example_counts_once_whatever_the_batch(prepared, batch_size):
    expected, count = by_hand(prepared)
    assert 8 < count < 64
    assert count % 8, "the last batch has to be filled up"
    found, calls = score(prepared, batch_size=batch_size)
    assert found["eval/e"] == pytest.approx(expected, rel=1e-6)
    assert calls == [(batch_size, 3)] * -(-count // batch_size)


def test_the_mesh_changes_nothing(prepared):
    assert score(prepared, (2, 1, 2), batch_size=8)[0] == score(prepared, batch_size=8)[0]


def test_random_choices_do_not_depend_on_the_batch_size(prepared):
    first, again = score(prepared, batch_size=8)[0], score(prepared, batch_size=8)[0]
    assert first == again
    assert first["eval/drawn"] == score(prepared, batch_size=5)[0]["eval/drawn"]
    assert 0.3 < first["eval/drawn"] < 0.7


@pytest.mark.parametrize("count", [1, 8, 11])
def test_max_examples_are_evenly_spread(prepared, count):
    found, calls = score(prepared, batch_size=8, max_examples=count)
    assert found["eval/e"] == pytest.approx(by_hand(prepared, count)[0], rel=1e-6)
    assert len(calls) == -(-count // 8)


@pytest.mark.parametrize(
    ("total", "count", "chosen"),
    [(10, None, range(10)), (10, 3, [0, 3, 6]), (10, 5, range(0, 10, 2)), (3, 9, range(3)),
     (10, 1, [0]), (0, 4, [])],
)  # fmt: skip
def test_scored_examples_are_evenly_spaced(total, count, chosen):
    assert evenly_spread(total, count).tolist() == list(chosen)


@pytest.mark.parametrize("count", [None, 3])
def test_examples_that_are_scored_keep_their_numbers(prepared, count):
    evaluation = Evaluation(0, batch_size=2, max_examples=count)
    config = tiny_config("text.txt", "store", objective=Shares(), evaluation=evaluation)
    batches = list(held_out_batches(config, prepared, LENGTH))
    numbers = np.concatenate([batch["example_id"] for batch in batches])
    total = by_hand(prepared)[1]
    assert numbers[numbers >= 0].tolist() == evenly_spread(total, count).tolist()


def test_a_loop_of_ones_own_reads_the_batches_that_a_run_is_scored_on(prepared):
    config = tiny_config(
        "text.txt", "store", objective=Shares(), evaluation=Evaluation(0, batch_size=8)
    )
    whole = ft.evaluation_batches(prepared, Shares(), sequence_length=LENGTH, batch_size=8)
    expected = held_out_batches(config, prepared, LENGTH)
    for found, batch in zip(whole, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, batch)


def test_batches_of_data_without_held_out_examples_are_refused():
    data = ft.SequenceDataset([{"input_ids": [5, 6]}], name="pairs")
    with pytest.raises(UserError, match="^pairs has no held-out examples; give a SequenceDataset"):
        ft.evaluation_batches(data, Shares(), sequence_length=LENGTH, batch_size=8)


def test_max_examples_can_exceed_the_number_of_examples(prepared):
    few = score(prepared, batch_size=8)[0]
    assert score(prepared, batch_size=8, max_examples=10_000)[0] == few


def test_rows_are_as_long_as_those_of_the_phase(prepared):
    _, calls = score(prepared, length=16, batch_size=1)
    count = by_hand(prepared, length=16)[1]
    assert len(calls) == count > by_hand(prepared)[1]


def test_without_held_out_text_there_are_no_scores(prepared):
    nothing = dataclasses.replace(prepared, validation=None)
    assert score(nothing, batch_size=8) == ({}, [])


def test_a_batch_that_the_mesh_does_not_divide_is_refused(prepared):
    with pytest.raises(UserError, match="batch_size 5 does not divide over mesh data=2 and"):
        score(prepared, (2, 1, 1), batch_size=5)


class PredictedShares(Shares):
    """As `Shares`, with the counts of each window as predictions."""

    def predict(self, model, params, batch):
        return {"counts": model.hidden_states(params, batch, {}).last_hidden_state}


@pytest.mark.parametrize("asked", ["all", "first batch", "none"])
def test_a_reader_gets_each_example_once_in_the_pass_that_gives_the_metrics(
    prepared, monkeypatch, asked
):
    objective = PredictedShares()
    config = tiny_config(
        "text.txt", "store", objective=objective, evaluation=Evaluation(0, batch_size=8)
    )
    expected, count = by_hand(prepared)
    passes, read = [], []

    def counted(*arguments):
        passes.append(arguments)
        return batches(*arguments)

    batches = held_out.scored_batches
    monkeypatch.setattr(held_out, "scored_batches", counted)

    def reader(snapshot, rows):
        limit = {"all": None, "first batch": 1, "none": 0}[asked]
        read.extend(itertools.islice(rows, limit))
        return {"eval/batches": float(len(read))}

    mesh = make_mesh(MeshConfig(data=8))
    params = jax.device_put({"one": jnp.ones(())}, jax.NamedSharding(mesh, jax.P()))
    snapshot = Snapshot(7, params, Phase(1, LENGTH, 8), mesh, FUNCTIONS, None)
    both = scored_prediction_step(objective, FUNCTIONS)
    with jax.set_mesh(mesh):
        step = compile_evaluation_step(both, params, mesh)
        readers = Readers({"": reader}, lambda _: step)
        found = held_out_evaluator(config, prepared, readers)(snapshot)
    assert len(passes) == 1
    assert found["eval/e"] == pytest.approx(expected, rel=1e-6)
    number = -(-count // 8)
    assert found["eval/batches"] == {"all": number, "first batch": 1, "none": 0}[asked]
    if asked == "all":
        ids = np.concatenate([batch["example_id"] for batch in read])
        np.testing.assert_array_equal(ids, np.arange(count))
        totals = np.concatenate([batch["counts"] for batch in read]).sum(axis=0)
        assert totals[1] / totals[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_metrics_and_predictions_run_the_model_once(sizes):
    config = tiny_bert(architecture="BertForSequenceClassification", num_labels=3)
    model = build_model(config, ComputeConfig())
    functions = model_functions(model)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:count])
    params = Trainer(
        model=model, objective=SequenceClassification(), optimizer=optax.sgd(0.1), mesh=mesh
    ).abstract_params
    ids = np.ones((4, 16), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0}
    batch |= {"labels": np.zeros(4, np.int32), "weights": np.ones(4, np.float32)}
    batch |= {"truncated": np.zeros(4, np.float32), "example_id": np.arange(4, dtype=np.int32)}
    objective = SequenceClassification()
    steps = (make_evaluation_step, scored_prediction_step)
    with jax.set_mesh(mesh):
        compiled = [
            compile_evaluation_step(step(objective, functions), params, mesh) for step in steps
        ]
        alone, together = (
            step.lower(params, batch).compile().cost_analysis()["flops"] for step in compiled
        )
    assert together < 1.01 * alone
