"""Masked pretraining of several modalities, and labels of one: losses and their normalisers."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.generated import Solids
from flax_transformers.data.signals.sources import EmbeddedBytes
from flax_transformers.families.multimodal_mae import (
    CLASSIFIER,
    ByteModality,
    GridModality,
    MultimodalMaeConfig,
    PointModality,
)
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.masked_image import mask_noise
from flax_transformers.objectives.modalities import MaskedModalities, ModalityClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.ranges import OutOfRange
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

OBJECTIVE = MaskedModalities(modalities=("a", "b"), coefficients=(1.0, 0.5))
TOKENS = {"a": 4, "b": 10}


def head(name, params, rngs, *arrays, modality):
    """A model whose errors are its inputs, and which masks three quarters of the tokens."""
    if name == "num_tokens":
        return TOKENS[modality]
    values, noise = arrays
    assert noise.shape == (len(values), TOKENS[modality])
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return values, (rank >= TOKENS[modality] // 4).astype(jnp.float32)


MODEL = ModelFunctions(lambda *_: None, lambda *_: None, head)


def batch(numbers):
    rows = []
    for number in numbers:
        rng = np.random.default_rng(number)
        example = {name: rng.random(size, np.float32) for name, size in TOKENS.items()}
        rows.append(OBJECTIVE.prepare(example, rng, Vocabulary(size=1, pad_id=0), 14))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_each_modality_has_the_mean_over_its_own_masked_tokens():
    rows = batch(range(6))
    found = OBJECTIVE.terms(MODEL, {}, rows, {})
    for index, name in enumerate("ab"):
        total, count, factor = found.losses[name]
        assert (count, factor) == (6 * {"a": 3, "b": 8}[name], (1.0, 0.5)[index])
        noise = mask_noise(rows["mask_keys"][:, index], TOKENS[name])
        errors, masked = head("masked_errors", {}, {}, rows[name], noise, modality=name)
        assert float(total) == pytest.approx(np.sum(errors * np.asarray(masked)), rel=1e-6)
        alone = MaskedModalities(modalities=(name,))
        keys = rows["mask_keys"][:, index : index + 1]
        [[same, _, _]] = alone.terms(MODEL, {}, rows | {"mask_keys": keys}, {}).losses.values()
        assert total == same
    means = {name: float(total / count) for name, (total, count) in found.metrics.items()}
    assert means["loss"] == pytest.approx(means["loss_a"] + 0.5 * means["loss_b"], rel=1e-6)


def test_parts_of_a_batch_add_up_and_rows_of_zeros_have_no_weight():
    rows = batch(range(6))
    whole, parts = OBJECTIVE.terms(MODEL, {}, rows, {}), []
    for part in (slice(0, 1), slice(1, 6)):
        filled = {name: np.zeros_like(values) for name, values in rows.items()}
        for name, values in rows.items():
            filled[name][part] = values[part]
        parts.append(OBJECTIVE.terms(MODEL, {}, filled, {}))
    for name, (total, count, _) in whole.losses.items():
        sums = np.add(*(part.losses[name][:2] for part in parts))
        np.testing.assert_allclose(sums, (total, count), rtol=1e-6)
    for name, sums in whole.metrics.items():
        np.testing.assert_allclose(np.add(*(p.metrics[name] for p in parts)), sums, rtol=1e-6)


def test_each_modality_has_random_numbers_of_its_own():
    seen = {}

    def recording(name, params, rngs, *arrays, modality):
        if rngs:
            seen[modality] = jax.random.key_data(rngs["dropout"]).tolist()
        return head(name, params, rngs, *arrays, modality=modality)

    model = ModelFunctions(lambda *_: None, lambda *_: None, recording)
    OBJECTIVE.terms(model, {}, batch(range(2)), {"dropout": jax.random.key(0)})
    assert seen.keys() == TOKENS.keys() and seen["a"] != seen["b"]


def test_numbers_that_do_not_fit_the_modalities_are_refused():
    with pytest.raises(OutOfRange, match=r"\['a', 'b'\] and objective.coefficients \[1.0\]"):
        replace(OBJECTIVE, coefficients=(1.0,))
    with pytest.raises(OutOfRange, match=r"\['a', 'a'\] .* name each modality once"):
        replace(OBJECTIVE, modalities=("a", "a"))


SOLIDS = {"examples": 40, "held_out": 5}
CONFIG = TrainConfig(
    model=MultimodalMaeConfig(
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        intermediate_size=8,
        modalities=(
            GridModality(name="depth", size=(8, 8), patch=(4, 4)),
            PointModality(name="points", points=16, groups=4, group_size=4),
            ByteModality(name="text", length=8),
        ),
        decoder_hidden_size=8,
        decoder_layers=1,
        decoder_heads=2,
        decoder_intermediate_size=8,
        num_labels=5,
    ),
    objective=MaskedModalities(modalities=("depth", "points", "text")),
    data=SignalData(
        sources=(
            Solids(name="depth", view="depth", size=8, **SOLIDS),
            Solids(name="points", points=16, **SOLIDS),
            EmbeddedBytes(name="text", length=8),
        )
    ),
    optimizer=AdamW(learning_rate=1e-3, schedule=Schedule("constant")),
    phases=(Phase(steps=4, sequence_length=16, batch_size=8),),
    checkpoints=CheckpointConfig(every_steps=2),
    evaluation=Evaluation(every_steps=0, batch_size=8),
    logging=Logging(every_steps=1, tensorboard=False),
)


def metrics(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("train/", "eval/"))
    }


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_resumes_bit_for_bit_in_any_micro_batches_and_its_trunk_is_fine_tuned(tmp_path):
    ft.train(CONFIG, workdir=tmp_path / "whole")
    half = replace(CONFIG, phases=(replace(CONFIG.phases[0], steps=2),))
    for config in (half, CONFIG):
        ft.train(config, workdir=tmp_path / "resumed")
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "resumed")
    names = {"loss", "loss_depth", "loss_points", "loss_text"}
    assert whole.keys() >= {(4, f"{when}/{name}") for when in ("train", "eval") for name in names}
    assert {key: resumed[key] for key in whole if key[0] > 2} == {
        key: value for key, value in whole.items() if key[0] > 2
    }
    split = replace(CONFIG, phases=(replace(CONFIG.phases[0], micro_batches=4),))
    ft.train(split, workdir=tmp_path / "split")
    losses = {key: value for key, value in whole.items() if "loss" in key[1]}
    assert losses == pytest.approx({k: metrics(tmp_path / "split")[k] for k in losses}, rel=1e-5)
    # Labels of points alone.
    tuned = replace(
        CONFIG,
        model=replace(CONFIG.model, architecture=CLASSIFIER),
        objective=ModalityClassification(modality="points"),
        data=SignalData(sources=(Solids(name="points", points=16, **SOLIDS),)),
        init_from=str(tmp_path / "whole"),
    )
    ft.train(tuned, workdir=tmp_path / "tuned")
    assert 0 <= metrics(tmp_path / "tuned")[4, "eval/accuracy"] <= 1
    first = ft.load_pretrained(tmp_path / "whole", architecture=CLASSIFIER, num_labels=5)[1]
    pretrained = ft.load_pretrained(tmp_path / "whole")[1]
    for name in ("stack", "final_norm", "patcher_points"):
        jax.tree.map(np.testing.assert_array_equal, first[name], pretrained[name])
