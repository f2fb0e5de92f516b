"""Buckets of lengths, and that another prompt of a bucket compiles nothing."""

from __future__ import annotations

import numpy as np

from flax_transformers.generation import program
from flax_transformers.generation.buckets import bucket, padded_to_bucket
from flax_transformers.generation.decode import generate
from tests.huggingface.tensors import drawn_model


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


def test_lengths_of_one_bucket_share_a_program_and_no_text_depends_on_its_bucket():
    """A text of 9 tokens, in a bucket of 16, is the beginning of one of 16."""
    model, params = drawn_model("GPT2LMHeadModel", max_positions=40)
    before, texts = program.write._cache_size(), []
    for length, new_tokens in ((5, 13), (8, 9), (8, 16)):
        ids = np.arange(1, length + 1, dtype=np.int32)[None]
        texts.append(generate(model, params, ids, max_new_tokens=new_tokens, eos_id=()))
        assert texts[-1].shape == (1, new_tokens)
    assert program.write._cache_size() == before + 1
    np.testing.assert_array_equal(texts[1], texts[2][:, :9])
