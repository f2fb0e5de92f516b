"""New texts and images as examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flax_transformers.data.images.decode import resize
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import (
    Crop,
    EncodedRows,
    ImageFiles,
    batches_by_length,
    image_files_of,
    published_preprocessing,
)
from flax_transformers.families.coatnet import CoAtNetConfig
from flax_transformers.families.deit3 import DeiT3Config
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.images import IMAGENET_MEAN, IMAGENET_STD
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
    assert (objective.mean, crop) == ((0.5, 0.5, 0.5), Crop())
    described = {
        "do_center_crop": True, "size": {"shortest_edge": 256}, "image_mean": [0.1, 0.2, 0.3],
        "crop_size": {"height": 224, "width": 224}, "image_std": [1, 1, 2],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    objective, crop = published_preprocessing(tmp_path, config)
    assert (objective.mean, objective.std) == ((0.1, 0.2, 0.3), (1, 1, 2))
    assert crop == Crop(0.875, 0.875, keeps_ratio=True)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    assert published_preprocessing(tmp_path, config) == (objective, crop)


@pytest.mark.parametrize(
    "described",
    [
        {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}},
        {"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"},
    ],
    ids=["both sides", "one number"],
)
def test_a_folder_whose_images_are_squashed_before_the_crop_is_obeyed(tmp_path, described):
    config = tiny_architecture("DeiTForImageClassification")
    text = json.dumps(described | {"do_center_crop": True})
    (tmp_path / "preprocessor_config.json").write_text(text)
    crop = published_preprocessing(tmp_path, config)[1]
    assert crop == Crop(0.875, 0.875)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8)
    assert (crop.of(pixels, (32, 70)) == resize(pixels, (32, 70), (5, 2.5, 75, 37.5))).all()


def test_a_crop_has_the_ratio_of_the_input_or_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8)
    square = Crop(0.5, 0.5, keeps_ratio=True)
    assert (square.of(pixels, (20, 20)) == pixels[10:30, 30:50]).all()
    assert (Crop(0.5, 0.5).of(pixels, (20, 40)) == pixels[10:30, 20:60]).all()
    assert (Crop(keeps_ratio=True).of(pixels, (20, 80)) == pixels[10:30]).all()
    assert (Crop(keeps_ratio=True).of(pixels, (40, 20)) == pixels[:, 30:50]).all()
    assert Crop().of(pixels, (40, 80)) is pixels


def test_preprocessing_of_a_folder_of_timm_is_that_of_its_config(tmp_path):
    given = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2], "crop_pct": 0.75, "crop_mode": "squash"}
    for cfg, mean, crop in (
        (given, (0.1, 0.2, 0.3), Crop(0.75, 0.75)),
        (given | {"crop_mode": "center"}, (0.1, 0.2, 0.3), Crop(0.75, 0.75, keeps_ratio=True)),
        ({"tag": "in1k"}, IMAGENET_MEAN, Crop(0.875, 0.875, keeps_ratio=True)),
        (None, (0.5, 0.5, 0.5), Crop(0.95, 0.95, keeps_ratio=True)),
    ):
        kept = (("pretrained_cfg", json.dumps(cfg)),) if cfg else ()
        objective, found = published_preprocessing(tmp_path, CoAtNetConfig(hub_fields=kept))
        assert (objective.mean, found) == (mean, crop)
    objective, crop = published_preprocessing(tmp_path, DeiT3Config())
    assert (objective.mean, objective.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert crop == Crop(keeps_ratio=True)


def test_images_get_the_height_and_the_width_of_the_model(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = ImageFiles([tmp_path / "a.png"], (16, 32), 3, Crop())
    assert (files.read(0, np.random.default_rng(0))["image"] == pixels).all()


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
