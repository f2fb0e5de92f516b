"""BERT against Hugging Face's, through tests/golden/bert.npz; its configuration and its sizes."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bert import JSON, SIZES, BertConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.testing import assert_bit_equal, relative_difference
from flax_transformers.training.step import model_functions, total_loss
from tests.families.parity import (
    assert_parity,
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import bert as golden
from tests.golden.hub import read_golden
from tests.huggingface.tensors import export_weights

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
WITH_GRADIENTS = [name for name, case in CASES.items() if case.labels is not None]


@pytest.mark.slow
@pytest.mark.full
def test_the_forward_pass_written_out_is_that_of_hugging_face():
    assert_parity(CASES["pretraining"], golden.__file__, scan_layers=False)


def objective_batch(case):
    """Labels at every position as the arrays of ``MaskedLM.prepare``, unused slots at the end."""
    slots = (case.labels >= 0).sum(axis=1).max() + 1
    order = np.argsort(case.labels < 0, axis=1, kind="stable")[:, :slots].astype(np.int32)
    labels = np.take_along_axis(case.labels, order, axis=1)
    return {
        **case.inputs,
        "masked_positions": order,
        "masked_labels": np.maximum(labels, 0),
        "masked_weights": (labels >= 0).astype(np.float32),
    }


@cache
def loss_and_gradients(name, scan):
    """Our loss, and its gradients by published name."""
    case = CASES[name]
    config, model, params, table = load_case(case, scan_layers=scan)
    batch = objective_batch(case)

    def loss(params):
        return total_loss(MaskedLM().terms(model_functions(model), params, batch, {}))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    exported = export_weights(table, grads, config.vocab_size)
    return float(value), {f"gradients/{tensor}": grad for tensor, grad in exported.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scan"),
    [
        (WITH_GRADIENTS[0], True),
        *(pytest.param(name, True, marks=pytest.mark.full) for name in WITH_GRADIENTS[1:]),
        pytest.param(WITH_GRADIENTS[0], False, marks=pytest.mark.full),
    ],
)
def test_the_loss_and_its_gradients_are_those_of_torch(name, scan):
    (loss, ours), theirs = loss_and_gradients(name, scan), read_golden(golden.__file__, CASES[name])
    assert relative_difference(loss, theirs["loss"]) < 1e-5
    names = {tensor for tensor in theirs if tensor.startswith("gradients/")}
    # Torch has none for the bias that an untied model never uses.
    assert ours.keys() - names <= {"gradients/cls.predictions.bias"}
    assert names <= ours.keys()
    norm = math.sqrt(sum(np.square(theirs[tensor]).sum() for tensor in names))
    # Softmax does not see what a key bias adds to all scores alike: its true gradient is zero.
    zero = {tensor for tensor in names if tensor.endswith("key.bias")}
    assert len(zero) == CASES[name].config["num_hidden_layers"]
    assert max(np.abs([ours[t], theirs[t]]).max() for t in zero) < 1e-7 * norm
    far = {t: relative_difference(ours[t], theirs[t]) for t in names - zero}
    assert {tensor: value for tensor, value in far.items() if value >= 1e-5} == {}


def pack():
    """A row of 17 that holds three examples and padding: ids, segments, where each example lies."""
    ids = np.random.default_rng(0).integers(1, 49, (1, 17), np.int32)
    segments = np.repeat([1, 2, 3, 0], [6, 3, 5, 3])[None].astype(np.int32)
    return ids, segments, [slice(0, 6), slice(6, 9), slice(9, 14)]


@pytest.mark.slow
def test_a_packed_row_gives_each_example_the_logits_it_has_alone():
    _, model, params, _ = load_case(CASES["exact"])
    ids, segments, spans = pack()
    rows, within = np.zeros((2, 4, 17), np.int32)  # packed, then each example alone
    rows[0], within[0] = ids, segments
    for row, span in enumerate(spans, 1):
        length = span.stop - span.start
        rows[row, :length], within[row, :length] = ids[0, span], 1
    packed, *alone = jax.jit(model.apply)({"params": params}, rows, segment_ids=within).logits
    for logits, span in zip(alone, spans, strict=True):
        assert relative_difference(packed[span], logits[: span.stop - span.start]) < 1e-5


def test_padding_within_a_segment_is_not_attended_to():
    _, model, params, _ = load_case(CASES["exact"])
    ids = np.arange(12, dtype=np.int32).reshape(2, 6) + 5
    mask = np.array([[1, 1, 1, 1, 0, 0]] * 2, np.int32)
    apply = jax.jit(model.apply)
    both = apply({"params": params}, ids, mask, segment_ids=np.ones_like(mask)).logits
    alone = apply({"params": params}, ids, segment_ids=mask).logits
    np.testing.assert_array_equal(both[:, :4], alone[:, :4])


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_packed_examples_do_not_see_each_other(scan):
    _, model, params, _ = load_case(CASES["exact"], scan_layers=scan)
    ids, segments, spans = pack()
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids, segment_ids=segments).logits)
    before = np.asarray(logits(ids))
    for perturbed in range(3):
        other = ids.copy()
        other[:, spans[perturbed]] = 49 - other[:, spans[perturbed]]
        after = np.asarray(logits(other))
        for i, span in enumerate(spans):
            same = np.array_equal(before[:, span], after[:, span])
            assert same == (i != perturbed)


def tensorflow_names(tensors):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }


def as_published(tensors):
    """The layout of bert-base-uncased: other heads, copies and a buffer besides."""
    width = tensors["bert.embeddings.LayerNorm.bias"].size
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "bert.pooler.dense.weight": np.ones((width, width), np.float32),
        "bert.pooler.dense.bias": np.ones(width, np.float32),
        "cls.seq_relationship.weight": np.ones((2, width), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
        "bert.embeddings.position_ids": np.arange(17)[None],
    }


def bias_of_the_decoder_alone(tensors):
    renamed = dict(tensors)
    renamed["cls.predictions.decoder.bias"] = renamed.pop("cls.predictions.bias")
    return renamed


def with_prefix(tensors):
    return {f"bert.{name}": tensor for name, tensor in tensors.items()}


def buffered(tensors):
    return tensors | {"embeddings.position_ids": np.arange(17)[None]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exact", tensorflow_names),
        ("exact", as_published),
        ("exact", bias_of_the_decoder_alone),
        ("pretraining", tensorflow_names),
        ("bare", with_prefix),
        ("bare", buffered),
    ],
)
def test_published_layouts_are_read_as_the_freshly_saved_one(name, layout):
    tensors = drawn_tensors(CASES[name])
    published = layout(tensors)
    assert published.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES[name], published), import_case(CASES[name], tensors))


def test_a_model_without_heads_may_come_without_a_prefix_under_a_head():
    tensors = drawn_tensors(CASES["tokens"])
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    assert_bit_equal(import_case(CASES["tokens"], bare), import_case(CASES["tokens"], tensors))


def test_an_untied_model_takes_the_bias_that_the_original_uses():
    tensors = drawn_tensors(CASES["untied"])
    params = import_case(CASES["untied"], tensors)
    used = tensors["cls.predictions.decoder.bias"]
    assert not np.array_equal(used, tensors["cls.predictions.bias"])
    np.testing.assert_array_equal(params["mlm_head"]["bias"][: used.size], used)
    # The order of tensors in a file, and whether the other is there at all, are no matter.
    turned = dict(reversed(tensors.items()))
    assert_bit_equal(import_case(CASES["untied"], turned), params)
    del turned["cls.predictions.bias"]
    assert_bit_equal(import_case(CASES["untied"], turned), params)


def test_an_untied_model_is_written_with_both_biases_alike():
    config, _, params, table = load_case(CASES["untied"])
    tensors = export_weights(table, params, config.vocab_size)
    assert_bit_equal(tensors["cls.predictions.bias"], tensors["cls.predictions.decoder.bias"])


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = {key: value for key, value in CASES[name].config.items() if key != "num_labels"}
    written = config_json(JSON.read(CASES[name].config))
    # Of several names for one function the first is written.
    same = {"gelu_pytorch_tanh": "gelu_new"}
    theirs["hidden_act"] = same.get(theirs["hidden_act"], theirs["hidden_act"])
    assert written.items() >= theirs.items()


@pytest.mark.parametrize("architecture", ["BertForTokenClassification", "BertForPreTraining"])
def test_the_configuration_survives_the_way_out_and_back(architecture):
    ours = BertConfig(
        architecture=architecture,
        vocab_size=7,
        hidden_size=6,
        num_layers=1,
        num_heads=3,
        intermediate_size=5,
        max_positions=9,
        norm_eps=0.5,
        activation="gelu_tanh",
        token_types=3,
        dropout=0.25,
        attention_dropout=0.125,
        classifier_dropout=0.5,
        init_std=0.75,
        tie_embeddings=False,
        pad_id=2,
        num_labels=3,
        label_names=("no", "maybe", "yes"),
    )
    assert JSON.read(JSON.write(ours)) == ours


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert JSON.read({"model_type": "bert"}) == SIZES["bert-base"] == BertConfig()
    assert JSON.read({"pad_token_id": None}) == BertConfig()


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_act", "elu", "activation 'elu'.*gelu_new"),
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key'"),
        ("is_decoder", True, "is_decoder True"),
        ("add_cross_attention", True, "add_cross_attention True"),
        ("model_type", "roberta", "model_type 'roberta'"),
        ("hidden_size", "768", "hidden_size '768'"),
        ("num_attention_heads", 5, "does not divide by model.num_heads 5"),
        ("num_attention_heads", 0, "num_heads is 0"),
        ("vocab_size", 0, "vocab_size is 0"),
        ("pad_token_id", "0", "pad_token_id '0'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_position", "pre"), ("norm", "rms"), ("gated", True), ("qkv_bias", False)],
)
def test_a_model_that_hugging_face_has_no_bert_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(BertConfig(**{field: value}))


# Parameters of BertForMaskedLM and of BertForPreTraining, which has a pooler and a next-sentence
# head besides. The papers state 110M and 340M for base and large, and 4.4M, 11.3M, 29.1M and 41.7M
# for the small ones, which is the second.
PUBLISHED = {
    "bert-tiny": (4_416_698, 4_433_468),
    "bert-mini": (11_201_594, 11_267_900),
    "bert-small": (28_795_194, 29_058_876),
    "bert-medium": (41_404_730, 41_668_412),
    "bert-base": (109_514_298, 110_106_428),
    "bert-base-cased": (108_340_804, 108_932_934),
    "bert-base-multilingual-cased": (177_974_523, 178_566_653),
    "bert-base-multilingual-uncased": (167_463_831, 168_055_961),
    "bert-base-chinese": (102_290_312, 102_882_442),
    "bert-large": (335_174_458, 336_226_108),
    "bert-large-cased": (333_610_308, 334_661_958),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    pretraining = dataclasses.replace(SIZES[name], architecture="BertForPreTraining")
    counts = count_parameters(SIZES[name]), count_parameters(pretraining)
    assert counts == PUBLISHED[name]
