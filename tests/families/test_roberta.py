"""RoBERTa and XLM-RoBERTa against Hugging Face's, through tests/golden/roberta.npz."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.roberta import (
    SIZES,
    RobertaConfig,
    from_huggingface,
    position_ids,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import assert_bit_equal, relative_difference
from tests.families.parity import (
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import roberta as golden
from tests.huggingface.tensors import parameter_shapes

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
IDS = np.zeros((1, 2), np.int32)
TINY = RobertaConfig(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    intermediate_size=8,
    max_positions=16,
)


def test_positions_count_what_is_not_padding():
    ids = jnp.array([[0, 7, 8, 2, 1, 1], [1, 1, 0, 7, 8, 2], [0, 1, 7, 1, 8, 2]])
    assert position_ids(TINY, ids, None).tolist() == [
        [0, 1, 2, 3, -1, -1],
        [-1, -1, 0, 1, 2, 3],
        [0, -1, 1, -1, 2, 3],
    ]


def test_positions_start_anew_in_each_packed_example():
    ids = jnp.array([[0, 7, 2, 0, 1, 2, 1, 1], [0, 7, 8, 2, 1, 0, 7, 2]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 4, 4, 4]])
    assert position_ids(TINY, ids, segments).tolist() == [
        [0, 1, 2, 0, -1, 1, -1, -1],
        [0, 1, 2, 3, -1, 0, 1, 2],
    ]


def test_the_first_token_has_the_row_after_that_of_padding():
    other = dataclasses.replace(TINY, pad_id=3, position_offset=4)
    for config in (TINY, other):
        shapes = parameter_shapes(build_model(config, ComputeConfig()))
        rows = shapes["embeddings"]["position"]["embedding"].shape[0]
        assert rows == 16 + config.pad_id + 1
    with pytest.raises(ValueError, match=r"position_offset is 2; with model.pad_id 3 it must be 4"):
        dataclasses.replace(TINY, pad_id=3)


@pytest.mark.slow
def test_a_packed_row_gives_each_example_the_logits_it_has_alone():
    config, model, params, _ = load_case(CASES["roberta"])
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (1, 17), np.int32)
    segments = np.repeat([1, 2, 3, 0], [6, 3, 5, 3])[None].astype(np.int32)
    ids[segments == 0] = config.pad_id
    spans = [slice(0, 6), slice(6, 9), slice(9, 14)]
    rows = np.full((4, 17), config.pad_id, np.int32)  # packed, then each example alone
    rows[0] = ids
    for row, span in enumerate(spans, 1):
        rows[row, : span.stop - span.start] = ids[0, span]
    within = np.where(rows == config.pad_id, 0, 1)
    within[0] = segments
    packed, *alone = jax.jit(model.apply)({"params": params}, rows, segment_ids=within).logits
    for logits, span in zip(alone, spans, strict=True):
        assert relative_difference(packed[span], logits[: span.stop - span.start]) < 1e-5


@pytest.mark.slow
def test_packed_examples_do_not_see_each_other():
    config, model, params, _ = load_case(CASES["roberta"])
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (1, 8), np.int32)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2]])
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids, segment_ids=segments).logits)
    before = np.asarray(apply(ids))
    other = ids.copy()
    other[0, 1:3] = config.pad_id  # padding in the first example moves its own positions alone
    after = np.asarray(apply(other))
    np.testing.assert_array_equal(after[:, 5:], before[:, 5:])
    assert not np.array_equal(after[:, :5], before[:, :5])


@pytest.mark.slow
def test_the_classifier_drops_before_and_after_its_dense_layer():
    config = dataclasses.replace(
        TINY, architecture="RobertaForSequenceClassification", classifier_dropout=0.5, num_labels=3
    )
    model = build_model(config, ComputeConfig())
    hidden = np.random.default_rng(0).standard_normal((64, 2, 12)).astype(np.float32)
    shapes = parameter_shapes(model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    # Each label reads one unit, each unit one feature of the first token.
    params["pooler"]["dense"]["kernel"] = np.eye(12, dtype=np.float32)
    params["classification_head"]["kernel"] = np.eye(12, 3, dtype=np.float32)
    ids = np.ones((64, 2), np.int32)
    run = partial(model.apply, {"params": params}, hidden, ids, method="classify")
    run = jax.jit(run, static_argnames="deterministic")
    plain = np.tanh(hidden[:, 0, :3])
    np.testing.assert_allclose(run(), plain, rtol=1e-5, atol=1e-6)
    dropped = np.asarray(run(deterministic=False, rngs={"dropout": jax.random.key(0)}))
    # What is kept both times counts double before the tanh and double after it.
    twice = 2 * np.tanh(2 * hidden[:, 0, :3])
    kept = np.isclose(dropped, twice, rtol=1e-4, atol=1e-5)
    assert (kept | (dropped == 0)).all()
    assert abs(kept.mean() - 0.25) < 0.1


def as_published(tensors):
    """The layout of roberta-base: copies, a pooler that was never trained and a buffer besides."""
    width = tensors["roberta.embeddings.LayerNorm.bias"].size
    return tensors | {
        "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"],
        "lm_head.decoder.bias": tensors["lm_head.bias"],
        "roberta.pooler.dense.weight": np.ones((width, width), np.float32),
        "roberta.pooler.dense.bias": np.ones(width, np.float32),
        "roberta.embeddings.position_ids": np.arange(17)[None],
    }


def without_prefix(tensors):
    return {name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}


def with_prefix(tensors):
    return {f"roberta.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [("roberta", as_published), ("tokens", without_prefix), ("bare", with_prefix)],
)
def test_published_layouts_are_read_as_the_freshly_saved_one(name, layout):
    tensors = drawn_tensors(CASES[name])
    published = layout(tensors)
    assert published.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES[name], published), import_case(CASES[name], tensors))


def test_a_classifier_passes_over_the_pooler_that_is_not_its_own():
    tensors = drawn_tensors(CASES["other_padding"])
    width = tensors["classifier.dense.bias"].size
    more = tensors | {"roberta.pooler.dense.bias": np.ones(width, np.float32)}
    params = import_case(CASES["other_padding"], more)
    np.testing.assert_array_equal(
        params["pooler"]["dense"]["bias"], tensors["classifier.dense.bias"]
    )


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = {key: value for key, value in CASES[name].config.items() if key != "num_labels"}
    written = config_json(from_huggingface(CASES[name].config))
    if theirs.get("hidden_act") == "gelu_pytorch_tanh":
        theirs["hidden_act"] = "gelu_new"  # one function; the first of its names is written
    assert written.items() >= theirs.items()


@pytest.mark.parametrize("architecture", ["RobertaModel", "XLMRobertaForQuestionAnswering"])
def test_the_configuration_survives_the_way_out_and_back(architecture):
    ours = dataclasses.replace(
        TINY,
        architecture=architecture,
        pad_id=4,
        position_offset=5,
        token_types=3,
        activation="silu",
        norm_eps=0.5,
        tie_embeddings=False,
        classifier_dropout=0.3,
    )
    assert from_huggingface(to_huggingface(ours)) == ours
    kind = "xlm-roberta" if architecture.startswith("XLM") else "roberta"
    assert to_huggingface(ours)["model_type"] == kind


def test_fields_that_files_leave_out_are_what_hugging_face_takes_them_for():
    config = from_huggingface({"model_type": "roberta"})
    assert config == RobertaConfig(norm_eps=1e-12, token_types=2, max_positions=510)
    other = from_huggingface({"model_type": "xlm-roberta"})
    assert (other.architecture, other.vocab_size) == ("XLMRobertaForMaskedLM", 30522)


def test_an_architecture_alone_tells_the_kind():
    config = from_huggingface({"architectures": ["XLMRobertaModel"]})
    assert (config.architecture, config.vocab_size) == ("XLMRobertaModel", 30522)


def test_the_published_config_json_is_the_published_size():
    published = {
        "architectures": ["RobertaForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "roberta",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    }
    assert from_huggingface(published) == SIZES["roberta-base"]
    xlm = published | {
        "architectures": ["XLMRobertaForMaskedLM"],
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "output_past": True,
    }
    assert from_huggingface(xlm) == SIZES["xlm-roberta-base"]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_act", "elu", "activation 'elu'"),
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key'"),
        ("is_decoder", True, "is_decoder True"),
        ("model_type", "bert", "model_type 'bert'.*'roberta' and 'xlm-roberta'"),
        ("architectures", ["XLMRobertaModel"], "model_type 'roberta'.*'XLMRobertaModel'"),
        ("max_position_embeddings", "514", "max_position_embeddings '514'"),
        ("max_position_embeddings", 2, "max_positions is 0"),
        ("pad_token_id", None, "pad_token_id None"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({"model_type": "roberta"} | {field: value})


@pytest.mark.parametrize(("field", "value"), [("norm_position", "pre"), ("positions", "none")])
def test_a_model_that_hugging_face_has_no_roberta_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(TINY, **{field: value}))


# Parameters of RobertaForMaskedLM and XLMRobertaForMaskedLM. The papers state 125M, 355M, 82M, 270M
# and 550M.
PUBLISHED = {
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "distilroberta-base": 82_170_201,
    "xlm-roberta-base": 278_295_186,
    "xlm-roberta-large": 560_142_482,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
