"""A run of every small recipe's shape, after one step, in what transformers has for its task."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

import flax_transformers as ft
from flax_transformers.cli.config_file import load_config
from flax_transformers.cli.main import main
from flax_transformers.data.images.augmentation import centre_crop
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.post_training.chat_data import ChatData
from tests.families.parity import first_by_default
from tests.parity.recipe_data import TAGS, WORDS, data_arguments

CONFIGS = Path(__file__).parents[2] / "configs"
WIDEST = 256
"""Width of the largest models that a recipe trains in minutes on two CPU cores."""
ONE_STEP = (
    *("--phases.0.steps", "1", "--phases.0.batch-size", "8", "--evaluation.batch-size", "8"),
    *("--optimizer.schedule.warmup-steps", "0", "--evaluation.max-examples", "8"),
)
TEXT = f"{WORDS[0].capitalize()} {WORDS[1]} {WORDS[2]} {WORDS[3]}."
TASKS = {
    "fill-mask": ("ForMaskedLM", "BertForPreTraining"),
    "text-generation": ("ForCausalLM", "LMHeadModel"),
    "sequence-to-sequence": ("ForConditionalGeneration", "MTModel"),
    "token-classification": ("ForTokenClassification",),
    "text-classification": ("ForSequenceClassification",),
    "question-answering": ("ForQuestionAnswering",),
    "image-classification": ("ForImageClassification",),
    "image-feature-extraction": ("MAEForPreTraining",),
    "zero-shot-image-classification": ("CLIPModel",),
}
"""Ends of names of architectures by task; transformers 5 has pipelines for all but two of them."""


def is_whole(name, config):
    """Whether a recipe trains alone, on data that ``recipe_data`` can make, what can be exported.

    Conversations are compared in test_chat and test_post_training, videos in test_live.
    """
    alone = config.init_from is None and not hasattr(config.objective, "teacher")
    text = (CONFIGS / f"{name}.py").read_text()
    return (
        alone
        and not isinstance(config.data, ChatData | SignalData)
        and "Cannot be exported" not in text
    )


def small_recipes():
    """The configs of recipes of small models by name."""
    before = list(sys.path)
    configs = {file.stem: load_config(str(file), []) for file in sorted(CONFIGS.glob("*.py"))}
    sys.path[:] = before  # where config files put their folder
    return {
        name: one
        for name, one in configs.items()
        if one.model.hidden_size <= WIDEST and is_whole(name, one)
    }


RECIPES = small_recipes()


def recipes(task):
    """Names of the small recipes of a task."""
    return [name for name, one in RECIPES.items() if one.model.architecture.endswith(TASKS[task])]


def exported(recipe, folder):
    """The folder that a run of a recipe is converted to, with transformers' own outputs."""
    config = RECIPES[recipe]
    run = ["train", str(CONFIGS / f"{recipe}.py"), "--workdir", str(folder / "run")]
    assert main([*run, *data_arguments(config, folder), *ONE_STEP]) == 0
    assert main(["convert", str(folder / "run"), str(folder / "out")]) == 0
    return str(folder / "out")


def assert_limits_texts(tokenizer, recipe):
    """The tokenizer knows how many positions the model has."""
    limit = RECIPES[recipe].model.max_positions
    assert limit is None or tokenizer.model_max_length == limit


def test_every_small_recipe_has_a_task_and_every_task_a_recipe():
    found = [recipes(task) for task in TASKS]
    assert all(found)
    assert sorted(name for names in found for name in names) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", first_by_default(recipes("fill-mask")))
def test_a_masked_language_model_fills_masks(tmp_path, recipe):
    fill = transformers.pipeline("fill-mask", model=exported(recipe, tmp_path))
    found = fill(f"{WORDS[0]} {fill.tokenizer.mask_token} {WORDS[1]}", top_k=3)
    assert len(found) == 3 and all(one["token_str"] for one in found)
    assert_limits_texts(fill.tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("text-generation")))
def test_a_language_model_continues_a_text(tmp_path, recipe):
    write = transformers.pipeline("text-generation", model=exported(recipe, tmp_path))
    [found] = write(TEXT, max_new_tokens=6, do_sample=False)
    assert found["generated_text"].startswith(TEXT)
    assert_limits_texts(write.tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("sequence-to-sequence")))
def test_an_encoder_decoder_writes_a_text(tmp_path, recipe):
    out = exported(recipe, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == TEXT
    written = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6
    )
    assert written[0, 0] == model.config.decoder_start_token_id
    assert isinstance(tokenizer.decode(written[0], skip_special_tokens=True), str)
    assert_limits_texts(tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("token-classification")))
def test_a_tagger_tags_every_token(tmp_path, recipe):
    tag = transformers.pipeline("token-classification", model=exported(recipe, tmp_path))
    found = tag(TEXT)
    assert {one["entity"] for one in found} <= set(TAGS) and len(found) >= 4
    assert_limits_texts(tag.tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("text-classification")))
def test_a_classifier_names_the_class_of_a_text(tmp_path, recipe):
    classify = transformers.pipeline("text-classification", model=exported(recipe, tmp_path))
    found = classify(TEXT, top_k=None)
    assert {one["label"] for one in found} == set(TAGS)
    assert_limits_texts(classify.tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("question-answering")))
def test_a_reader_marks_an_answer(tmp_path, recipe):
    out = exported(recipe, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(out)
    inputs = tokenizer(WORDS[0], TEXT, return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert found.start_logits.shape == found.end_logits.shape == inputs["input_ids"].shape
    assert_limits_texts(tokenizer, recipe)


@pytest.mark.parametrize("recipe", first_by_default(recipes("image-classification")))
def test_an_image_classifier_sees_an_image(tmp_path, recipe):
    classify = transformers.pipeline("image-classification", model=exported(recipe, tmp_path))
    found = classify(grey_image(), top_k=10)
    assert len(found) == 10 and abs(sum(one["score"] for one in found) - 1) < 1e-5
    assert classify.image_processor.size["shortest_edge"] == RECIPES[recipe].model.image_size


@pytest.mark.parametrize("recipe", first_by_default(recipes("image-feature-extraction")))
def test_an_autoencoder_gives_features_of_an_image(tmp_path, recipe):
    extract = transformers.pipeline("image-feature-extraction", model=exported(recipe, tmp_path))
    [found] = extract(grey_image())
    assert len(found[0]) == RECIPES[recipe].model.hidden_size


def grey_image():
    return PIL.Image.fromarray(np.full((40, 30), 90, np.uint8))


@pytest.mark.parametrize("recipe", first_by_default(recipes("zero-shot-image-classification")))
def test_a_model_of_images_and_texts_ranks_texts_as_here(tmp_path, recipe):
    out, names = exported(recipe, tmp_path), ["zero", "uno", "drei"]
    rank = transformers.pipeline("zero-shot-image-classification", model=out)
    found = {
        one["label"]: one["score"]
        for one in rank(grey_image(), candidate_labels=names, hypothesis_template="{}")
    }
    config, (model, params) = RECIPES[recipe], ft.load_pretrained(out)
    tokenizer = load_tokenizer(str(tmp_path / "run" / "checkpoints" / "1" / "tokenizer"))
    rows = [
        config.objective.prepare_text(tokens, tokenizer.vocabulary, 24)["input_ids"]
        for tokens in tokenizer.encode_batch(names)
    ]
    grey = centre_crop(np.full((40, 30, 3), 90, np.uint8), 28).transpose(2, 0, 1)[None]
    output = model.apply({"params": params}, np.stack(rows), config.objective.normalized(grey))
    expected = np.exp(output.logits_per_image[0])
    np.testing.assert_allclose(
        [found[name] for name in names], expected / expected.sum(), atol=2e-5
    )
    assert_limits_texts(rank.tokenizer, recipe)
