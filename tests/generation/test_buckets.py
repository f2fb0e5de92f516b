"""Buckets of lengths, and that another prompt of a bucket compiles nothing."""

from __future__ import annotations

import numpy as np

from flax_transformers.generation import program
from flax_transformers.generation.buckets import bucket, padded_to_bucket
from flax_transformers.generation.decode import generate
from flax_transformers.testing import tiny_model


def test_buckets_are_powers_of_two_and_from_96_on_also_those_between():
    sizes = [1, 2, 3, 5, 9, 33, 48, 64, 65, 96, 97, 128, 129, 192, 193, 700, 1025]
    expected = [1, 2, 4, 8, 16, 64, 64, 64, 96, 96, 128, 128, 192, 192, 256, 768, 1536]
    assert [bucket(size) for size in sizes] == expected


def test_padding_goes_to_either_side():
    ids, mask = np.array([[5, 6, 7]]), np.ones((1, 3), int)
    assert [row.tolist() for row in padded_to_bucket(ids, mask, 9, left=True)] == [
        [[9, 5, 6, 7]],
        [[0, 1, 1, 1]],
    ]
    assert [row.tolist() for row in padded_to_bucket(ids, mask, 9, left=False)] == [
        [[5, 6, 7, 9]],
        [[1, 1, 1, 0]],
    ]


def test_lengths_of_one_bucket_share_a_program():
    model, params = tiny_model("GPT2LMHeadModel", max_positions=40)
    before = program.write._cache_size()
    for length, new_tokens in ((5, 9), (7, 13), (8, 16)):
        ids = np.ones((2, length), np.int32)
        tokens = generate(model, params, ids, max_new_tokens=new_tokens)
        assert tokens.shape == (2, new_tokens)
    assert program.write._cache_size() == before + 1


def test_a_text_does_not_depend_on_the_bucket_of_its_length():
    """A text of 9 tokens, in a bucket of 16, is the beginning of one of 16."""
    model, params = tiny_model("GPT2LMHeadModel", max_positions=40)
    ids = np.arange(1, 9, dtype=np.int32)[None]
    long = generate(model, params, ids, max_new_tokens=16, eos_id=())
    short = generate(model, params, ids, max_new_tokens=9, eos_id=())
    np.testing.assert_array_equal(short, long[:, :9])
