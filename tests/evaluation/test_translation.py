"""Scores of translations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.evaluation import tasks, translation
from flax_transformers.evaluation.tasks import baselines
from flax_transformers.evaluation.translation import (
    pairs_of,
    scores,
    translate,
)
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.testing import tiny_config

NUMBERS = {"eins": "one", "zwei": "two", "drei": "three", "und": "and", "mal": "times"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Pairs that a dictionary translates without errors, in bytes; and their config."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(90):
        words = rng.choice(list(NUMBERS), 5)
        lines.append(f"{' '.join(words)}\t{' '.join(NUMBERS[word] for word in words)}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    data = TextData(
        source=PairSource(str(folder / "pairs.tsv")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.2,
        shards=1,
    )
    config = tiny_config("pairs.tsv", "store", objective=SequenceToSequence())
    return config, prepare(dataclasses.replace(data, prepare_processes=1), folder / "store")


@pytest.mark.parametrize("metric", ["eval/bleu", "eval/newstest/rougeL", "eval/loss"])
def test_translations_are_scored_at_each_evaluation_that_the_best_step_depends_on(
    prepared, tmp_path, monkeypatch, metric
):
    config, data = prepared
    kept = dataclasses.replace(config.checkpoints, keep_best=1, best_metric=metric)
    at_step = []
    monkeypatch.setattr(tasks, "translation_evaluator", lambda *given: at_step.append(given[3]))
    run = tasks.EvaluatedRun(dataclasses.replace(config, checkpoints=kept), data, None, tmp_path)
    tasks.task_of(config.objective).evaluators(run)
    assert at_step == [config.total_steps if metric == "eval/loss" else None]


def test_the_unigram_of_targets_counts_ids_of_their_own_tokenizer(prepared, tmp_path):
    config, one = prepared
    data = TextData(
        source=PairSource(f"{one.directory}/../pairs.tsv"),
        tokenizer=TokenizerConfig("bytes"),
        target_tokenizer=TokenizerConfig("unigram", vocab_size=280),
        validation_fraction=0.2,
        shards=1,
    )
    data = dataclasses.replace(data, prepare_processes=1)
    (found,) = baselines(config, prepare(data, tmp_path / "store"))
    assert found.name == "unigram cross-entropy" and found.score < np.log(20)  # entries in use


def test_pairs_are_those_of_the_text_one_by_one(prepared):
    decode = prepared[1].tokenizer.decode
    for source, target in pairs_of(*prepared, "validation", 5):
        assert [NUMBERS[word] for word in decode(source).split()] == decode(target).split()


def test_equal_texts_score_100():
    text = ["the cat sat on the mat", "and went away again"]
    assert scores(text, text) == pytest.approx({"bleu": 100.0, "chrf": 100.0})


def test_scores_without_sacrebleu_name_the_extra(monkeypatch):
    monkeypatch.setattr(translation, "can_score", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'flax_transformers\[evaluation\]'"):
        scores(["a"], ["a"])


def test_every_pair_is_translated_once_without_its_end_token(prepared, monkeypatch):
    """By a model that says the source; batches of four, of which the last is not full."""

    def say_the_source(model, params, ids, mask, *, max_new_tokens, **_):
        return ids[:, :max_new_tokens]

    monkeypatch.setattr(translation, "arranged", lambda params: params)
    monkeypatch.setattr(translation, "generate_target", say_the_source)
    monkeypatch.setattr(translation, "_BATCH_ROWS", 4)
    pairs = pairs_of(*prepared, "validation", 10)
    found = list(translate(*prepared, None, None, pairs))
    assert [text.tolist() for text in found] == [source.tolist() for source, _ in pairs]


def test_the_decoder_starts_as_in_the_objective(prepared, monkeypatch):
    config, data = prepared
    asked = []

    def written(model, params, ids, mask, *, start_ids, max_new_tokens, **_):
        asked.append((start_ids, ids[0, : int(mask[0].sum())].tolist()))
        return np.full((len(ids), max_new_tokens), 1, np.int32)

    monkeypatch.setattr(translation, "arranged", lambda params: params)
    monkeypatch.setattr(translation, "generate_target", written)
    source, _ = (pair := pairs_of(config, data, "validation", 1))[0]
    for objective, start in (
        (SequenceToSequence(), [0]),
        (SequenceToSequence(start="end"), [1]),
        (SequenceToSequence(decoder_start_id=7), [7]),
    ):
        (text,) = translate(
            dataclasses.replace(config, objective=objective), data, None, None, pair
        )
        assert len(text) == 0
        assert asked.pop() == (start, [*source.tolist(), 1])
