"""Generated arrays: moving digits, spoken-like tones, and solids seen as depth maps or points.

Array i of a split depends on i alone, so that nothing is stored and every process sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.signals.sources import (
    DIGITS,
    SignalSource,
    SignalSplit,
    digest_of_ends,
    digits,
)
from flax_transformers.data.store.token_store import Split

_SPLITS = {"train": 0, "validation": 1}
_KEPT = 1 << 26
"""Bytes of arrays that a process keeps of one split of a source that takes milliseconds for one."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSource(SignalSource):
    """Base of generated sources."""

    examples: int = 20_000
    """Number of training arrays."""
    held_out: int = 1000
    """Number of held-out arrays."""

    RANGES: ClassVar[ranges.Ranges] = {
        "examples": ranges.integers(),
        "held_out": ranges.integers(0),
    }

    def count(self, split: Split) -> int:
        return self.examples if split == "train" else self.held_out


def generator(kind: int, split: Split, index: int) -> np.random.Generator:
    """The random numbers of one array."""
    return np.random.Generator(np.random.Philox(key=[kind * 2 + _SPLITS[split], index]))


def kept(read: Callable[[int], np.ndarray], source: SignalSource) -> Callable[[int], np.ndarray]:
    """``read`` that keeps the arrays that were used last, at most ``_KEPT`` bytes."""
    array = math.prod(source.shape) * np.dtype(source.dtype).itemsize
    return lru_cache(_KEPT // array)(read)


@dataclass(frozen=True, kw_only=True)
class MovingDigits(GeneratedSource):
    """A digit that moves and bounces, uint8 [frames, size, size, 1], with the digit's label.

    As Moving MNIST (arXiv:1502.04681), with one digit of 14 x 14 pixels: MNIST's at half size.
    """

    path: str = "data/mnist"
    frames: int = 8
    size: int = 28

    label_names: ClassVar[tuple[str, ...]] = DIGITS

    RANGES: ClassVar[ranges.Ranges] = {
        "frames": ranges.integers(1, 4096),
        "size": ranges.integers(15, 4096),
    }

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, self.size, self.size, 1)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"content": digest_of_ends(digits(self.path, "train")[0])}

    def opened(self, split: Split) -> SignalSplit:
        images, labels = digits(self.path, split)
        halved = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).round().astype(np.uint8)
        count = self.count(split)
        chosen = np.arange(count) % len(images)

        def read(index: int) -> np.ndarray:
            rng = generator(0, split, index)
            video = np.zeros(self.shape, np.uint8)
            limit = self.size - 14
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1, 3)
            step = speed * np.array([np.sin(angle), np.cos(angle)])
            for frame, place in enumerate(_bouncing(rng.uniform(0, limit, 2), step, limit, self)):
                row, column = place
                video[frame, row : row + 14, column : column + 14, 0] = halved[chosen[index]]
            return video

        return SignalSplit(count, read, labels[chosen])


def _bouncing(start: np.ndarray, step: np.ndarray, limit: int, video: MovingDigits) -> np.ndarray:
    """Positions int [frames, 2] in [0, limit] of a point that is reflected at the edges."""
    straight = start + np.arange(video.frames)[:, None] * step
    folded = np.mod(straight, 2 * limit)
    return np.rint(np.where(folded > limit, 2 * limit - folded, folded)).astype(int)


_WORDS = ("ai", "ao", "eu", "ea", "io", "ie", "oa", "oi", "ue", "ua")
RATE, WINDOW = 8000, 256
"""Samples in a second, and in the window of the Fourier transform."""


@dataclass(frozen=True, kw_only=True)
class Tones(GeneratedSource):
    """Ten spoken-like words as log-mel spectrograms float32 [frames, mels, 1], with their label.

    A word is two syllables of a vowel each. A vowel is a pulse train at the pitch of a voice with
    two formants; the formants glide from the first vowel to the second. Pitch, tempo, loudness and
    noise are random.
    """

    frames: int = 48
    mels: int = 32

    dtype: ClassVar[str] = "float32"
    label_names: ClassVar[tuple[str, ...]] = _WORDS

    RANGES: ClassVar[ranges.Ranges] = {
        "frames": ranges.integers(4, 65_536),
        "mels": ranges.integers(4, 128),
    }

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, self.mels, 1)

    def opened(self, split: Split) -> SignalSplit:
        count = self.count(split)
        labels = (np.arange(count) % len(_WORDS)).astype(np.int32)

        def read(index: int) -> np.ndarray:
            rng = generator(1, split, index)
            samples = (self.frames - 1) * WINDOW // 2 + WINDOW
            wave = word(_WORDS[labels[index]], samples, rng)
            return log_mel(wave, self.mels)[..., None]

        return SignalSplit(count, kept(read, self), labels)


_FORMANTS = {"a": (800, 1200), "e": (450, 2100), "i": (300, 2500), "o": (450, 850), "u": (325, 650)}
"""First and second formant of five vowels in Hz."""


def word(vowels: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A word of two vowels as a wave float64 [samples] at ``RATE``, surrounded by silence."""
    length = int(samples * rng.uniform(0.6, 0.95))
    start = int(rng.integers(0, samples - length + 1))
    time = np.arange(length) / length
    pitch = rng.uniform(90, 220) * (1 + rng.uniform(-0.15, 0.15) * time)
    glide = 1 / (1 + np.exp(-(time - rng.uniform(0.4, 0.6)) * 14))
    size = rng.uniform(0.92, 1.08)  # of the vocal tract
    harmonics = np.arange(1, 26)[:, None]
    frequency = harmonics * pitch
    gain = np.zeros(frequency.shape)
    for first, second in zip(*(_FORMANTS[vowel] for vowel in vowels), strict=True):
        centre = size * (first + (second - first) * glide)
        gain += 1 / (1 + ((frequency - centre) / 90) ** 2)
    gain[frequency >= RATE / 2] = 0  # no aliases
    phase = 2 * np.pi * harmonics * np.cumsum(pitch) / RATE
    envelope = np.minimum(1, 12 * np.minimum(time, 1 - time))
    wave = rng.normal(0, rng.uniform(0.001, 0.02), samples)
    wave[start : start + length] += rng.uniform(0.3, 1) * envelope * (gain * np.sin(phase)).sum(0)
    return wave


def log_mel(wave: np.ndarray, mels: int) -> np.ndarray:
    """Log-mel spectrogram float32 [frames, mels] of a wave at ``RATE``, by Hann windows that
    overlap by half."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[:: WINDOW // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2
    return np.log(power @ _mel_filters(mels) + 1e-4).astype(np.float32)


def _mel_filters(mels: int) -> np.ndarray:
    """Triangles of equal width on the mel scale, float64 [bins, mels]."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.arange(WINDOW // 2 + 1)[:, None] * RATE / WINDOW
    rising = (bins - edges[:-2]) / np.maximum(edges[1:-1] - edges[:-2], RATE / WINDOW)
    falling = (edges[2:] - bins) / np.maximum(edges[2:] - edges[1:-1], RATE / WINDOW)
    return np.clip(np.minimum(rising, falling), 0, None)


SOLIDS = ("ball", "box", "cylinder", "cone", "ring")


@dataclass(frozen=True, kw_only=True)
class Solids(GeneratedSource):
    """Solids in random rotation, as points of their surface or as a depth map, with labels.

    Array i is the same solid in both views, so that two sources of them are aligned. Points are
    float32 [points, 3] within the unit ball; a depth map is float32 [size, size, 1], the distance
    from the camera's plane in [0, 1], 0 where there is nothing.
    """

    view: Literal["points", "depth"] = "points"
    points: int = 256
    size: int = 28

    dtype: ClassVar[str] = "float32"
    label_names: ClassVar[tuple[str, ...]] = SOLIDS

    RANGES: ClassVar[ranges.Ranges] = {
        "points": ranges.integers(8, 65_536),
        "size": ranges.integers(4, 4096),
    }

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.points, 3) if self.view == "points" else (self.size, self.size, 1)

    def opened(self, split: Split) -> SignalSplit:
        count = self.count(split)
        labels = (np.arange(count) % len(SOLIDS)).astype(np.int32)

        def read(index: int) -> np.ndarray:
            rng = generator(2, split, index)
            rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
            stretch = rng.uniform(0.6, 1.0, 3)
            wanted = self.points if self.view == "points" else 8 * self.size**2
            surface = _surface(SOLIDS[labels[index]], wanted, rng) * stretch
            found = (surface @ rotation / np.linalg.norm(surface, axis=1).max()).astype(np.float32)
            return found if self.view == "points" else _depth(found, self.size)

        return SignalSplit(count, kept(read, self), labels)


def _surface(solid: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random points on the surface of a solid, float64 [count, 3]."""
    angle, height, pick = rng.uniform(0, 2 * np.pi, count), *rng.uniform(-1, 1, (2, count))
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    radius = np.sqrt(np.abs(pick))[:, None]
    if solid == "ball":
        points = rng.normal(size=(count, 3))
        return points / np.linalg.norm(points, axis=1, keepdims=True)
    if solid == "box":
        points = rng.uniform(-1, 1, (count, 3))
        face = rng.integers(0, 3, count)
        points[np.arange(count), face] = np.sign(pick)
        return points
    if solid == "cylinder":  # a third of the points is on the two lids
        lid = rng.random(count) < 1 / 3
        flat = np.where(lid[:, None], radius, 1) * circle
        return np.column_stack([flat, np.where(lid, np.sign(height), height)])
    if solid == "cone":
        base = rng.random(count) < 1 / 3
        flat = radius * circle
        return np.column_stack([flat, np.where(base, -1, 1 - 2 * radius[:, 0])])
    tube = height * np.pi
    return np.column_stack([(1 + 0.4 * np.cos(tube))[:, None] * circle, 0.4 * np.sin(tube)])


def _depth(points: np.ndarray, size: int) -> np.ndarray:
    """Depth map float32 [size, size, 1] of points in [-1, 1], seen along the third axis."""
    pixels = np.clip(((points[:, :2] + 1) / 2 * size).astype(int), 0, size - 1)
    depth = np.zeros((size, size), np.float32)
    np.maximum.at(depth, (pixels[:, 0], pixels[:, 1]), (points[:, 2] + 1.1) / 2.1)
    return depth[..., None]
