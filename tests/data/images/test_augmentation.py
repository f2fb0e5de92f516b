"""Augmentation: sizes, ranges and probabilities, and that only the generator is random."""

from __future__ import annotations

import numpy as np
import pytest

from flax_transformers.data.images.augmentation import (
    Augmentation,
    augmented,
    centre_crop,
    erase,
    random_resized_crop,
    random_shift,
)
from flax_transformers.data.images.decode import from_pillow, to_pillow
from flax_transformers.data.images.policies import (
    OPERATIONS,
    color_jitter,
    rand_augment,
    three_augment,
)

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["centre", "shift", "resized"])
@pytest.mark.parametrize("policy", ["none", "rand_augment", "three_augment"])
def test_the_generator_alone_decides_and_the_original_stays(channels, crop, policy):
    settings = Augmentation(crop=crop, flip=0.5, policy=policy, color_jitter=0.3, erase=0.5)
    image = PHOTO[:, :, :channels]
    before = image.copy()
    seen = set()
    for seed in range(12):
        one, again = (augmented(image, 24, settings, 0.875, rng(seed)) for _ in range(2))
        assert one.shape == (24, 24, channels) and one.dtype == np.uint8
        assert (one == again).all()
        seen.add(one.tobytes())
    assert (image == before).all()
    assert len(seen) > 6


def test_without_settings_training_sees_what_evaluation_sees():
    assert (
        augmented(PHOTO, 24, Augmentation(), 0.875, rng()) == centre_crop(PHOTO, 24, 0.875)
    ).all()


def test_the_centre_is_the_middle_square():
    assert (centre_crop(PHOTO, 40) == PHOTO[:, 10:50]).all()
    assert (centre_crop(PHOTO, 20, 0.5) == PHOTO[10:30, 20:40]).all()
    small = PHOTO[:28, :28]
    assert centre_crop(small, 28) is small


def test_a_shift_moves_by_at_most_the_padding_and_mirrors_at_the_edges():
    image = PHOTO[:28, :28]
    mirrored = np.pad(image, ((3, 3), (3, 3), (0, 0)), "reflect")
    windows = {
        mirrored[top : top + 28, left : left + 28].tobytes(): (top, left)
        for top in range(7)
        for left in range(7)
    }
    seen = {windows[random_shift(image, 28, 3, rng(seed)).tobytes()] for seed in range(600)}
    assert len(seen) == 49


def test_a_very_long_image_does_not_grow_without_bound():
    line = np.zeros((1, 100_000, 3), np.uint8)
    for settings in (Augmentation(crop="shift"), Augmentation(crop="resized"), Augmentation()):
        assert augmented(line, 24, settings, 1.0, rng()).shape == (24, 24, 3)


def test_resized_crops_take_the_share_and_shape_asked_for(monkeypatch):
    boxes = []

    def note(pixels, size, box):
        boxes.append(box)
        return pixels

    monkeypatch.setattr("flax_transformers.data.images.augmentation.resize", note)
    generator, large = rng(), np.zeros((400, 600, 1), np.uint8)
    for _ in range(500):
        random_resized_crop(large, 24, (0.08, 1.0), (3 / 4, 4 / 3), generator)
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 600).all() and (bottom <= 400).all()
    share = (right - left) * (bottom - top) / (400 * 600)
    ratio = (right - left) / (bottom - top)
    assert 0.078 < share.min() < 0.1 and 0.7 < share.max() <= 1.0
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    boxes.clear()
    random_resized_crop(np.zeros((10, 1000, 1), np.uint8), 24, (1.0, 1.0), (0.75, 4 / 3), rng())
    assert boxes == [(493, 0, 506, 10)]


def test_a_flip_exchanges_left_and_right_as_often_as_asked():
    image = PHOTO[:28, :28]
    flipped = [
        (augmented(image, 28, Augmentation(flip=0.25), 1.0, rng(seed)) == image[:, ::-1]).all()
        for seed in range(400)
    ]
    assert 70 < sum(flipped) < 130


def test_erasing_replaces_one_rectangle_of_the_area_and_shape_asked_for():
    black = np.zeros((64, 64, 1), np.uint8)
    generator = rng()
    for _ in range(200):
        changed = erase(black, (0.02, 0.4), (0.3, 1 / 0.3), generator)[:, :, 0] > 0
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.01 < height * width / 64**2 < 0.43
        assert 0.2 < height / width < 4.5
        assert changed.sum() > 0.9 * height * width  # a random pixel may be black too
    assert not black.any()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_grows_with_its_strength(name, channels):
    smooth = np.linspace(20, 200, 32 * 32 * channels).reshape(32, 32, channels).astype(np.uint8)
    smooth[10:20, 10:20] += 40

    def changed(strength):
        image = OPERATIONS[name](to_pillow(smooth), strength, 1.0)
        difference = from_pillow(image).astype(float) - smooth
        assert difference.shape == smooth.shape
        return np.abs(difference).mean()

    assert changed(1.0) >= changed(0.3) >= changed(0.0)
    assert changed(1.0) > 0 or (name == "color" and channels == 1)  # grey has no colour to change


def test_rand_augment_draws_as_many_operations_as_asked(monkeypatch):
    done = []
    note = {
        name: lambda image, s, sign, name=name: done.append((s, sign)) or image for name in "ab"
    }
    monkeypatch.setattr("flax_transformers.data.images.policies.OPERATIONS", note)
    generator = rng()
    for _ in range(1000):
        rand_augment(PHOTO, 2, 9.0, 0.5, generator)
    strengths, signs = np.array(done).T
    assert 900 < len(done) < 1100  # half of those drawn
    assert abs(strengths.mean() - 0.9) < 0.01 and abs(strengths.std() - 0.05) < 0.01
    assert strengths.max() <= 1.0
    assert abs(signs.mean()) < 0.15


def test_three_augment_is_grey_or_solarised_or_blurred():
    grey = three = other = 0
    for seed in range(90):
        changed = three_augment(PHOTO, rng(seed)).astype(int)
        if (changed == changed[:, :, :1]).all():
            grey += 1
        elif np.isin(changed, [PHOTO, 255 - PHOTO.astype(int)]).all() and (changed < 128).all():
            three += 1
        else:
            other += 1
    assert grey + three + other == 90 and min(grey, three, other) > 15


def test_colour_jitter_of_zero_changes_nothing_and_stays_in_range():
    assert (color_jitter(PHOTO, 0.0, rng()) == PHOTO).all()
    white = np.full((4, 4, 3), 200, np.uint8)
    for seed in range(20):
        assert color_jitter(white, 0.3, rng(seed)).min() >= 200 * 0.6


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "corner"},
        {"policy": "auto"},
        {"flip": 1.5},
        {"scale": (0.5, 0.1)},
        {"erase_area": (0.1, 1.5)},
        {"layers": 0},
        {"magnitude": 11.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(wrong))}"):
        Augmentation(**wrong)
