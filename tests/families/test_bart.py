"""BART and mBART against Hugging Face's, through tests/golden/bart.npz."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bart import (
    SIZES,
    BartConfig,
    from_huggingface,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.models.encoder_decoder import decoder_inputs
from flax_transformers.testing import assert_bit_equal
from tests.families.parity import (
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import bart as golden
from tests.models.encoder_decoders import assert_steps_are_as_the_full_pass

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
TINY = BartConfig(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    intermediate_size=8,
    num_decoder_layers=2,
    num_decoder_heads=2,
    decoder_intermediate_size=9,
    max_positions=16,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(["bart", "mbart"]))
def test_cached_steps_give_the_logits_of_the_full_pass(name):
    config, model, params, _ = load_case(CASES[name])
    assert_steps_are_as_the_full_pass(model, params, config.vocab_size)


def test_barts_decoder_begins_with_the_end_of_a_sequence():
    labels = jnp.asarray([[0, 7, 8, 2], [0, 7, 2, -100]])
    assert decoder_inputs(TINY, labels).tolist() == [[2, 0, 7, 8], [2, 0, 7, 2]]


@pytest.mark.slow
def test_mbarts_decoder_begins_with_the_language_that_ends_the_labels():
    labels = jnp.asarray([[7, 8, 2, 40], [7, 2, 41, -100]])
    expected = [[40, 7, 8, 2], [41, 7, 2, 41]]
    mbart = dataclasses.replace(TINY, architecture="MBartForConditionalGeneration")
    assert decoder_inputs(mbart, labels).tolist() == expected


def with_copies(tensors):
    """The layout of facebook/bart-large-cnn: the table four times."""
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    return tensors | dict.fromkeys((*names, "lm_head.weight"), tensors["model.shared.weight"])


def with_versions(tensors):
    """Files from fairseq's time."""
    version = np.ones(1, np.float32)
    return tensors | {"model.encoder.version": version, "model.decoder.version": version}


def without_the_first(tensors):
    """A file that has the table under the name of a copy alone."""
    renamed = with_copies(tensors)
    del renamed["model.shared.weight"]
    return renamed


def with_prefix(tensors):
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bart", with_copies),
        ("mbart", with_copies),
        ("bart", with_versions),
        ("bart", without_the_first),
        ("bare", with_prefix),
    ],
)
def test_published_layouts_are_read_as_the_freshly_saved_one(name, layout):
    tensors = drawn_tensors(CASES[name])
    published = layout(tensors)
    assert published.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES[name], published), import_case(CASES[name], tensors))


@pytest.mark.slow
def test_a_table_that_is_not_shared_is_refused_where_there_is_one_for_all():
    tensors = with_copies(drawn_tensors(CASES["bart"]))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.shared\.weight"):
        import_case(CASES["bart"], tensors)


@pytest.mark.slow
def test_three_tables_are_those_that_are_looked_up_and_not_the_shared_one():
    params = import_case(CASES["three_tables"], tensors := drawn_tensors(CASES["three_tables"]))
    for path, name in (
        ("words", "model.encoder.embed_tokens.weight"),
        ("decoder_words", "model.decoder.embed_tokens.weight"),
    ):
        rows = len(tensors[name])
        np.testing.assert_array_equal(params[path]["embedding"][:rows], tensors[name])


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = CASES[name].config
    assert config_json(from_huggingface(theirs)).items() >= theirs.items()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "BartForSequenceClassification", "num_labels": 5},
        {"architecture": "BartModel", "activation": "relu", "dropout": 0.25},
        {"architecture": "MBartModel", "norm_position": "pre", "pad_id": 7},
        {"architecture": "BartForQuestionAnswering", "num_labels": 2},
        {"scale_embeddings": True, "decoder_start_id": 4, "eos_ids": (5,), "bos_id": None},
        {"tie_embeddings": False, "share_embeddings": False, "init_std": 0.5},
    ],
)
def test_the_configuration_survives_the_way_out_and_back(changes):
    ours = dataclasses.replace(TINY, **changes)
    assert from_huggingface(to_huggingface(ours)) == ours


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "bart"}) == SIZES["bart-large"] == BartConfig()
    assert from_huggingface({"encoder_layers": 2}).decoder.num_layers == 12
    mbart = from_huggingface({"model_type": "mbart", "vocab_size": 250027, "scale_embedding": True})
    assert mbart == SIZES["mbart-large-cc25"]


def test_an_architecture_alone_tells_the_kind():
    config = from_huggingface({"architectures": ["MBartModel"], "vocab_size": 250027})
    assert (config.norm_position, config.architecture) == ("pre", "MBartModel")


def test_the_marks_of_an_answer_are_two_whatever_the_labels():
    answers = dataclasses.replace(TINY, architecture="BartForQuestionAnswering", num_labels=3)
    assert (answers.num_labels, len(config_json(answers)["id2label"])) == (2, 2)


def test_the_dropout_of_a_classifier_may_be_that_of_the_layers():
    config = dataclasses.replace(TINY, classifier_dropout=None, dropout=0.25)
    assert config_json(config)["classifier_dropout"] == 0.25


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("architectures", ["MBartModel"], "architecture 'MBartModel'.*begin with Bart"),
        ("activation_function", "elu", "activation 'elu'.*gelu_new"),
        ("is_decoder", True, "is_decoder True"),
        ("model_type", "pegasus", "model_type 'pegasus'"),
        ("d_model", "768", "d_model '768'"),
        ("decoder_attention_heads", 5, "does not divide by model.num_heads 5"),
        ("decoder_layers", 0, "num_decoder_layers is 0"),
        ("architectures", ["BartForCausalLM"], "architecture is 'BartForCausalLM'.*BartModel"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        build_model(from_huggingface({"model_type": "bart"} | {field: value}), ComputeConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_position", "pre"),
        ("norm", "rms"),
        ("positions", "none"),
        ("embedding_norm", False),
        ("share_embeddings", False),
        ("logits_bias", False),
    ],
)
def test_a_model_that_hugging_face_has_no_bart_for_is_not_written(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(TINY, **{field: value}))


# Parameters of BartForConditionalGeneration; the constants added to the logits are none.
PUBLISHED = {
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "mbart-large-cc25": 610_851_840,
    "mbart-large-50": 610_879_488,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) - SIZES[name].vocab_size == PUBLISHED[name]
