"""Recall in both directions, zero-shot accuracy, and baselines of contrastive runs."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.data.images.image_text import ClassTexts, ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.evaluation.contrastive.retrieval import recalls
from flax_transformers.evaluation.tasks import baselines, evaluators
from flax_transformers.families.clip import ClipConfig, ClipVision
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_config
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import Evaluation, Phase
from tests.data.images.test_dataset import SIDE, write_idx

NAMES = ("a", "b", "c")
MODEL = ClipConfig(
    vocab_size=262, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8,
    projection_dim=4, pad_id=0, bos_id=None, eos_ids=(1,),
    vision=ClipVision(
        image_size=SIDE, patch_size=4, num_channels=1, hidden_size=8, num_layers=1, num_heads=2,
        intermediate_size=8,
    ),
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    data = ImageTextData(
        source=ImageSource(str(write_idx(tmp_path / "digits"))),
        channels=1,
        crop_fraction=1.0,
        tokenizer=TokenizerConfig("bytes"),
        captions=(ClassTexts(NAMES),),
        zero_shot=(
            ClassTexts(NAMES, ("{}", "x{}"), "one"),
            ClassTexts(("b", "a", "c"), name="two"),
        ),
        store=str(tmp_path / "store"),
    )
    return dataclasses.replace(
        tiny_config("text.txt", "store"),
        model=MODEL,
        objective=ImageTextContrastive(image_size=SIDE),
        data=data,
        phases=(Phase(1, 8, 8),),
        evaluation=Evaluation(batch_size=8),
    )


def test_recall_counts_the_candidates_that_come_before_the_best_of_a_class():
    queries = np.eye(4, dtype=np.float32)[:3]
    candidates = np.array([[3, 0, 0, 0], [2, 1, 1, 0], [1, 2, 1, 0], [0, 3, 0, 0]], np.float32)
    # By query the candidates in order: 0 1 2 3; 3 2 1 0; 1 and 2, then 0 and 3 as similar.
    classes = np.array([0, 1, 1, 2])
    found = recalls("x", queries, candidates, np.array([1, 1, 0]), classes, (1, 2, 3, 4))
    assert list(found) == [f"x_recall_at_{top}" for top in (1, 2, 3, 4)]
    assert list(found.values()) == [0.0, 2 / 3, 2 / 3, 1.0]


def snapshot(config, prepared):
    """Embeddings of a model that knows each held-out image, and the letter in a text."""
    images = {
        prepared.validation.pixels(i, 1).astype(int).sum(): int(prepared.validation.labels[i])
        for i in range(len(prepared.validation))
    }
    sums, labels = np.array(list(images)), np.array(list(images.values()))

    def head(name, params, rngs, *arrays, **options):
        if name == "scale_and_bias":
            return jnp.zeros(()), jnp.zeros(())
        if name == "embed_image":
            pixels = arrays[0] * 0.5 + 0.5
            total = jnp.sum(jnp.round(pixels * 255), axis=(1, 2, 3))
            known = total[:, None] == sums[None].astype(np.float32)
            return jnp.eye(3)[jnp.asarray(labels)[jnp.argmax(known, axis=1)]]
        letter = jnp.max(jnp.where((arrays[0] > 99) & (arrays[0] < 103), arrays[0], 0), axis=1)
        return jnp.eye(3)[letter - 100]  # bytes begin at id 3

    functions = ModelFunctions(hidden_states=None, unembedding=None, head=head)
    mesh = make_mesh(MeshConfig(data=8))
    return Snapshot(1, {}, config.phases[0], mesh, functions, evaluation_step=None)


@pytest.mark.slow
def test_a_model_that_knows_the_images_is_scored_as_perfect(config):
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, mean=(0.5,), std=(0.5,))
    )
    prepared = prepare(config.data)
    shot, found = snapshot(config, prepared), {}
    for evaluate in evaluators(config, prepared, None, None):
        found |= evaluate(shot)
    for top in (1, 5, 10):
        assert found[f"eval/image_to_text_recall_at_{top}"] == 1.0
        assert found[f"eval/text_to_image_recall_at_{top}"] == 1.0
    assert found["eval/zero_shot_accuracy_one"] == 1.0
    assert found["eval/zero_shot_text_to_image_recall_at_1_one"] == 1.0
    # Labels are 0, 1, 2, 0 ... of ten images; the second set calls 0 "b" and 1 "a".
    assert found["eval/zero_shot_accuracy_two"] == pytest.approx(3 / 10)
    assert found["eval/zero_shot_text_to_image_recall_at_1_two"] == pytest.approx(1 / 3)


def test_baselines_are_what_equal_logits_score(config):
    prepared = prepare(config.data)
    loss, accuracy = baselines(config, prepared)
    assert loss.score == pytest.approx((8 * math.log(8) + 2 * math.log(2)) / 10)
    assert accuracy.score == pytest.approx(2 / 10)
    sigmoid = dataclasses.replace(config.objective, loss="sigmoid")
    loss, _ = baselines(dataclasses.replace(config, objective=sigmoid), prepared)
    pairs = [-math.log(1 / n) - (n - 1) * math.log(1 - 1 / n) for n in (8, 2)]
    assert loss.score == pytest.approx((8 * pairs[0] + 2 * pairs[1]) / 10)
