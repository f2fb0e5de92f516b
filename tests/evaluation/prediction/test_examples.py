"""New texts and images as examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import (
    EncodedRows,
    batches_by_length,
    image_files_of,
    published_preprocessing,
)
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.rows import padded_tokens
from flax_transformers.testing import tiny_architecture


def test_encoded_rows_are_read_like_a_token_store():
    texts = [[np.array([1, 2]), np.array([3])], [np.array([4, 5, 6])]]
    rows = EncodedRows(texts, "tags")
    assert rows.document_ends.tolist() == [3, 6]
    assert rows.sentence_ends.tolist() == [2, 3, 6]
    assert rows.tokens(2, 3).tolist() == [3, 4, 5]
    assert rows.sentence_ends_within(2, 6).tolist() == [3, 6]
    assert [len(rows.labels(n)) for n in range(2)] == [2, 1]
    assert len(EncodedRows(texts, "spans").labels(0)) == 0
    assert EncodedRows(texts, "numbers").labels(0).dtype == np.float32


def test_preprocessing_is_that_of_the_folder(tmp_path):
    config = tiny_architecture("ViTForImageClassification")
    objective, crop = published_preprocessing(tmp_path, config)
    assert (objective.mean, crop) == ((0.5, 0.5, 0.5), None)
    described = {
        "do_center_crop": True, "size": {"shortest_edge": 256}, "image_mean": [0.1, 0.2, 0.3],
        "crop_size": {"height": 224, "width": 224}, "image_std": [1, 1, 2],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    objective, crop = published_preprocessing(tmp_path, config)
    assert (objective.mean, objective.std, crop) == ((0.1, 0.2, 0.3), (1, 1, 2), 0.875)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match="has no image files"):
        image_files_of(tmp_path)


class Rows:
    """Texts of some numbers of tokens, and their objective."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def read(self, index, rng):
        return {"tokens": np.arange(self.lengths[index]) + 1}

    def prepare(self, example, rng, vocab, length):
        return padded_tokens(example["tokens"][:length], length, vocab)


def shapes(lengths, batch_size):
    rows = Rows(lengths)
    batches = list(batches_by_length(rows, rows, Vocabulary(100, 0), 40, batch_size))
    return [(batch["input_ids"].shape, batch["example_id"].tolist()) for batch in batches]


def test_a_batch_has_rows_of_one_bucket_and_the_last_is_filled():
    lengths = [3, 30, 5, 16, 90]
    found = shapes(lengths, 2)
    assert sorted(found, key=lambda one: one[1]) == [
        ((2, 16), [0, 2]), ((2, 32), [1, -1]), ((2, 16), [3, -1]), ((2, 40), [4, -1]),
    ]  # fmt: skip
    for size in (1, 3, 8):
        of_row = {n: shape[1] for shape, ids in shapes(lengths, size) for n in ids if n >= 0}
        assert of_row == {0: 16, 1: 32, 2: 16, 3: 16, 4: 40}
