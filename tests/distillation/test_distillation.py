"""Students of a teacher: the loss, and whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import flax_transformers as ft
from flax_transformers import runtime
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.cli.main import main
from flax_transformers.config_json import UnregisteredType, from_json, to_json
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer
from flax_transformers.distillation.objectives import (
    LOGITS,
    DistilledImageClassification,
    DistilledSequenceClassification,
)
from flax_transformers.errors import UserError
from flax_transformers.families.deit import DeiTConfig
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.runtime import StoredModel, prepared_data, teacher, with_label_names
from flax_transformers.testing import assert_bit_equal, tiny_architecture, tiny_bert
from flax_transformers.training.check_run import check_config
from flax_transformers.training.config import ImagePhase
from flax_transformers.training.run_state import RunPosition, checkpoint_meta, tokenizer_files
from tests.cli.test_evaluate import classifier
from tests.data.images.test_dataset import write_idx
from tests.evaluation.test_reconstructions import masked_config
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

SMALL = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3, "hidden_size": 8,
    "num_layers": 1, "num_heads": 2, "intermediate_size": 8,
}  # fmt: skip
PIXELS = {"mean": (0.5,), "std": (0.5,)}


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_idx(tmp_path / "mnist", count=(48, 10))


def fixed(class_BC, taught_BC):
    """Functions of a model whose two heads give these logits."""
    heads = {
        "hidden_states": SimpleNamespace(last_hidden_state=None),
        "classify_both": (class_BC, taught_BC),
        "classify": class_BC,
    }
    return SimpleNamespace(head=lambda name, *_, **__: heads[name])


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_that_of_deit(kind, token):
    rng = np.random.default_rng(0)
    class_BC, taught_BC, teacher_BC = rng.normal(size=(3, 4, 3)).astype(np.float32)
    batch = {
        "pixel_values": jnp.zeros((4, 1, 8, 8), jnp.uint8),
        "labels": jnp.array([[0, 0], [1, 1], [2, 2], [0, 0]]),
        "label_weights": jnp.array([[1.0, 0], [1, 0], [1, 0], [0, 0]]),  # the last is padding
        LOGITS: jnp.asarray(teacher_BC),
    }
    objective = DistilledImageClassification(
        teacher="t", distillation=kind, temperature=2.0, share=0.3, distillation_token=token,
        **PIXELS,
    )  # fmt: skip
    found = objective.terms(fixed(class_BC, taught_BC), {}, batch, {})
    loss = sum(c * s / w for s, w, c in found.losses.values())
    student = taught_BC if token else class_BC
    labels = -np.log(softmax(class_BC)[range(3), [0, 1, 2]]).mean()
    if kind == "hard":
        taught = -np.log(softmax(student)[range(3), teacher_BC[:3].argmax(1)]).mean()
    else:
        p, q = softmax(teacher_BC[:3] / 2), softmax(student[:3] / 2)
        taught = 4 * (p * np.log(p / q)).sum(1).mean()
    assert float(loss) == pytest.approx(0.7 * labels + 0.3 * taught, rel=1e-5)
    agree = (student.argmax(1) == teacher_BC.argmax(1))[:3].mean()
    total, count = found.metrics["teacher_agreement"]
    assert float(total / count) == pytest.approx(agree)


def image_run(mnist, model, objective, **phase):
    phases = (ImagePhase(**({"steps": 3, "image_size": 8, "batch_size": 8} | phase)),)
    config = masked_config(mnist, model=model, objective=objective, phases=phases)
    return replace(config, logging=replace(config.logging, every_steps=1))


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def saved_run(config, workdir):
    """A run of no steps, with drawn parameters, to be a teacher."""
    prepared = prepared_data(config.data)
    config = with_label_names(config, prepared)
    model = build_model(config.model, ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    meta = checkpoint_meta(
        config, prepared, RunPosition(), {}, {}, consecutive_skips=0, diverging_steps=0
    )
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, meta, tokenizer_files(config, prepared))
    checkpoints.close()


@pytest.mark.slow
def test_a_deit_learns_from_a_vit_equally_in_any_number_of_micro_batches(
    mnist, tmp_path, one_device, compiled_once
):
    teacher = image_run(mnist, ViTConfig(**SMALL), ImageClassification(**PIXELS))
    saved_run(teacher, tmp_path / "teacher")
    objective = DistilledImageClassification(
        teacher=str(tmp_path / "teacher"), distillation="soft", distillation_token=True, **PIXELS
    )
    config = image_run(mnist, DeiTConfig(**SMALL), objective)
    assert from_json(to_json(config)) == config
    found = ft.train(config, tmp_path / "one").metrics
    assert 0 <= found["train/teacher_agreement"] <= 1
    assert "eval/accuracy" in found and "eval/teacher_agreement" not in found
    ft.train(image_run(mnist, DeiTConfig(**SMALL), objective, micro_batches=4), tmp_path / "four")
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=2e-6)

    other = replace(objective, mean=(0.1,))
    with pytest.raises(UserError, match=r"was trained with objective.mean \(0.5,\)"):
        ft.train(replace(config, objective=other), tmp_path / "refused")
    fewer = replace(config, model=DeiTConfig(**SMALL | {"num_labels": 4}))
    with pytest.raises(UserError, match="3 classes"):
        ft.train(fewer, tmp_path / "refused")


@pytest.mark.slow
def test_a_resumed_student_of_texts_equals_an_uninterrupted_one(
    tmp_path, one_device, compiled_once
):
    saved_run(classifier(tmp_path), tmp_path / "teacher")
    objective = DistilledSequenceClassification(
        teacher=str(tmp_path / "teacher"), distillation="soft", share=0.9
    )
    config = replace(classifier(tmp_path), objective=objective)
    phases = (replace(config.phases[0], steps=4),)
    ft.train(replace(config, phases=phases), tmp_path / "whole")
    ft.train(config, tmp_path / "halves")
    ft.train(replace(config, phases=phases), tmp_path / "halves")
    trees = [ft.load_pretrained(tmp_path / name)[1] for name in ("whole", "halves")]
    assert_bit_equal(*trees)

    saved_run(replace(classifier(tmp_path), seed=1), tmp_path / "other")
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "other").rename(tmp_path / "teacher")
    longer = (replace(config.phases[0], steps=6),)
    with pytest.raises(UserError, match="the teacher model .*teacher has other weights than when"):
        ft.train(replace(config, phases=longer), tmp_path / "halves")


def test_a_distillation_token_needs_a_deit(mnist):
    objective = DistilledImageClassification(teacher="t", distillation_token=True, **PIXELS)
    with pytest.raises(UserError, match="needs classify_both"):
        check_config(image_run(mnist, ViTConfig(**SMALL), objective))
    with pytest.raises(UserError, match="a teacher has classes"):
        DistilledSequenceClassification(teacher="t", loss="mse")


def test_the_teacher_has_to_be_a_classifier(tmp_path):
    model = build_model(replace(tiny_bert(), architecture="BertModel"), ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    ft.save_pretrained(tmp_path / "hf", model, params, tokenizer=ByteTokenizer())
    config = classifier(tmp_path)
    config = replace(
        config, objective=DistilledSequenceClassification(teacher=str(tmp_path / "hf"))
    )
    with pytest.raises(UserError, match="which is no classifier"):
        teacher(config, prepared_data(config.data))


def test_a_published_teacher_has_to_read_pixels_as_the_student_does(
    mnist, tmp_path, monkeypatch, caplog
):
    shown = {"num_channels": 3, "architecture": "ViTForImageClassification"}
    model = build_model(ViTConfig(**SMALL | shown), ComputeConfig())
    folder = tmp_path / "hf"
    ft.save_pretrained(folder, model, drawn_parameters(model, parameter_shapes(model)))
    objective = DistilledImageClassification(teacher=str(folder), mean=(0.5,), std=(0.25,))
    config = image_run(mnist, DeiTConfig(**SMALL | {"num_channels": 3}), objective)
    config = replace(config, data=replace(config.data, channels=3))
    prepared = prepared_data(config.data)
    assert teacher(config, prepared) is not None  # the folder does not say what it reads
    described = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    assert teacher(config, prepared) is not None
    described["image_std"] = [0.5] * 3
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"with objective.std \(0.5, 0.5, 0.5\), the student has"):
        teacher(config, prepared)
    began = epath.Path(tmp_path / "run")  # by a version that compared nothing
    monkeypatch.setattr(runtime, "has_checkpoint", lambda workdir: True)
    assert teacher(config, prepared, began) is not None
    assert "a new run needs the same" in caplog.text


def test_the_teacher_has_to_frame_texts_as_the_student_does(tmp_path, monkeypatch, caplog):
    config = classifier(tmp_path)
    roberta = tiny_architecture("RobertaForSequenceClassification", vocab_size=384)
    model = build_model(replace(roberta, label_names=()), ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    published, saved = str(tmp_path / "hf"), str(tmp_path / "teacher")
    ft.save_pretrained(published, model, params, tokenizer=ByteTokenizer())
    data = replace(config.data, tokenizer=TokenizerConfig(path=published))
    prepared = prepared_data(replace(data, store=str(tmp_path / "other")))
    taught = DistilledSequenceClassification(teacher=published, framing="roberta")
    assert teacher(replace(config, objective=taught), prepared) is not None
    wrong = replace(config, objective=replace(taught, framing="bert"))
    with pytest.raises(UserError, match="framing 'roberta', .* set --objective.framing roberta"):
        teacher(wrong, prepared)
    began = epath.Path(tmp_path / "run")  # by a version that compared nothing
    monkeypatch.setattr(runtime, "has_checkpoint", lambda workdir: True)
    assert teacher(wrong, prepared, began) is not None
    assert "a new run needs --objective.framing roberta" in caplog.text

    # A teacher that was trained here has the framing of its run, not that of its family.
    monkeypatch.undo()
    saved_run(replace(config, objective=replace(config.objective, framing="t5")), Path(saved))
    own = prepared_data(config.data)
    taught = replace(taught, teacher=saved, framing="t5")
    assert teacher(replace(config, objective=taught), own) is not None
    with pytest.raises(UserError, match="set --objective.framing t5"):
        teacher(replace(config, objective=replace(taught, framing="bert")), own)

    # So does its export, whose tokenizer has the special tokens of the run.
    main(["convert", saved, str(tmp_path / "exported")])
    taught = replace(taught, teacher=str(tmp_path / "exported"))
    own = replace(own, tokenizer=load_tokenizer(tmp_path / "exported"))
    assert teacher(replace(config, objective=taught), own) is not None
    with pytest.raises(UserError, match="set --objective.framing t5"):
        teacher(replace(config, objective=replace(taught, framing="bert")), own)

    # An objective that is not registered here tells nothing, but the run's tokenizer does.
    monkeypatch.setattr(StoredModel, "of_run", unregistered)
    taught = replace(taught, teacher=saved)
    assert teacher(replace(config, objective=taught), prepared_data(config.data)) is not None


def unregistered(self, name):
    raise UnregisteredType("mine.Objective")


def test_the_teacher_has_to_read_sequences_as_long_as_the_student(tmp_path):
    config = classifier(tmp_path)
    longest = config.phases[0].sequence_length
    for limit in (longest, longest - 1):
        folder = str(tmp_path / f"hf{limit}")
        model = build_model(replace(config.model, max_positions=limit), ComputeConfig())
        params = drawn_parameters(model, parameter_shapes(model))
        ft.save_pretrained(folder, model, params, tokenizer=ByteTokenizer())
        data = replace(config.data, tokenizer=TokenizerConfig(path=folder), store=f"{folder}.store")
        prepared = prepared_data(data)
        taught = replace(config, objective=DistilledSequenceClassification(teacher=folder))
        if limit == longest:
            assert teacher(taught, prepared) is not None
    with pytest.raises(UserError, match=f"reads {longest - 1} tokens, but sequences have"):
        teacher(taught, prepared)
