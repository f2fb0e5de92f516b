"""What convert writes beside a run's weights for pipelines of transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from etils import epath

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.checkpointing.step_directories import SavedStep
from flax_transformers.cli.main import main
from flax_transformers.config_json import to_json
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.image_text import ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import Crop, published_preprocessing
from flax_transformers.export import (
    Exporter,
    as_transformers_reads_it,
    files_beside,
    preprocessor,
    run_files,
    with_ids_of,
    write_run,
)
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.coatnet import CoAtNetConfig
from flax_transformers.families.deit3 import DeiT3Config
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.families.mae import MaeConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import build_model, config_json, within_vocabulary
from flax_transformers.huggingface.generation_settings import settings_json
from flax_transformers.models.config import ComputeConfig, Rope
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.labelled import framed_row
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.restore import with_prompts
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training.config import ImagePhase, Phase
from tests.cli.test_evaluate import classifier
from tests.evaluation.test_reconstructions import masked_config
from tests.huggingface.tensors import drawn_model, drawn_parameters, parameter_shapes

VIT = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3, "hidden_size": 8,
    "num_layers": 1, "num_heads": 2, "intermediate_size": 8,
    "architecture": "ViTForImageClassification",
}  # fmt: skip


def test_exported_preprocessing_equals_that_of_evaluation():
    data = ImageData(source=ImageSource("x"), crop_fraction=0.875)
    found = preprocessor(data, ImageClassification(), ViTConfig(image_size=224))
    assert found == {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def test_one_mean_for_all_channels_is_written_for_each():
    pixels = ImageClassification(mean=(0.5,), std=(0.25,))
    data = ImageData(source=ImageSource("x"), crop_fraction=1.0)
    found = preprocessor(data, pixels, ViTConfig(image_size=28, patch_size=7))
    assert found["image_mean"] == [0.5] * 3 and found["image_std"] == [0.25] * 3
    assert found["size"] == {"shortest_edge": 28}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        CoAtNetConfig(
            image_size=32, num_channels=1, stem_widths=(8, 8), stage_widths=(8, 8, 16, 16),
            stage_depths=(1, 1, 1, 1), head_dim=8,
        ),
        DeiT3Config(
            image_size=32, num_channels=1, hidden_size=8, num_layers=1, num_heads=2,
            intermediate_size=16,
        ),
    ],
    ids=["CoAtNet", "DeiT III"],
)  # fmt: skip
def test_the_config_of_timm_has_the_preprocessing_of_the_run(tmp_path, model):
    data = ImageData(source=ImageSource("x"), crop_fraction=0.875)
    pixels = ImageClassification(mean=(0.1,), std=(0.3,))
    found = files_beside(data, pixels, model, None)
    built = build_model(model)
    params = drawn_parameters(built, parameter_shapes(built))
    step = run_of(to_json(data), to_json(pixels))
    step.folder = tmp_path
    *_, names = write_run(tmp_path / "timm", built, params, step)
    assert names == ["preprocessor_config.json", "README.md"]
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    cfg = described["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ([0.1], [0.3], 0.875)
    assert cfg == found["config.json"]["pretrained_cfg"] and cfg["input_size"] == [1, 32, 32]
    config = ft.load_pretrained(tmp_path / "timm")[0].config
    objective, crop = published_preprocessing(tmp_path / "nothing", config)
    assert (objective.mean, objective.std) == ((0.1,), (0.3,))
    assert crop == Crop(0.875, 0.875, keeps_ratio=True)


@pytest.mark.slow
def test_a_run_whose_last_phase_has_larger_images_is_exported_for_these(tmp_path):
    model = build_model(ViTConfig(**VIT), ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    phases = tuple(ImagePhase(steps=1, image_size=side, batch_size=8) for side in (8, 12))
    pixels = ImageClassification(mean=(0.5,), std=(0.5,))
    config = masked_config("x", model=model.config, objective=pixels, phases=phases)
    step = run_of(to_json(config.data), to_json(pixels), to_json(phases))
    step.folder = tmp_path
    written, larger, _ = write_run(tmp_path / "hf", model, params, step)
    assert written.config.image_size == 12
    described = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert described["crop_size"] == {"height": 12, "width": 12}
    loaded, found = ft.load_pretrained(tmp_path / "hf")
    assert loaded.config.image_size == 12
    assert_bit_equal(found, larger)
    images = np.random.default_rng(0).standard_normal((2, 1, 12, 12), np.float32)
    trained = jax.jit(partial(model.apply, interpolate_pos_encoding=True))
    expected = trained({"params": params}, images).logits
    logits = jax.jit(loaded.apply)({"params": found}, images).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    Exporter(config, model, epath.Path(tmp_path), {})._write(2, params)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        exported = (tmp_path / "exports" / "2" / name).read_bytes()
        assert exported == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.slow
def test_pairs_of_larger_images_are_exported_for_these(tmp_path):
    model, params = drawn_model("CLIPModel")
    data = ImageTextData(source=ImageSource("x", caption_field="text"))
    objective = ImageTextContrastive(image_size=48)
    phases = (Phase(steps=1, sequence_length=8, batch_size=8),)
    step = run_of(to_json(data), to_json(objective), to_json(phases))
    step.folder = tmp_path
    write_run(tmp_path / "hf", model, params, step)
    loaded, found = ft.load_pretrained(tmp_path / "hf")
    assert loaded.config.vision.image_size == 48
    images = np.random.default_rng(0).standard_normal((2, 3, 48, 48), np.float32)
    expected = embedded(model, params, images, interpolate_pos_encoding=True)
    np.testing.assert_allclose(embedded(loaded, found, images), expected, rtol=1e-5, atol=1e-6)
    again = ft.load_pretrained(tmp_path / "hf", image_size=model.config.vision.image_size)[0]
    assert again.config.vision.image_size == model.config.vision.image_size


def embedded(model, params, images, **options):
    embed = partial(model.apply, method="embed_image", **options)
    return jax.jit(embed)({"params": params}, images)


def run_of(data, objective, phases=None):
    """A checkpoint of a run, whose model, optimizer and, by default, phases cannot be read here."""
    rest = {"type": "elsewhere:Model"}
    return SimpleNamespace(
        meta={
            "config": {
                "type": "train_config", "format": 2, "data": data, "objective": objective,
                "model": rest, "optimizer": rest, "phases": phases or [rest],
            }
        }
    )  # fmt: skip


def test_of_a_run_of_images_only_the_data_and_the_objective_are_read():
    data = ImageData(source=ImageSource("x"), crop_fraction=0.875)
    run = run_of(to_json(data), to_json(ImageClassification()))
    model = ViTConfig(image_size=224)
    assert run_files(run, model, None) == {
        "preprocessor_config.json": preprocessor(data, ImageClassification(), model)
    }


def test_with_a_custom_objective_no_preprocessor_is_written_and_a_warning_logged(caplog):
    data = to_json(ImageData(source=ImageSource("x")))
    run = run_of(data, {"type": "mine:Own"})
    assert run_files(run, ViTConfig(image_size=224), None) == {}
    assert "preprocessor_config.json is not written: the saved config uses Own of" in caplog.text


def test_the_data_of_a_run_on_text_are_not_read(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    run = run_of({"type": "mine:Data"}, {"type": "mine:Own"})
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {
        "tokenizer_config.json": {"model_max_length": 64}
    }


def test_the_length_limit_is_added_to_a_tokenizer_without_one(tmp_path):
    run = SimpleNamespace(meta={})
    file = tmp_path / "tokenizer_config.json"
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {}
    file.write_text(json.dumps({"do_lower_case": True}))
    assert run_files(run, BertConfig(max_positions=64), tmp_path) == {
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 64}
    }
    file.write_text(json.dumps({"model_max_length": 32}))
    written = run_files(run, BertConfig(max_positions=64), tmp_path)
    assert written["tokenizer_config.json"] == {"model_max_length": 32}
    assert run_files(run, T5Config(), tmp_path) == {}  # it has no limit


def test_the_written_length_limit_is_that_of_the_config_without_its_scaling(tmp_path):
    """Of linear scaling a config does not tell whether its length is that before or after it."""
    config = LlamaConfig(max_positions=64, rope=Rope(scaling="linear", factor=4.0))
    ByteTokenizer().save(tmp_path / "saved")
    exported = as_transformers_reads_it(tmp_path / "saved", config, tmp_path, None)
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 64
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert run_files(SimpleNamespace(meta={}), config, tmp_path) == {
        "tokenizer_config.json": {"model_max_length": 64}
    }


@pytest.mark.parametrize("config", [GPT2Config(vocab_size=300), LlamaConfig(vocab_size=2)])
def test_no_id_beyond_the_vocabulary_is_written(config):
    config = within_vocabulary(config)
    described = config_json(config)
    settings = settings_json(config, None) or {}
    assert described["eos_token_id"] is None and "eos_token_id" not in settings
    size = config.vocab_size
    assert (described["bos_token_id"] or 0) < size and settings.get("bos_token_id", 0) < size


def test_ids_of_the_vocabulary_stay():
    config = GPT2Config(vocab_size=300, bos_id=4, eos_ids=(5, 50256))
    assert within_vocabulary(config).eos_ids == (5,) and within_vocabulary(config).bos_id == 4
    assert within_vocabulary(GPT2Config()) == GPT2Config()


def test_ids_that_are_missing_come_from_the_tokenizer(tmp_path, monkeypatch):
    from flax_transformers import export as module

    vocabulary = SimpleNamespace(bos_id=1, end_id=2)
    monkeypatch.setattr(
        module, "load_tokenizer", lambda folder: SimpleNamespace(vocabulary=vocabulary)
    )
    small = GPT2Config(vocab_size=300, hidden_size=8, num_heads=2, num_layers=1)
    model = with_ids_of(build_model(small, ComputeConfig()), tmp_path)
    assert (model.config.bos_id, model.config.eos_ids) == (1, (2,))
    kept = GPT2Config(vocab_size=300, hidden_size=8, num_heads=2, bos_id=None, eos_ids=(7,))
    assert with_ids_of(build_model(kept, ComputeConfig()), tmp_path).config == kept


def exporting_run(tmp_path, **settings):
    """A config of four steps, of the kind of run that test_evaluate trains."""
    config = classifier(tmp_path)
    phases = (replace(config.phases[0], steps=4),)
    kept = CheckpointConfig(every_steps=1, keep_latest=4, **settings)
    return replace(config, phases=phases, checkpoints=kept)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device, compiled_once):
    """The workdir of such a run, which keeps two exports."""
    folder = tmp_path_factory.mktemp("exporting")
    ft.train(exporting_run(folder, export_every=1, keep_exports=2), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_a_run_exports_what_convert_writes_and_keeps_the_newest(run, tmp_path):
    exports = run / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["3", "4"]
    step = f"{run}/checkpoints/3"
    assert main(["convert", step, str(tmp_path / "converted")]) == 0
    names = sorted(path.name for path in (tmp_path / "converted").iterdir())
    assert sorted(path.name for path in (exports / "3").iterdir()) == names
    for name in names:
        assert (exports / "3" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("noted", [True, False])
def test_the_tokenizer_of_a_converted_classifier_frames_texts_as_in_training(run, tmp_path, noted):
    """Also of a checkpoint of an earlier version, which did not note the special tokens."""
    saved = find_checkpoint(run)
    shutil.copytree(saved.folder, tmp_path / "4")
    file = tmp_path / "4" / "tokenizer" / "tokenizer_config.json"
    described = json.loads(file.read_text())
    if not noted:
        del described["flax_transformers"]["frame"]
        del described["flax_transformers"]["before_second"]
    file.write_text(json.dumps(described))
    model, params = ft.load_pretrained(saved)
    write_run(tmp_path / "hf", model, params, replace(saved, folder=epath.Path(tmp_path / "4")))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    vocabulary = ByteTokenizer().vocabulary
    ids = [np.frombuffer(text, np.uint8) + 3 for text in (b"a b", b"c")]
    for texts in (ids[:1], ids):
        row, _ = framed_row(texts, "bert", vocabulary, 16)
        encoded = backend.encode("a b", *["c"][: len(texts) - 1])
        used = row["attention_mask"] > 0
        assert encoded.ids == row["input_ids"][used].tolist()
        assert encoded.type_ids == row["token_type_ids"][used].tolist()
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.slow
def test_prompts_that_transformers_reads_in_another_way_are_warned_of(tmp_path, caplog):
    model, params = drawn_model("GPT2LMHeadModel")
    for objective, flag in ((CausalLM(), None), (PrefixLM(), True)):
        assert "causally" not in caplog.text
        config = to_json(with_prompts(model.config, objective))
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / "metadata").write_text(json.dumps({"model": config}))
        found = SavedStep(1, epath.Path(tmp_path), True)
        written = model.clone(config=with_prompts(model.config, objective))
        write_run(tmp_path / objective.loss_name, written, params, found)
        file = tmp_path / objective.loss_name / "generation_config.json"
        described = json.loads(file.read_text())
        assert described.get("bidirectional_prompt") is flag
        assert described["eos_token_id"] == model.config.eos_ids[0]
    assert "its class in transformers reads prompts causally" in caplog.text


@pytest.mark.slow
def test_an_average_of_checkpoints_is_the_mean_of_their_weights(run, tmp_path, capsys):
    run = str(run)
    trees = [ft.load_pretrained(f"{run}/checkpoints/{step}")[1] for step in (2, 3, 4)]
    for average, used in (("2", trees[1:]), ("2,4", trees[::2]), ("3", trees)):
        out = str(tmp_path / f"average{average}")
        assert main(["convert", run, out, "--average", average]) == 0
        card = (Path(out) / "README.md").read_text()
        steps = {"2": "3, 4", "2,4": "2, 4", "3": "2, 3, 4"}[average]
        assert f"| average of the steps | {steps} |" in card and "Held-out" not in card
        model, found = ft.load_pretrained(out)
        words = model.config.vocab_size  # rows of the table from here on are not exported
        leaves = [[leaf[:words] for leaf in jax.tree.leaves(tree)] for tree in (found, *used)]
        for own, *theirs in zip(*leaves, strict=True):
            np.testing.assert_allclose(own, np.mean(theirs, 0), 1e-6, 1e-6)
    for average in ("1", "9", "2,9", "x", "2,2"):
        capsys.readouterr()
        assert main(["convert", run, str(tmp_path / "none"), "--average", average]) == 2
        said = capsys.readouterr().err
        assert f"--average {average} asks" in said or f"--average is {average!r}" in said
        assert not (tmp_path / "none").exists()


def test_what_cannot_be_written_is_a_warning_and_later_exports_are_removed(tmp_path, caplog):
    config = exporting_run(tmp_path, export_every=1)
    model = build_model(config.model, ComputeConfig())
    exporter = Exporter(config, model, epath.Path(tmp_path), {})
    (tmp_path / "exports").write_text("in the way")
    params = drawn_parameters(model, parameter_shapes(model))
    exporter.on_step(3, SimpleNamespace(evaluation_params=params))
    assert "step 3 is not exported" in caplog.text
    (tmp_path / "exports").unlink()
    for step in (900, 1000):  # of a run that went further before it returned to a checkpoint
        (tmp_path / "exports" / str(step)).mkdir(parents=True)
    for step in (3, 6):
        exporter.on_step(step, SimpleNamespace(evaluation_params=params))
    assert sorted(folder.name for folder in (tmp_path / "exports").iterdir()) == ["3", "6"]


def test_an_export_of_the_same_step_is_kept_until_the_new_one_is_complete(tmp_path, caplog):
    config = exporting_run(tmp_path, export_every=1)
    model = build_model(config.model, ComputeConfig())
    exporter = Exporter(config, model, epath.Path(tmp_path), {})
    params = drawn_parameters(model, parameter_shapes(model))
    earlier = tmp_path / "exports" / "3" / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    shutil.copytree(earlier.parent, tmp_path / "exports" / ".3.old")  # of a process that was killed
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    exporter.on_step(3, SimpleNamespace(evaluation_params=broken))
    assert "step 3 is not exported" in caplog.text and earlier.exists()
    exporter.on_step(3, SimpleNamespace(evaluation_params=params))
    assert [folder.name for folder in (tmp_path / "exports").iterdir()] == ["3"]
    assert not earlier.exists() and (earlier.parent / "config.json").exists()


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ([".3.old"], {"3": ".3.old"}),
        ([".3.new", ".3.old"], {"3": ".3.new"}),
        (["3", ".3.new", ".3.old"], {"3": "3"}),
        (["6", ".3.new", "..6.new.123.tmp"], {"3": ".3.new", "6": "6"}),
        ([], {}),
    ],
)
def test_a_run_recovers_the_exports_of_a_process_that_was_killed(tmp_path, left, kept):
    config = exporting_run(tmp_path, export_every=1)
    model = build_model(config.model, ComputeConfig())
    exporter = Exporter(config, model, epath.Path(tmp_path), {})
    for name in left:
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "file").write_text(name)
    exporter.on_train_begin(2, 4)
    found = (tmp_path / "exports").glob("*")
    assert {one.name: (one / "file").read_text() for one in found} == kept


def test_a_model_without_a_class_of_transformers_is_refused_before_training(tmp_path):
    config = exporting_run(tmp_path, export_every=1)
    model = MaeConfig(architecture="ViTMAEForImageClassification", image_size=32)
    with pytest.raises(UserError, match="transformers has no class"):
        Exporter(replace(config, model=model), None, epath.Path(tmp_path), {})
    with pytest.raises(UserError, match="writes to local folders"):
        Exporter(config, None, epath.Path("gs://bucket/run"), {})
