"""Probes of the frozen features of images, and embeddings of images."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.dataset import prepare, training_examples
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.errors import UserError
from flax_transformers.evaluation.features.embedding import (
    encoder_of,
    image_embedding,
)
from flax_transformers.evaluation.features.probes import probe_evaluator
from flax_transformers.families.coatnet import CoAtNetConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.testing import tiny_architecture, tiny_bert
from flax_transformers.training.config import Evaluation, ImagePhase
from flax_transformers.training.step import model_functions
from tests.data.images.test_dataset import write_idx
from tests.evaluation.test_reconstructions import MODEL, OBJECTIVE, masked_config
from tests.huggingface.tensors import drawn_model, drawn_parameters, parameter_shapes


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_idx(tmp_path / "mnist", count=(48, 10))


@pytest.mark.slow
def test_probes_score_a_masked_autoencoder_in_training_and_in_evaluate(
    mnist, tmp_path, capsys, one_device, compiled_once
):
    sets = (EvaluationSet("test", ImageSource(str(mnist), split="test")),)
    config = masked_config(mnist, phases=(ImagePhase(steps=2, image_size=8, batch_size=8),))
    own = Evaluation(batch_size=8, probes=("knn", "linear"), sets=sets)
    found = ft.train(replace(config, evaluation=own), tmp_path / "run").metrics
    for name in ("knn_accuracy", "linear_probe_accuracy"):
        assert found[f"eval/{name}"] == found[f"eval/test/{name}"]
        assert found[f"eval/{name}"] * 10 == pytest.approx(round(found[f"eval/{name}"] * 10))
    capsys.readouterr()
    command = ["evaluate", str(tmp_path / "run"), "--evaluation.probes", "knn"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["eval/knn_accuracy"] == found["eval/knn_accuracy"]
    assert "eval/linear_probe_accuracy" not in scores
    assert main([*command, "--data.examples-per-class", "99"]) == 2
    assert "data.examples_per_class is 99, but the class" in capsys.readouterr().err


def test_features_are_of_all_patches_and_of_no_head():
    model = build_model(MODEL, ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8)).astype(np.uint8)
    batch = {"pixel_values": jnp.asarray(pixels), "labels": jnp.zeros(2, jnp.int32)}
    functions = model_functions(encoder_of(model))
    found = {}
    for pool in ("mean", "cls"):
        embedding = image_embedding(MODEL, OBJECTIVE, pool)
        predict = jax.jit(partial(embedding.predict, functions))
        found[pool] = np.asarray(predict(params, batch)["embedding"])
    classifier = build_model(
        replace(MODEL, architecture="ViTMAEForImageClassification"), ComputeConfig()
    )
    see = jax.jit(partial(classifier.apply, method="hidden_states"))
    hidden = see({"params": params}, OBJECTIVE.normalized(pixels)).last_hidden_state
    assert hidden.shape == (2, 17, 8)
    np.testing.assert_allclose(found["mean"], hidden[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(found["cls"], hidden[:, 0], atol=1e-6)


COATNET = CoAtNetConfig(
    image_size=8, stem_widths=(8, 8), stage_widths=(8, 8, 16, 16), stage_depths=(1, 1, 1, 1),
    strides=(2, 1, 2, 1, 1), head_dim=8, hidden_head=False, num_labels=3,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        COATNET,
        tiny_architecture("CLIPForImageClassification", image_size=8, patch_size=4, num_labels=3),
        tiny_architecture("ViTForImageClassification", image_size=8, patch_size=4, num_labels=3),
        tiny_architecture("SiglipForImageClassification", image_size=8, patch_size=4, num_labels=3),
    ],
    ids=lambda config: config.architecture,
)
def test_features_are_what_the_classifier_gets(config):
    model = build_model(config)
    params = drawn_parameters(model, parameter_shapes(model))
    params = jax.tree.map(jnp.abs, params)  # as variances are
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    features, head = embedded(model, params, pixels, None), params["classification_head"]
    output = jax.jit(model.apply)({"params": params}, ImageClassification().normalized(pixels))
    expected = features @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(expected, output.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["CLIPVisionModel", "SiglipVisionModel", "DeiTModel"])
def test_embeddings_are_of_the_hidden_states_of_the_model_itself(architecture):
    model, params = drawn_model(architecture, image_size=8, patch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    output = jax.jit(model.apply)({"params": params}, ImageClassification().normalized(pixels))
    hidden, tokens = output.last_hidden_state, len(model.config.tokens)
    mean = embedded(model, params, pixels, "mean")
    np.testing.assert_allclose(mean, hidden[:, tokens:].mean(1), atol=1e-5)
    if tokens:
        np.testing.assert_allclose(embedded(model, params, pixels, "cls"), hidden[:, 0], atol=1e-5)


def embedded(model, params, pixels, pool):
    """The embeddings of images uint8 [B, C, H, W]."""
    embedding = image_embedding(model.config, ImageClassification(), pool)
    predict = jax.jit(partial(embedding.predict, model_functions(encoder_of(model))))
    batch = {"pixel_values": jnp.asarray(pixels), "labels": jnp.zeros(len(pixels), jnp.int32)}
    return predict(params, batch)["embedding"]


def test_features_of_training_images_are_not_augmented(mnist):
    data = replace(
        masked_config(mnist).data, augmentation=Augmentation(crop="shift", padding=4), shards=1
    )
    prepared = prepare(data)
    examples = training_examples(prepared, ImageSpec(8), data).plain
    rng = np.random.default_rng(0)
    for index in range(5):
        assert (examples.read(index, rng)["image"] == prepared.train.pixels(index, 1)).all()


def test_second_images_of_a_subset_are_of_the_subset(mnist):
    data = replace(masked_config(mnist).data, examples_per_class=2, augmentation=Augmentation())
    prepared, rng = prepare(data), np.random.default_rng(0)
    examples = training_examples(prepared, ImageSpec(8, other=True), data)
    own = {examples.plain.read(i, rng)["image"].tobytes() for i in range(len(examples))}
    assert len(own) == len(examples) == 2 * len(prepared.label_names)
    seen = set()
    for _ in range(200):
        pair = examples.read(0, rng)
        seen.add(pair["other_label"].item())
        within = [examples.examples.images.pixels(int(i), 1).tobytes() for i in examples.chosen]
        assert pair["other_image"].tobytes() in within
    assert seen == set(range(len(prepared.label_names)))


def test_probes_of_text_or_of_a_model_without_images_are_refused(mnist):
    config = masked_config(mnist)
    prepared = prepare(config.data)
    with pytest.raises(UserError, match="are for models of images"):
        probe_evaluator(replace(config, model=tiny_bert()), prepared, None, ())
    with pytest.raises(UserError, match="no class token"):
        image_embedding(replace(tiny_vit(), pooling="average"), OBJECTIVE, "cls")
    with pytest.raises(UserError, match="has no vector of an image"):
        encoder_of(build_model(tiny_architecture("BertModel")))


def tiny_vit():
    return tiny_architecture("ViTForImageClassification")


def test_predict_writes_the_embeddings_of_images(tmp_path, capsys):
    from PIL import Image

    model, params = drawn_model("ViTModel")
    ft.save_pretrained(tmp_path / "vit", model, params)
    (tmp_path / "images").mkdir()
    side = model.config.image_shape[0]
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    values = jnp.asarray((pixels / 255 - 0.5) / 0.5, jnp.float32).transpose(2, 0, 1)[None]
    hidden = jax.jit(model.apply)({"params": params}, values).last_hidden_state[0]
    for pool, expected in (("cls", hidden[0]), ("mean", hidden[1:].mean(0))):
        command = ["predict", str(tmp_path / "vit"), "--input", str(tmp_path / "images")]
        assert main([*command, "--pool", pool]) == 0
        (line,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert line["file"].endswith("a.png")
        np.testing.assert_allclose(line["embedding"], expected, atol=2e-5)
    assert main(command) == 2
    assert "needs classify, which ViTModel does not have" in capsys.readouterr().err


def test_an_image_classifier_gets_the_pool_of_its_head():
    assert image_embedding(MODEL, OBJECTIVE, None).pool == "mean"
    assert image_embedding(tiny_vit(), ImageClassification(), None).pool == "cls"
    attends = replace(tiny_vit(), pooling="attention")
    assert image_embedding(attends, ImageClassification(), None).pool == "mean"
