"""Every recipe in configs/ can be exported, or its docstring says why not."""

from __future__ import annotations

import ast
import math
import re
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from flax_transformers.cli.config_file import load_config
from flax_transformers.errors import UserError
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.parallel.mesh import AXES, resolve_mesh
from flax_transformers.training.setup import check_batches

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.py"))
OTHER_VIT = {
    "vit_s16_imagenet2012", "vit_h14_imagenet2012", "vit_22b_imagenet2012", "vit_mnist_muon",
}  # fmt: skip
OWN = {"modalities_tiny", "modalities_tiny_labels", "modalities_l16"}
NO_CLASS = {
    "minilm_intents", "mae_mnist_labels", "llama_tiny_sorting_ppo", "electra_tiny", "electra_base",
    "coatnet_mnist", "basic_m",
}  # fmt: skip
CANNOT_BE_EXPORTED = OTHER_VIT | OWN | NO_CLASS
SENTENCE = "Cannot be exported: "


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch):
    """Undo what a config file adds to ``sys.path``."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def docstring(recipe):
    return ast.get_docstring(ast.parse(recipe.read_text())) or ""


def test_the_recipes_are_found():
    assert {"modernbert_tiny", "bart_small_books"} <= {recipe.stem for recipe in RECIPES}
    assert {recipe.stem for recipe in RECIPES} >= CANNOT_BE_EXPORTED


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_can_be_exported_or_says_why_not(recipe):
    model = load_config(str(recipe), []).model
    assert (SENTENCE in docstring(recipe)) == (recipe.stem in CANNOT_BE_EXPORTED)
    if recipe.stem in CANNOT_BE_EXPORTED:
        reason = (
            r"^(model\.((pooling|norm|positions) is '(average|mean|rms|sincos_2d)'|strides is)"
            r"|transformers has no class )"
        )
        with pytest.raises(UserError, match=reason):
            config_json(model)
        assert isinstance(model, ViTConfig) == (recipe.stem in OTHER_VIT)
    else:
        assert config_json(model)


@pytest.mark.parametrize("recipe", [*RECIPES, *STUDIES], ids=lambda recipe: recipe.stem)
def test_the_command_of_a_recipe_can_be_pasted(recipe):
    """A line before one that begins with an option ends in a backslash."""
    command = re.search(r"^Command:.*?(?=^[A-Z])", docstring(recipe), re.DOTALL | re.MULTILINE)
    assert command is not None
    assert not re.search(r"[^\\]\n +--", command[0])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_names_itself_in_its_command(recipe):
    assert re.search(rf"flax-transformers \w+ {recipe.stem}\s", docstring(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_batches_of_a_recipe_divide_over_the_slice_that_it_names(recipe):
    grids = re.findall(r"--topology \w+:(\d+(?:x\d+)+)", docstring(recipe))
    counts = re.findall(r"slice of ([\d,]+) chips", docstring(recipe))
    sizes = [math.prod(int(size) for size in grid.split("x")) for grid in grids]
    config = load_config(str(recipe), [])
    for size in {*sizes, *(int(count.replace(",", "")) for count in counts)}:
        mesh = resolve_mesh(config.mesh, size)
        check_batches(config, AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES))


@pytest.mark.parametrize("name", ["siglip_b16", "vit_s16_imagenet2012"])
def test_a_recipe_of_big_vision_decays_weights_as_there(name):
    """There the decay of 1e-4 is not multiplied by the learning rate."""
    optimizer = load_config(name, []).optimizer
    assert optimizer.learning_rate * optimizer.weight_decay == pytest.approx(1e-4)


def test_the_warmup_of_dapo_takes_twenty_rollouts():
    config = load_config("llama3_8b_grpo", [])
    assert config.optimizer.schedule.warmup_steps == 20 * config.objective.rollouts.batches == 320


@pytest.mark.parametrize("name", ["bert_base", "roberta_base", "bart_base", "deberta_v3_base"])
def test_embeddings_decay_where_they_do_in_the_original(name):
    assert load_config(name, []).optimizer.no_decay == ("bias", "scale")


def test_palm_clips_gradients_as_published():
    config = load_config("palm_540b", [])
    assert (config.optimizer.max_grad_norm, config.objective.z_loss) == (1.0, 1e-4)


@pytest.mark.parametrize("name", ["t5_v1_1_base_c4", "mt5_small_mc4", "byt5_small", "mt5_xxl"])
def test_t5_is_trained_with_the_z_loss_of_t5x(name):
    assert load_config(name, []).objective.z_loss == 1e-4


def test_a_recipe_takes_the_minutes_of_the_measured_results():
    results = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    row = r"^\| `(\w+)` \|(?:[^|]*\|){4} ([\d–]+) \|"
    measured = dict(re.findall(row, results, re.MULTILINE))
    assert len(measured) >= 10
    for name, minutes in measured.items():
        recipe = RECIPES[0].with_name(f"{name}.py")
        stated = minutes.replace("–", " to ")
        assert f"2 CPU cores, {stated} minutes (" in docstring(recipe), name
