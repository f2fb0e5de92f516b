"""BERT against Hugging Face's, through tests/golden/bert.npz; its configuration and its sizes."""

from __future__ import annotations

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.bert import (
    SIZES,
    WEIGHTS,
    BertConfig,
    from_huggingface,
    to_huggingface,
)
from flax_transformers.families.weights import (
    export_weights,
    import_weights,
    parameter_shapes,
    tensor_shapes,
)
from flax_transformers.models.config import Execution
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.training.step import model_functions, total_loss
from tests.golden import bert as golden
from tests.golden.draw import draw_weights

IDS = jnp.zeros((1, 2), jnp.int32)


def load(case, scan=True):
    """The model of a golden case, its weights in our layout, and its vocabulary size."""
    config = from_huggingface(golden.draw_config(case))
    model = config.build(Execution(scan_layers=scan))
    shapes = parameter_shapes(model, IDS)
    tensors = draw_weights(tensor_shapes(WEIGHTS, shapes, config.vocab_size), case)
    return model, import_weights(WEIGHTS, tensors, shapes, config.vocab_size), config


def objective_batch(batch):
    """Labels at every position as the arrays of ``MaskedLM.prepare``, unused slots at the end."""
    slots = (batch["labels"] >= 0).sum(axis=1).max() + 1
    order = np.argsort(batch["labels"] < 0, axis=1, kind="stable")[:, :slots].astype(np.int32)
    labels = np.take_along_axis(batch["labels"], order, axis=1)
    return {
        **{name: value for name, value in batch.items() if name != "labels"},
        "masked_positions": order,
        "masked_labels": np.maximum(labels, 0),
        "masked_weights": (labels >= 0).astype(np.float32),
    }


@cache
def run(case, scan):
    """Our logits and hidden states at attended positions, loss and (where the golden holds them)
    gradients by published name."""
    model, params, config = load(case, scan)
    batch = objective_batch(golden.draw_batch(case, golden.draw_config(case)))

    def loss(params):
        return total_loss(MaskedLM().terms(model_functions(model), params, batch, {}))

    def everything(params):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        output = model.apply({"params": params}, **inputs)
        if case not in golden.GRADIENT_CASES:
            return output, loss(params), None
        return output, *jax.value_and_grad(loss)(params)

    output, value, grads = jax.jit(everything)(params)
    attended = batch["attention_mask"] == 1
    results = {
        "logits": np.asarray(output.logits)[attended],
        "last_hidden_state": np.asarray(output.last_hidden_state)[attended],
        "loss": np.asarray(value),
    }
    if grads is not None:
        grads = export_weights(WEIGHTS, grads, config.vocab_size)
        results |= {f"gradients/{name}": grad for name, grad in grads.items()}
    return results


def reference(case):
    with np.load(golden.OUTPUT) as file:
        return {
            name.removeprefix(f"{case}/"): file[name]
            for name in file.files
            if name.startswith(f"{case}/")
        }


def difference(ours, theirs):
    """Largest difference over largest value."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# Every case scanned, and one with and one without gradients written out.
WAYS = [*((case, True) for case in golden.CASES), ("exact", False), ("tanh", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "scan"), WAYS)
@pytest.mark.parametrize("what", ["logits", "last_hidden_state", "loss"])
def test_the_forward_pass_is_that_of_hugging_face(what, case, scan):
    assert difference(run(case, scan)[what], reference(case)[what]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("case", "scan"), [way for way in WAYS if way[0] in golden.GRADIENT_CASES])
def test_the_gradients_of_the_loss_are_those_of_torch(case, scan):
    ours, theirs = run(case, scan), reference(case)
    names = {name for name in theirs if name.startswith("gradients/")}
    assert names == {name for name in ours if name.startswith("gradients/")}
    norm = math.sqrt(sum(np.square(theirs[name]).sum() for name in names))
    # Softmax does not see what a key bias adds to all scores alike: its true gradient is zero.
    zero = {name for name in names if name.endswith("key.bias")}
    assert len(zero) == golden.draw_config(case)["num_hidden_layers"]
    assert max(np.abs([ours[name], theirs[name]]).max() for name in zero) < 1e-7 * norm
    far = {name: difference(ours[name], theirs[name]) for name in names - zero}
    assert {name: value for name, value in far.items() if value >= 1e-5} == {}


def pack():
    """A row of 17 that holds three examples and padding: ids, segments, where each example lies."""
    ids = np.random.default_rng(0).integers(1, 100, (1, 17), np.int32)
    segments = np.repeat([1, 2, 3, 0], [6, 3, 5, 3])[None].astype(np.int32)
    return ids, segments, [slice(0, 6), slice(6, 9), slice(9, 14)]


@pytest.mark.slow
def test_a_packed_row_gives_each_example_the_logits_it_has_alone():
    model, params, _ = load("exact")
    ids, segments, spans = pack()
    alone, mask = np.zeros((2, 3, 17), np.int32)
    for row, span in enumerate(spans):
        length = span.stop - span.start
        alone[row, :length], mask[row, :length] = ids[0, span], 1
    apply = jax.jit(lambda ids, **more: model.apply({"params": params}, ids, **more).logits)
    packed = apply(ids, segment_ids=segments)
    logits = apply(alone, attention_mask=mask)
    for row, span in enumerate(spans):
        expected = np.asarray(logits[row, : span.stop - span.start])
        assert difference(np.asarray(packed[0, span]), expected) < 1e-5


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_packed_examples_do_not_see_each_other(scan):
    model, params, _ = load("exact", scan)
    ids, segments, spans = pack()
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids, segment_ids=segments).logits)
    before = np.asarray(logits(ids))
    for perturbed in range(3):
        other = ids.copy()
        other[:, spans[perturbed]] = 99 - other[:, spans[perturbed]]
        after = np.asarray(logits(other))
        for i, span in enumerate(spans):
            same = np.array_equal(before[:, span], after[:, span])
            assert same == (i != perturbed)


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.CASES:
        theirs = golden.draw_config(case)
        assert to_huggingface(from_huggingface(theirs)).items() >= theirs.items()
    ours = BertConfig(
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
        init_std=0.75,
    )
    assert from_huggingface(to_huggingface(ours)) == ours


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "bert"}) == SIZES["bert-base"] == BertConfig()


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_act", "quick_gelu", "activation 'quick_gelu'.*gelu_new"),
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key'"),
        ("tie_word_embeddings", False, "tie_word_embeddings False"),
        ("is_decoder", True, "is_decoder True"),
        ("model_type", "roberta", "model_type 'roberta'"),
        ("hidden_size", "768", "hidden_size '768'"),
        ("num_attention_heads", 5, "does not divide by model.num_heads 5"),
        ("num_attention_heads", 0, "num_heads is 0"),
        ("vocab_size", 0, "vocab_size is 0"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_place", "pre"), ("norm", "rms"), ("gated", True), ("token_types", 0)],
)
def test_a_model_that_hugging_face_has_no_bert_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        to_huggingface(BertConfig(**{field: value}))


# Parameters of BertForMaskedLM: the encoder, the head, and a bias per word.
PUBLISHED = {
    "bert-tiny": 4_416_698,
    "bert-mini": 11_201_594,
    "bert-small": 28_795_194,
    "bert-medium": 41_404_730,
    "bert-base": 109_514_298,
    "bert-base-cased": 108_340_804,
    "bert-base-multilingual-cased": 177_974_523,
    "bert-large": 335_174_458,
    "bert-large-cased": 333_610_308,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_number_of_parameters(name):
    config = SIZES[name]
    shapes = parameter_shapes(config.build(Execution()), IDS)
    published = tensor_shapes(WEIGHTS, shapes, config.vocab_size).values()
    assert sum(math.prod(shape) for shape in published) == PUBLISHED[name]
    # Ours has a few rows more, each a vector and a bias, to pad the vocabulary.
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    padding = config.padded_vocab_size - config.vocab_size
    assert ours - PUBLISHED[name] == padding * (config.hidden_size + 1)
