"""DeiT against Hugging Face's, through tests/golden/deit.npz; its configuration and its sizes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.deit import JSON, SIZES, DeiTConfig, weights
from flax_transformers.huggingface.family import config_json
from tests.families.parity import first_by_default, load_case
from tests.families.vision import published_count, without_prefix
from tests.golden import deit as golden
from tests.huggingface.tensors import export_weights, import_weights


def test_a_file_without_prefix_is_read():
    _, _, params, table = load_case(golden.TEACHER)
    tensors = without_prefix(export_weights(table, params, 0), "deit.")
    read = import_weights(table, tensors, params, 0)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.CASES:
        assert config_json(JSON.read(case.config)).items() >= case.config.items()


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    config = JSON.read({"model_type": "deit"})
    assert config == DeiTConfig() and config.norm_eps == 1e-12


def test_another_model_is_refused():
    with pytest.raises(UserError, match="model_type 'vit'"):
        JSON.read({"model_type": "vit"})


# Parameters of DeiTForImageClassificationWithTeacher with 1000 labels.
PUBLISHED = {
    "deit-ti16": 5_910_800,
    "deit-s16": 22_436_432,
    "deit-b16": 87_338_192,
    "deit-b16-384": 87_630_032,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert published_count(SIZES[name], weights) == PUBLISHED[name]
