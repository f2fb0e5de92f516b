"""Every study in studies/ loads, and varies what it says."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import jax
import pytest

from flax_transformers.cli.config_file import load_study
from flax_transformers.cli.parsing import override
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.models.config import ComputeConfig
from flax_transformers.sweeps.study import points
from flax_transformers.training.check_run import check_config

STUDIES = Path(__file__).parents[1] / "studies"
FILES = sorted(STUDIES.glob("*.py"))


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch):
    """Undo what a study file adds to ``sys.path``."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def points_of(name):
    study = load_study(str(STUDIES / f"{name}.py"))
    return {point.name: point.config for point in points(study, {}, override)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_study_names_its_source_and_its_command_and_can_be_trained(file):
    study = load_study(str(file))
    assert study.published and study.citation and study.expected and study.seeds >= 3
    assert f"flax-transformers sweep studies/{file.name} " in file.read_text()
    for config in points_of(file.stem).values():
        check_config(config)


def test_gated_and_plain_layers_have_equal_parameters():
    sizes = set()
    for config in points_of("gated_feed_forward").values():
        model = build_model(config.model, ComputeConfig())
        shapes = boxed_shapes(model)
        sizes.add(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))
    assert len(sizes) == 1


def test_the_masks_are_those_of_the_paper():
    shares = {
        name: (config.objective.mask_share, config.objective.random_share)
        for name, config in points_of("masking").items()
    }
    assert shares == {
        "mask_80_random_10": (0.8, 0.1), "mask_only": (1.0, 0.0), "random_only": (0.0, 1.0)
    }  # fmt: skip


def test_prose_is_tagged_with_its_punctuation_and_case():
    load_study(str(STUDIES / "masking.py"))
    import masking

    text = "Return the Value, or None: see below. Raise it?\n\nx = f(y) + 1\n\ntoo few words"
    (rows,) = masking.tagged(text)
    assert rows == [
        ("return", "upper_none"), ("the", "lower_none"), ("value", "upper_comma"),
        ("or", "lower_none"), ("none", "upper_colon"), ("see", "lower_none"),
        ("below", "lower_stop"), ("raise", "upper_none"), ("it", "lower_stop"),
    ]  # fmt: skip
    assert {tag for _, tag in rows} <= set(masking.TAGS) and len(masking.TAGS) == 8
