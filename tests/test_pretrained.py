"""What is done with weights besides reading them: images of another size, classes in an order."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import flax_transformers as ft
from flax_transformers.checkpointing.step_directories import SavedStep
from flax_transformers.config_json import to_json
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import config_json
from flax_transformers.huggingface.generation_settings import settings_json
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.models.vision import change_image_size
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.pretrained import (
    describe_pretrained,
    evaluated_model,
    find_pretrained,
    initial_model,
    initial_parameters,
    is_checkpoint,
)
from flax_transformers.testing import assert_bit_equal, tiny_architecture, tiny_bert
from tests.huggingface.tensors import drawn_model


@pytest.mark.slow
def test_a_model_for_small_images_is_loaded_for_large_ones(tmp_path):
    model, params = drawn_model("ViTForImageClassification", image_size=32)
    ft.save_pretrained(tmp_path / "vit", model, params)
    larger, resized = ft.load_pretrained(tmp_path / "vit", image_size=(48, 64))
    images = np.zeros((1, 3, 48, 64), np.float32)
    assert jax.jit(larger.apply)({"params": resized}, images).logits.shape == (1, 2)
    expected = change_image_size(model.config, params, (48, 64))[1]
    assert_bit_equal(resized, expected)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, resized)]
    assert sizes[1] - sizes[0] == 32 * (6 * 8 - 4 * 4)


@pytest.mark.slow
def test_a_tokenizer_that_transformers_would_replace_is_noticed(tmp_path, caplog):
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
        assert "AutoTokenizer" not in caplog.text
        ft.save_pretrained(tmp_path / name, *drawn_model(name), tokenizer=ByteTokenizer())
    assert "AutoTokenizer of transformers takes every tokenizer of a qwen2 model" in caplog.text


@pytest.mark.slow
def test_a_text_model_has_no_image_size(tmp_path):
    ft.save_pretrained(tmp_path / "gpt2", *drawn_model("GPT2LMHeadModel"))
    with pytest.raises(UserError, match="GPT2LMHeadModel, which sees no images"):
        ft.load_pretrained(tmp_path / "gpt2", image_size=32)


@pytest.mark.slow
def test_a_head_is_not_taken_over_for_its_classes_in_another_order(tmp_path):
    model, params = drawn_model(
        "BertForSequenceClassification", num_labels=3, label_names=("no", "maybe", "yes")
    )
    ft.save_pretrained(tmp_path / "bert", model, params)
    other = dataclasses.replace(model.config, label_names=("maybe", "no", "yes"))
    with pytest.raises(UserError, match="in the order no, maybe, yes, the data in the order maybe"):
        initial_parameters(tmp_path / "bert", other, make_mesh(MeshConfig()), seed=0)


def described(**changes):
    return dataclasses.replace(tiny_bert(), **changes)


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A folder with a published model that is wider than the config's."""
    folder = tmp_path_factory.mktemp("wider")
    model, params = drawn_model("BertForMaskedLM", hidden_size=48, num_heads=6, vocab_size=262)
    ft.save_pretrained(folder / "hf", model, params)
    return str(folder / "hf")


def test_a_run_takes_its_model_from_the_weights_that_it_starts_from(wider, caplog):
    caplog.set_level("INFO", "flax_transformers")
    config = described(
        architecture="BertForSequenceClassification", num_labels=5, dropout=0.3, num_layers=7
    )
    model = initial_model(wider, config)
    assert (model.hidden_size, model.num_heads, model.num_layers) == (48, 6, 2)
    assert (model.architecture, model.num_labels, model.dropout) == (config.architecture, 5, 0.3)
    assert f"the model is that of --init-from {wider}, not the config's: " in caplog.text
    assert "hidden_size 48" in caplog.text and "num_layers 2" in caplog.text


@pytest.mark.slow
def test_the_type_of_a_problem_is_that_of_the_run_and_not_of_its_first_weights(tmp_path):
    model, params = drawn_model(
        "BertForSequenceClassification", problem_type="multi_label_classification"
    )
    ft.save_pretrained(tmp_path / "hf", model, params)
    found = initial_model(tmp_path / "hf", dataclasses.replace(model.config, problem_type=None))
    assert found.problem_type is None and "problem_type" not in config_json(found)
    given = initial_model(tmp_path / "hf", model.config, {"problem_type"})
    assert given.problem_type == "multi_label_classification"
    other = dataclasses.replace(model.config, problem_type="regression")
    assert initial_model(tmp_path / "hf", other, {"problem_type"}).problem_type == "regression"


def test_a_field_of_the_command_line_must_agree_with_the_weights(wider):
    assert initial_model(wider, described(hidden_size=48), {"hidden_size"}).num_heads == 6
    with pytest.raises(UserError) as caught:
        initial_model(wider, described(hidden_size=64), {"hidden_size"})
    assert str(caught.value) == (
        f"--init-from {wider} holds a model whose hidden_size is 48, but --model.hidden-size asks "
        "for 64; leave --model.hidden-size out, or start from other weights"
    )


def decoding(**changes):
    model = tiny_architecture("MarianMTModel")
    return dataclasses.replace(model, generation=GenerationSettings(**changes))


def test_the_generation_settings_of_a_config_go_before_those_of_the_weights(caplog, tmp_path):
    caplog.set_level("INFO", "flax_transformers")
    found, config = decoding(num_beams=6, max_length=512), decoding(num_beams=1)
    model, params = drawn_model("MarianMTModel", generation=found.generation)
    ft.save_pretrained(tmp_path / "hf", model, params)
    for one in (
        initial_model(tmp_path / "hf", config, {"generation"}),
        evaluated_model(found, config, {"generation"}, "hf"),
    ):
        assert (one.generation.num_beams, one.generation.max_length) == (1, 512)
    assert "generation settings of the config over those of hf: num_beams 1" in caplog.text
    kept = evaluated_model(found, decoding(), set(), "hf")
    assert kept == evaluated_model(found, tiny_bert(), set(), "hf") == found


BASE_IDS = dataclasses.replace(
    tiny_architecture("LlamaForCausalLM"),
    bos_id=5,
    eos_ids=(6,),
    generation=GenerationSettings(bos_token_id=5, eos_token_id=6, top_p=0.9),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a language model that ends its texts with id 6."""
    ids = {name: getattr(BASE_IDS, name) for name in ("bos_id", "eos_ids", "generation")}
    folder = tmp_path_factory.mktemp("base") / "hf"
    ft.save_pretrained(folder, *drawn_model("LlamaForCausalLM", **ids))
    return folder


def test_a_run_ends_text_with_the_ids_of_its_recipe_that_extend_those_of_the_weights(base):
    recipe = dataclasses.replace(BASE_IDS, eos_ids=(6, 9), generation=GenerationSettings())
    model = initial_model(base, recipe)
    assert (model.bos_id, model.eos_ids) == (5, (6, 9))
    assert (model.generation.eos_ids, model.generation.top_p) == ((6, 9), 0.9)
    assert settings_json(model, None)["eos_token_id"] == [6, 9]
    assert config_json(model)["eos_token_id"] == [6, 9]
    initial_parameters(base, model, make_mesh(MeshConfig()), seed=0)
    for ids in ((9,), (), (9, 10)):  # of a recipe for another vocabulary
        other = dataclasses.replace(recipe, bos_id=9, eos_ids=ids)
        assert initial_model(base, other) == initial_model(base, BASE_IDS)


def test_begin_and_end_ids_of_the_command_line_hold_for_a_run_from_weights(base):
    config = dataclasses.replace(BASE_IDS, bos_id=8, eos_ids=(9,), generation=GenerationSettings())
    model = initial_model(base, config, {"bos_id", "eos_ids"})
    assert (model.bos_id, model.eos_ids) == (8, (9,))
    assert (model.generation.bos_token_id, model.generation.eos_ids) == (8, (9, 6))
    initial_parameters(base, model, make_mesh(MeshConfig()), seed=0)
    begins = dataclasses.replace(config, eos_ids=(6,))
    assert initial_model(base, begins, {"bos_id", "eos_ids"}).generation.eos_ids == (6,)
    own = dataclasses.replace(config, generation=GenerationSettings(eos_token_id=9))
    assert initial_model(base, own, {"eos_ids", "generation"}).generation.eos_ids == (9,)


@pytest.mark.slow
def test_end_ids_that_change_the_output_of_a_head_are_those_of_the_weights(tmp_path):
    model, params = drawn_model("BartForSequenceClassification", eos_ids=(2,))
    ft.save_pretrained(tmp_path / "hf", model, params)
    config = dataclasses.replace(model.config, eos_ids=(2, 3))
    assert initial_model(tmp_path / "hf", config).eos_ids == (2,)
    with pytest.raises(UserError, match="--model.eos-ids asks for"):
        initial_model(tmp_path / "hf", config, {"eos_ids"})


def run_of(objective, folder, **changes):
    """A checkpoint, whose weights are missing, of a run with an objective."""
    model = dataclasses.replace(tiny_architecture("GPT2LMHeadModel"), **changes)
    meta = {"config": {"model": to_json(model), "objective": to_json(objective)}}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "metadata").write_text(json.dumps(meta))
    return SavedStep(1, epath.Path(folder), True)


def test_a_run_of_a_prefix_language_model_reads_prompts_as_prefixes(tmp_path):
    causal, prefix = (run_of(one(), tmp_path / one.__name__) for one in (CausalLM, PrefixLM))
    assert describe_pretrained(causal).generation == GenerationSettings()
    described = describe_pretrained(prefix)
    assert described.generation == GenerationSettings(bidirectional_prompt=True)
    # The settings beside the tokenizer of an earlier version are read all the same.
    tokenizer = tmp_path / "PrefixLM" / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "generation_config.json").write_text('{"max_length": 9}')
    settings = describe_pretrained(prefix).generation
    assert (settings.max_length, settings.bidirectional_prompt) == (9, True)


@pytest.mark.slow
def test_prompts_of_a_run_are_read_as_its_own_objective_trains(tmp_path):
    settings = GenerationSettings(bidirectional_prompt=True, top_k=3)
    model, params = drawn_model("GPT2LMHeadModel", generation=settings)
    ft.save_pretrained(tmp_path / "hf", model, params)
    kept = describe_pretrained(find_pretrained(tmp_path / "hf")).generation
    assert (kept.bidirectional_prompt, kept.top_k) == (True, 3)
    one = initial_model(tmp_path / "hf", tiny_architecture("GPT2LMHeadModel")).generation
    assert (one.bidirectional_prompt, one.top_k) == (None, 3)


def test_a_model_is_evaluated_with_no_other_field_of_the_command_line(wider):
    assert evaluated_model(tiny_bert(), described(dropout=0.5), {"dropout"}, "hf") == tiny_bert()
    with pytest.raises(
        UserError, match="hf holds a model whose hidden_size is .*--model.hidden-si"
    ):
        evaluated_model(tiny_bert(), described(hidden_size=96), {"hidden_size"}, "hf")


def test_weights_of_another_family_are_refused_by_the_option(wider):
    gpt2 = tiny_architecture("GPT2LMHeadModel")
    with pytest.raises(UserError, match=f"--init-from {wider} holds a BertForMaskedLM, but the"):
        initial_model(wider, gpt2)
    with pytest.raises(UserError, match="--init-from /no/such is no directory"):
        initial_model("/no/such", tiny_bert())


@pytest.mark.slow
def test_a_folder_named_by_a_number_does_not_make_a_published_model_a_run(wider, tmp_path):
    shutil.copytree(wider, tmp_path / "hf")
    (tmp_path / "hf" / "1").mkdir()
    assert find_pretrained(tmp_path / "hf") == tmp_path / "hf"
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    for run in (tmp_path, tmp_path / "checkpoints"):
        assert is_checkpoint(run)


def test_what_only_tensors_tell_is_part_of_the_model(tmp_path):
    model, params = drawn_model("T5ForConditionalGeneration", tie_embeddings=False)
    ft.save_pretrained(tmp_path / "hf", model, params)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    described = dataclasses.replace(model.config, tie_embeddings=True, num_layers=5)
    found = initial_model(tmp_path / "hf", described)
    assert (found.tie_embeddings, found.num_layers) == (False, 2)
