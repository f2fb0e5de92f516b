"""What a step on images costs, counted by hand, and how its speed is told."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformers.families.deit import DeiTConfig
from flax_transformers.families.mae import MaeConfig
from flax_transformers.families.vit import ViTConfig
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.throughput import StepReport
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import ImagePhase
from flax_transformers.training.setup import make_step_metrics, phase_flops

BATCH, SIDE, PATCH, CHANNELS, WIDTH, INNER, LAYERS, LABELS = 5, 16, 4, 3, 8, 24, 3, 7
PATCHES = (SIDE // PATCH) ** 2
SMALL = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_heads": 2,
    "intermediate_size": INNER,
    "num_labels": LABELS,
}


def flops(model, image_size=SIDE, **changes):
    phase = ImagePhase(steps=1, image_size=image_size, batch_size=BATCH)
    config = dataclasses.replace(tiny_config("text.txt", "store"), model=model, phases=(phase,))
    return phase_flops(dataclasses.replace(config, **changes), phase)


def layers(tokens, count, width, inner):
    """Forward and backward of the matmuls of layers that ``tokens`` of one image pass through."""
    weights = 4 * width * width + 2 * width * inner
    return count * (6 * tokens * weights + 12 * tokens * tokens * width)


def test_patches_and_class_token_pass_through_the_layers_and_one_vector_through_the_head():
    patching = 6 * PATCHES * PATCH * PATCH * CHANNELS * WIDTH
    head = 6 * WIDTH * LABELS
    one = patching + layers(PATCHES + 1, LAYERS, WIDTH, INNER) + head
    assert flops(ViTConfig(**SMALL)) == BATCH * one
    two = patching + layers(PATCHES + 2, LAYERS, WIDTH, INNER) + 2 * head
    assert flops(DeiTConfig(**SMALL)) == BATCH * two


def test_below_a_linear_probe_there_is_only_a_forward_pass():
    patching = 6 * PATCHES * PATCH * PATCH * CHANNELS * WIDTH
    body = patching + layers(PATCHES + 1, LAYERS, WIDTH, INNER)
    probe = AdamW(frozen=("embeddings", "stack", "final_norm"))
    head = 6 * WIDTH * LABELS
    found = flops(ViTConfig(**SMALL), optimizer=probe)
    assert found == pytest.approx(BATCH * (body / 3 + head))


def test_an_image_twice_as_large_has_four_times_the_patches():
    expected = 4 * PATCHES * 6 * PATCH * PATCH * CHANNELS * WIDTH + 6 * WIDTH * LABELS
    expected += layers(4 * PATCHES + 1, LAYERS, WIDTH, INNER)
    assert flops(ViTConfig(**SMALL), 2 * SIDE) == BATCH * expected


def test_the_encoder_of_a_masked_autoencoder_sees_a_quarter_and_its_decoder_all():
    narrow, inner, depth = 4, 12, 2
    model = MaeConfig(
        **SMALL,
        decoder_hidden_size=narrow,
        decoder_layers=depth,
        decoder_heads=2,
        decoder_intermediate_size=inner,
    )
    visible, pixels = PATCHES // 4, PATCH * PATCH * CHANNELS
    expected = 6 * PATCHES * pixels * WIDTH + layers(visible + 1, LAYERS, WIDTH, INNER)
    expected += 6 * (visible + 1) * WIDTH * narrow + layers(PATCHES + 1, depth, narrow, inner)
    expected += 6 * PATCHES * narrow * pixels
    assert flops(model) == BATCH * expected
    classifier = dataclasses.replace(model, architecture="ViTMAEForImageClassification")
    assert flops(classifier) == flops(ViTConfig(**SMALL))


def test_the_published_vit_costs_what_its_paper_says():
    assert flops(ViTConfig(num_labels=1000), 224) / BATCH / 6 == pytest.approx(17.58e9, rel=1e-3)


def test_speed_over_images_is_told_in_examples():
    phase = ImagePhase(steps=4, image_size=SIDE, batch_size=BATCH)
    model = ViTConfig(**SMALL)
    config = dataclasses.replace(tiny_config("text.txt", "store"), model=model, phases=(phase,))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    step_metrics = make_step_metrics(config, phase, mesh, Clock())
    for _ in range(3):
        step_metrics.fetch_previous()
        sums = {"loss": (np.float32(1), np.float32(1))}
        step_metrics.sent(StepReport(sums, np.float32(1), np.int32(0), np.int32(0)))
    row = step_metrics.row(3)
    assert row["perf/examples_per_second"] == pytest.approx(BATCH / row["perf/step_time_s"])
    assert "perf/tokens_per_second" not in row
