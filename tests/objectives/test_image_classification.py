"""Mixtures of images and what a classifier's answers count for."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.image_classification import (
    ImageClassification,
    cutmix,
    mixup,
)

VOCAB = Vocabulary(size=7, pad_id=0)
ONE = {"mean": (0.0,), "std": (1.0,)}
PLAIN = ImageClassification(**ONE)
SIDE = 16


ROWS, LABELS = 6, 7


@partial(jax.jit, static_argnums=0)
def _terms(objective, logits, batch):
    def head(name, params, rngs, *arrays, **inputs):
        return HiddenStates(arrays[0]) if name == "hidden_states" else params

    model = ModelFunctions(hidden_states=None, unembedding=None, head=head)
    found = objective.terms(model, logits, batch, {})
    return found.losses["classification"], found.metrics


def terms(objective, logits, labels, weights):
    """The loss and the metrics where a model answers ``logits`` to whatever it sees."""
    given = {"logits": logits, "labels": labels, "label_weights": weights}
    filled = {name: np.zeros((ROWS, np.shape(values)[1])) for name, values in given.items()}
    for name, values in given.items():
        filled[name][: len(values)] = values
    logits = filled.pop("logits").astype(np.float32)
    batch = {
        "pixel_values": np.zeros((ROWS, 1, 2, 2), np.uint8),
        "labels": filled["labels"].astype(np.int32),
        "label_weights": filled["label_weights"].astype(np.float32),
    }
    return _terms(objective, logits, batch)


def image(value):
    return np.full((SIDE, SIDE, 1), value, np.uint8)


def prepare(objective, seed=0, **more):
    example = {"image": image(200), "label": np.int32(4)} | more
    return objective.prepare(example, np.random.default_rng(seed), VOCAB, SIDE)


def test_an_image_that_is_not_mixed_keeps_its_label_and_pixels():
    row = prepare(ImageClassification(mixup=0.8, cutmix=1.0))
    assert (row["pixel_values"] == image(200).transpose(2, 0, 1)).all()
    assert row["labels"].tolist() == [4, 4] and row["label_weights"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("how", "low", "high"),  # bounds of the number of rectangles
    [
        ({"mixup": 0.8}, 0, 5),
        ({"cutmix": 1.0}, 60, 60),
        ({"mixup": 0.8, "cutmix": 1.0}, 15, 45),
    ],
)
def test_shares_add_up_to_one_and_are_those_of_the_pixels(how, low, high):
    other = {"other_image": image(0), "other_label": np.int32(1)}
    seen = []
    for seed in range(60):
        row = prepare(ImageClassification(**how), seed, **other)
        assert row["labels"].tolist() == [4, 1]
        share, rest = row["label_weights"].tolist()
        assert share + rest == pytest.approx(1.0, abs=1e-7) and 0 <= share <= 1
        assert row["pixel_values"].mean() / 200 == pytest.approx(share, abs=0.51 / 200)
        seen.append(np.isin(row["pixel_values"], [0, 200]).all())  # a rectangle, nothing in between
    assert low <= sum(seen) <= high


def test_mixing_is_done_to_half_of_the_images_each_way_and_shares_follow_their_distribution():
    other = {"other_image": image(0), "other_label": np.int32(1)}
    objective = ImageClassification(mixup=5.0)
    shares = [prepare(objective, seed, **other)["label_weights"][0] for seed in range(400)]
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert abs(np.var(shares) - 1 / 44) < 0.006  # of Beta(5, 5)


def test_a_rectangle_has_the_same_position_in_the_other_image():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 3, SIDE, SIDE), np.uint8)
    areas = []
    for _ in range(200):
        mixed, share = cutmix(one, other, 0.75, rng)
        taken = (mixed != one).any(0)
        rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
        inside = np.s_[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (mixed[inside] == other[inside]).all()
        assert share == pytest.approx(1 - mixed[inside][0].size / SIDE**2)
        areas.append(1 - share)
    assert max(areas) == pytest.approx(0.25, abs=0.07)
    assert min(areas) < 0.2  # an edge cut some
    assert (cutmix(one, other, 1.0, rng)[0] == one).all()
    assert (mixup(one, other, 0.0) == other).all()


def test_top_one_and_top_five_are_counted_exactly_and_ties_are_no_answer():
    logits = np.array([[9, 8, 7, 6, 5, 4, 3], [9, 9, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7.0]])
    _, metrics = terms(PLAIN, logits, [[0, 0], [1, 1], [1, 1]], [[1, 0]] * 3)
    assert metrics["accuracy"] == (1.0, 3.0)
    assert metrics["top_5"] == (2.0, 3.0)
    _, metrics = terms(PLAIN, logits[[0] * 6], [[k, k] for k in range(1, 7)], [[1, 0]] * 6)
    assert metrics["top_5"] == (4.0, 6.0)  # places 2 to 5


def test_the_softmax_loss_is_the_cross_entropy_with_the_mixed_and_smoothed_target():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 7)), rng.integers(0, 7, (5, 2))
    share = rng.random(5)
    weights = np.stack([share, 1 - share], 1)
    loss, metrics = terms(ImageClassification(**ONE, label_smoothing=0.1), logits, labels, weights)
    target = np.zeros((5, 7))
    for b in range(5):
        for m in range(2):
            target[b, labels[b, m]] += weights[b, m]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    smoothed = -(log_p * (0.9 * target + 0.1 / 7)).sum()
    assert loss == (pytest.approx(smoothed, rel=1e-5), 5.0, 1.0)
    assert metrics["loss"][0] == pytest.approx(-(log_p * target).sum(), rel=1e-5)


def test_the_sigmoid_loss_says_yes_to_both_labels_of_a_mixture():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7))
    loss, _ = terms(
        ImageClassification(**ONE, loss="sigmoid"),
        logits,
        [[0, 1], [2, 3], [4, 4]],
        [[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]],
    )
    yes = np.zeros((3, 7))
    yes[0, :2] = yes[1, 2] = yes[2, 4] = 1
    p = 1 / (1 + np.exp(-logits))
    expected = -(yes * np.log(p) + (1 - yes) * np.log(1 - p)).mean(1).sum()
    assert loss[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_halves_of_a_batch_add_up_and_examples_of_zeros_have_no_weight(loss):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 7)), rng.integers(0, 7, (6, 2))
    weights = np.array([[0.25, 0.75]] * 5 + [[0, 0]])
    objective = ImageClassification(**ONE, loss=loss)
    whole = terms(objective, logits, labels, weights)
    parts = [
        terms(objective, logits[rows], labels[rows], weights[rows])
        for rows in (slice(0, 2), slice(2, 5))
    ]
    sums = jax.tree.map(np.add, *parts)
    assert np.allclose(whole[0][:2], sums[0][:2], rtol=1e-6)
    for name in ("loss", "accuracy", "top_5"):
        assert np.allclose(whole[1][name], sums[1][name], rtol=1e-6)


def test_pixels_are_scaled_by_mean_and_spread_and_back():
    objective = ImageClassification(mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), np.uint8)
    values = np.asarray(objective.normalized(pixels))
    assert np.allclose(values[:, 1], (pixels[:, 1] / 255 - 0.4) / 0.25, atol=1e-6)
    assert np.allclose(objective.pixels(values) * 255, pixels, atol=1e-3)
    with pytest.raises(UserError, match="objective.mean has 3 numbers, but images have 1"):
        objective.normalized(np.zeros((1, 1, 2, 2), np.uint8))


def test_text_is_refused():
    with pytest.raises(UserError, match="set data to an ImageData"):
        ImageClassification().prepare({"tokens": np.zeros(3)}, np.random.default_rng(0), VOCAB, 4)


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.ones((4, 4, 3), np.float32), "float32 .4, 4, 3."),
        (np.ones((4, 4), np.uint8), "uint8 .4, 4."),
    ],
)
def test_pixels_that_are_not_bytes_by_height_width_and_channel_are_refused(pixels, found):
    example = {"image": image(200), "label": np.int32(4)}
    for name in ("image", "other_image"):
        rows = example | {"other_label": np.int32(1), name: pixels}
        with pytest.raises(UserError, match=f"an example are {found}; give uint8 from 0 to 255"):
            prepare(ImageClassification(mixup=0.2), **rows)


def test_other_integers_of_pixels_are_bytes():
    example = {"image": image(200), "label": np.int32(4)}
    wide = prepare(ImageClassification(), **example | {"image": image(200).astype(np.int64)})
    np.testing.assert_array_equal(
        wide["pixel_values"], prepare(ImageClassification(), **example)["pixel_values"]
    )
    for wrong in (-1, 256):
        pixels = np.full_like(image(200), 7, np.int64)
        pixels[0, 0, 0] = wrong
        with pytest.raises(UserError, match="an example are int64"):
            prepare(ImageClassification(), **example | {"image": pixels})


@pytest.mark.parametrize(
    "wrong",
    [{"loss": "hinge"}, {"label_smoothing": 1.0}, {"mixup": -1.0}, {"std": (0.0,)}],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"objective.{next(iter(wrong))}"):
        ImageClassification(**wrong)
    with pytest.raises(ValueError, match="must be 0 with the loss"):
        ImageClassification(loss="sigmoid", label_smoothing=0.1)
