"""Masked autoencoding and classification of videos: rows, masks, and what counts."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.videomae import CLASSIFIER, VideoMaeConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.videos import MaskedVideo, VideoClassification
from flax_transformers.ranges import OutOfRange
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

PRETRAINING = MaskedVideo(mean=(0.5,), std=(0.25,))
LABELS = VideoClassification(mean=(0.5,), std=(0.25,))
MODEL = VideoMaeConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_frames=4,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    mask_ratio=0.5,
    norm_pix_loss=False,
    decoder_hidden_size=8,
    decoder_layers=1,
    decoder_heads=2,
    decoder_intermediate_size=8,
    num_labels=3,
)


def functions_of(config):
    module = build_model(config, ComputeConfig())
    return model_functions(module), drawn_parameters(module, parameter_shapes(module))


def batch(objective, numbers):
    rows = []
    for number in numbers:
        rng = np.random.default_rng(number)
        example = {"video": rng.integers(0, 256, (4, 8, 8, 1), np.uint8), "label": np.int32(number)}
        rows.append(objective.prepare(example, rng, Vocabulary(size=1, pad_id=0), 8))
    return {name: np.stack([one[name] for one in rows]) for name in rows[0]}


@pytest.mark.slow
def test_the_loss_is_the_mean_squared_error_of_masked_tubes_in_any_split_of_the_batch():
    functions, params = functions_of(MODEL)

    @jax.jit
    def run(rows):
        found = PRETRAINING.terms(functions, params, rows, {})
        reconstruction = PRETRAINING.reconstruct(functions, params, rows, {})
        patches = reconstruction.predicted_BTK, reconstruction.target_BTK
        return found.losses["reconstruction"], patches

    rows = batch(PRETRAINING, range(4))
    assert rows["pixel_values"].shape == (4, 4, 1, 8, 8)
    (loss, count, coefficient), (predicted, target) = run(rows)
    # Half of the 4 patches of a frame at both times.
    assert (count, coefficient) == (4 * 4, 1.0)
    assert predicted.shape == (4, 4, 2 * 4 * 4)
    errors = (predicted - target) ** 2
    assert loss == pytest.approx(float(errors.mean(axis=-1).sum()), rel=1e-5)
    assert set(np.unique(target * 255).round()) <= set(np.unique(rows["pixel_values"]))
    halves = []
    for half in (slice(0, 1), slice(1, 4)):
        filled = {name: np.zeros_like(values) for name, values in rows.items()}
        for name, values in rows.items():
            filled[name][half] = values[half]
        halves.append(run(filled)[0][:2])
    np.testing.assert_allclose(np.add(*halves), (loss, count), rtol=1e-6)


@pytest.mark.slow
def test_a_video_is_classified_by_its_label():
    functions, params = functions_of(replace(MODEL, architecture=CLASSIFIER))
    rows = batch(LABELS, range(3))
    found = jax.jit(lambda rows: LABELS.terms(functions, params, rows, {}).metrics)(rows)
    predicted = jax.jit(lambda rows: LABELS.predict(functions, params, rows))(rows)
    assert predicted["logits"].shape == (3, 3)
    np.testing.assert_array_equal(predicted["labels"], [0, 1, 2])
    nll = -jax.nn.log_softmax(predicted["logits"])[np.arange(3), np.arange(3)]
    assert found["loss"][0] == pytest.approx(float(nll.sum()), rel=1e-5)


def test_data_without_videos_of_bytes_or_labels_and_mixed_videos_are_refused():
    vocab, rng = Vocabulary(size=1, pad_id=0), np.random.default_rng(0)
    with pytest.raises(UserError, match="a source named 'video' in data.sources; .* only image"):
        PRETRAINING.prepare({"image": np.zeros(1), "label": np.int32(0)}, rng, vocab, 8)
    with pytest.raises(UserError, match="needs labels"):
        LABELS.prepare({"video": np.zeros((4, 8, 8, 1), np.uint8)}, rng, vocab, 8)
    with pytest.raises(UserError, match=r"are float32 \[4, 8, 8, 1\]; give uint8 .* for videos"):
        PRETRAINING.prepare({"video": np.zeros((4, 8, 8, 1), np.float32)}, rng, vocab, 8)
    with pytest.raises(OutOfRange, match="must be 0: videos are not mixed"):
        VideoClassification(mixup=0.2)
