"""Statistics of the masks of the hash.

Each statistic is compared with what independent draws give. Seeds are fixed, and bounds are five
standard deviations, or 1e-6 of a chi-square distribution, so that chance alone fails none.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from flax_transformers.models.kernels.dropout import hash_bits, is_kept, key_words

RATES = (0.05, 0.1, 0.3, 0.5, 0.75, 0.9)
SHAPE = (16, 64, 96)
"""Examples, positions and features."""


@partial(jax.jit, static_argnums=(1, 2))
def kept(key, rate=0.5, shape=SHAPE):
    """The mask as numbers 0 and 1."""
    return is_kept(key_words(key), 1.0 - rate, shape).astype(jnp.int32)


@jax.jit
def many_kept(keys):
    """Masks of half the elements of [32, 64], one for each of ``keys``."""
    return jax.vmap(lambda key: is_kept(key_words(key), 0.5, (32, 64)))(keys).astype(jnp.int32)


def keys_of(kind):
    """256 keys as training makes them, or next to each other in both words."""
    root, numbers = jax.random.key(0), jnp.arange(256)
    if kind == "words":
        data = jnp.stack(jnp.divmod(numbers, 16), axis=1).astype(jnp.uint32)
        return jax.random.wrap_key_data(data)
    if kind == "seeds":
        return jax.vmap(jax.random.key)(numbers)
    if kind == "steps and micro-batches":
        step = partial(jax.random.fold_in, root)
        return jax.vmap(lambda n: jax.random.fold_in(step(n // 8), n % 8))(numbers)
    return jax.random.split(root, 256)  # layers


def deviations(count, trials, probability):
    """How many standard deviations a binomial count is from its mean."""
    count, trials = np.asarray(count, np.float64), np.float64(trials)
    return (count - trials * probability) / np.sqrt(trials * probability * (1 - probability))


def are_uniform(values, classes):
    """Whether values 0 ... classes - 1 pass the chi-square test."""
    counts = np.bincount(np.ravel(values), minlength=classes)
    distance = np.square(counts - counts.mean()).sum() / counts.mean()
    return len(counts) == classes and special.chdtrc(classes - 1, distance) > 1e-6


@pytest.mark.parametrize("rate", RATES)
def test_the_share_of_kept_elements_is_exact_overall_and_in_every_part(rate):
    masks = np.stack([kept(jax.random.key(seed), rate) for seed in range(8)])
    for axes in itertools.chain.from_iterable(
        itertools.combinations(range(4), n) for n in range(1, 5)
    ):
        counts = masks.sum(axis=axes)
        drawn = masks.size // counts.size, 1 - rate
        fewer, more = special.bdtr(counts, *drawn), special.bdtrc(counts - 1, *drawn)
        chance = min(fewer.min(), more.min())
        assert chance * counts.size > 1e-6, axes


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_elements_are_independent_of_their_neighbours(axis, rate):
    mask = np.moveaxis(np.asarray(kept(jax.random.key(3), rate)), axis, 0)
    both = (1 - rate) ** 2
    for lag in (1, 2, 3, 4, 7, 8):
        pairs = mask[lag:] * mask[:-lag]
        # The pairs of a line overlap, which widens the distribution.
        widened = 1 + 2 * (1 - rate) / (2 - rate)
        assert abs(deviations(pairs.sum(), pairs.size, both)) < 5 * widened**0.5, lag


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_all_patterns_of_neighbours_occur_equally_often(axis, bits):
    mask = np.moveaxis(np.asarray(kept(jax.random.key(5))), axis, -1)
    length = mask.shape[-1] // bits * bits
    groups = mask[..., :length].reshape(-1, bits)  # of disjoint neighbours
    assert are_uniform(groups @ (1 << np.arange(bits)), 2**bits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "seeds", "layers", "steps and micro-batches"])
def test_masks_of_different_keys_are_independent(kind):
    masks = np.asarray(many_kept(keys_of(kind))).reshape(256, -1)
    signs = (2 * masks - 1).astype(np.float32)
    agreement = np.triu(signs @ signs.T / np.sqrt(signs.shape[1]), k=1)
    assert np.abs(agreement).max() < 6.2  # of 32,640 pairs
    pairs = agreement[np.triu_indices(256, k=1)]
    assert abs((pairs**2).mean() - 1) < 5 * (2 / len(pairs)) ** 0.5
    # Nor is a mask another one moved by some elements.
    for lag in (1, 64):
        moved = signs[:, lag:] @ signs[:, :-lag].T / np.sqrt(signs.shape[1] - lag)
        assert np.abs(moved[~np.eye(256, dtype=bool)]).max() < 6.2


def test_no_row_is_repeated_within_a_mask_or_between_steps():
    masks = [np.asarray(kept(jax.random.key(step), shape=(64, 32, 64))) for step in range(4)]
    rows = np.packbits(np.concatenate(masks).reshape(-1, 64), axis=1)
    assert len(np.unique(rows, axis=0)) == 4 * 64 * 32


@pytest.mark.parametrize("words", [(0, 0), (1, 0), (0, 1), (0xDEADBEEF, 0x12345678)])
def test_bits_are_uniform_and_independent_of_each_other(words):
    bits = np.asarray(hash_bits(jnp.asarray(words, jnp.uint32), (1 << 17,)))
    assert len(np.unique(bits)) == len(bits)
    for shift in (0, 8, 16, 24):
        assert are_uniform((bits >> shift) & 255, 256)
    each = ((bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float32) * 2 - 1
    correlation = each.T @ each / np.sqrt(len(bits)) - np.sqrt(len(bits)) * np.eye(32)
    assert np.abs(correlation).max() < 5
    assert np.abs(each.sum(axis=0)).max() / np.sqrt(len(bits)) < 5


@pytest.mark.parametrize("changed", range(3), ids=["index", "first word", "second word"])
def test_each_bit_of_index_and_key_changes_half_of_the_bits(changed):
    count = 1 << 12
    bits_of = jax.jit(lambda i, *words: hash_bits(jnp.stack(words), (1 << 32,), (i,)))
    given = [np.arange(count) * 7919, 0x9ABCDEF0, 0x0F1E2D3C]
    given = [jnp.asarray(value, jnp.uint32) for value in given]
    before = np.asarray(bits_of(*given))
    for bit in range(32):
        flipped = [x ^ jnp.uint32((i == changed) << bit) for i, x in enumerate(given)]
        changes = before ^ np.asarray(bits_of(*flipped))
        each = ((changes[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
        assert np.abs(each - 0.5).max() < 0.05, bit  # 6 standard deviations of chance


@pytest.mark.slow
def test_an_array_of_more_elements_than_32_bits_count_repeats_nothing():
    # Rows 1 and 17 of [32, 2**14, 2**15]: their elements are 2**33 apart.
    words, shape = key_words(jax.random.key(0)), (32, 1 << 14, 1 << 15)
    at = (
        jnp.asarray([1, 9, 17])[:, None, None],
        jnp.arange(4)[None, :, None],
        jnp.arange(1 << 12)[None, None, :],
    )
    kept_at = jax.jit(lambda *at: is_kept(words, 0.5, shape, at))
    rows = np.asarray(kept_at(*at)).reshape(3, -1)
    for one, other in itertools.combinations(rows, 2):
        assert abs(deviations((one == other).sum(), one.size, 0.5)) < 5
    at = (jnp.arange(32)[:, None, None], *at[1:])
    counts = np.asarray(kept_at(*at)).sum(axis=0)
    assert abs(deviations(counts.sum(), 32 * counts.size, 0.5)) < 5
    assert abs(counts.var() / 8 - 1) < 0.05


def test_a_block_of_the_mask_needs_only_its_own_indices():
    words, shape = key_words(jax.random.key(2)), (4, 6, 32, 48)
    whole = np.asarray(jax.jit(lambda: is_kept(words, 0.7, shape))())
    at = (jnp.int32(3), jnp.int32(2), jnp.arange(8, 16)[:, None], jnp.arange(16, 48)[None, :])
    block = jax.jit(lambda *at: is_kept(words, 0.7, shape, at))(*at)
    np.testing.assert_array_equal(block, whole[3, 2, 8:16, 16:48])
