"""ModernBERT against Hugging Face's, through tests/golden/modernbert.npz; windows and patterns."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.modernbert import (
    FULL,
    SIZES,
    SLIDING,
    ModernBertConfig,
    from_huggingface,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig, Rope
from flax_transformers.testing import assert_bit_equal, relative_difference
from tests.families.parity import (
    assert_parity,
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import modernbert as golden
from tests.huggingface.tensors import parameter_shapes
from tests.models.reference import randomize

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
TINY = ModernBertConfig(
    architecture="ModernBertModel",
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    intermediate_size=8,
    max_positions=32,
    local_attention=6,
    pad_id=0,
)
IDS = np.random.default_rng(0).integers(1, 50, (1, 17), np.int32)


@pytest.mark.slow
def test_the_forward_pass_written_out_is_that_of_hugging_face():
    assert_parity(CASES["published"], golden.__file__, scan_layers=False)


@cache
def forward(config, deterministic):
    """Last hidden states with random weights that depend on the layout alone."""
    model = build_model(config, ComputeConfig())
    params = randomize(parameter_shapes(model))

    def hidden(ids, inputs):
        output = model.apply({"params": params}, ids, deterministic=deterministic, **inputs)
        return output.last_hidden_state

    return jax.jit(hidden)


def run(config, ids=IDS, deterministic=True, **inputs):
    return np.asarray(forward(config, deterministic)(ids, inputs))


def reached(config, place, **inputs):
    """The places of a row whose result changes with the token at ``place``."""
    other = IDS.copy()
    other[0, place] = 49 - other[0, place]
    changed = run(config, IDS, **inputs) != run(config, other, **inputs)
    return np.flatnonzero(changed[0].any(axis=-1)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("window", "side"), [(6, 3), (7, 3), (1, 0), (2, 1)])
def test_a_local_layer_sees_half_the_window_to_each_side_and_itself(window, side):
    config = dataclasses.replace(TINY, layer_types=(SLIDING,), local_attention=window)
    assert reached(config, 8) == list(range(8 - side, 8 + side + 1))


@pytest.mark.slow
def test_a_global_layer_sees_everything():
    assert reached(dataclasses.replace(TINY, layer_types=(FULL,)), 8) == list(range(17))


@pytest.mark.slow
def test_two_local_layers_reach_twice_as_far():
    config = dataclasses.replace(TINY, num_layers=2, layer_types=(SLIDING, SLIDING))
    assert reached(config, 8) == list(range(2, 15))


@pytest.mark.slow
def test_windows_end_where_a_packed_example_ends():
    config = dataclasses.replace(TINY, layer_types=(SLIDING,))
    segments = jnp.array([[1] * 6 + [2] * 9 + [0] * 2])
    assert reached(config, 7, segment_ids=segments) == [6, 7, 8, 9, 10]
    assert reached(config, 4, segment_ids=segments) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_packed_row_gives_each_example_the_hidden_states_it_has_alone():
    config, model, params, _ = load_case(CASES["published"])
    ids = IDS % config.vocab_size
    segments = np.repeat([1, 2, 3, 0], [6, 3, 5, 3])[None].astype(np.int32)
    spans = [slice(0, 6), slice(6, 9), slice(9, 14)]
    rows, within = np.zeros((2, 4, 17), np.int32)  # packed, then each example alone
    rows[0], within[0] = ids, segments
    for row, span in enumerate(spans, 1):
        length = span.stop - span.start
        rows[row, :length], within[row, :length] = ids[0, span], 1
    packed, *alone = jax.jit(model.apply)({"params": params}, rows, segment_ids=within).logits
    for logits, span in zip(alone, spans, strict=True):
        assert relative_difference(packed[span], logits[: span.stop - span.start]) < 1e-5


@pytest.mark.slow
def test_local_and_global_layers_have_rotary_positions_of_their_own():
    changes = {"rope": Rope(theta=7.0), "local_rope": Rope(theta=7.0)}
    for kind, field in ((FULL, "rope"), (SLIDING, "local_rope")):
        config = dataclasses.replace(TINY, layer_types=(kind,))
        plain = run(config)
        for name, rope in changes.items():
            same = np.array_equal(run(dataclasses.replace(config, **{name: rope})), plain)
            assert same == (name != field)


def parts(config):
    """Layers in each part of the stack and block, and those that have an attention norm."""
    stack = parameter_shapes(build_model(config, ComputeConfig()))["stack"]
    norms, layers = {}, {}
    for part, blocks in stack.items():
        layers[part] = [jax.tree.leaves(block)[0].shape[0] for block in blocks.values()]
        norms[part] = {"attention_norm" in block for block in blocks.values()}
    return layers, norms


@pytest.mark.parametrize(
    ("layers", "kinds", "expected"),
    [
        (22, (), {"first": [1], "layers": [7, 7, 7]}),
        (28, (), {"first": [1], "layers": [9, 9, 9]}),
        (6, (), {"first": [1], "layers": [1, 1, 1], "remainder": [1, 1]}),
        (1, (), {"first": [1]}),
        (4, (FULL, FULL, FULL, FULL), {"first": [1], "layers": [3]}),
        (
            5,
            (FULL, SLIDING, FULL, FULL, SLIDING),
            {"first": [1], "layers": [1, 1, 1], "remainder": [1]},
        ),
    ],
)
def test_layers_after_the_first_are_stacked_by_the_shortest_pattern(layers, kinds, expected):
    found, norms = parts(dataclasses.replace(TINY, num_layers=layers, layer_types=kinds))
    assert found == expected
    assert norms.pop("first") == {False}
    assert all(norm == {True} for norm in norms.values())


def test_without_its_biases_a_model_has_no_bias_but_that_of_words_and_labels():
    for architecture, left in (
        ("MaskedLM", {"mlm_head"}),
        ("TokenClassification", {"classification_head"}),
    ):
        config = dataclasses.replace(TINY, architecture=f"ModernBertFor{architecture}")
        shapes = parameter_shapes(build_model(config, ComputeConfig()))
        biased = {
            path[0].key
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
            if path[-1].key == "bias"
        }
        assert biased == left


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rows_are_labelled_by_their_first_token_or_the_mean_of_all(pooling):
    config = dataclasses.replace(
        TINY, architecture="ModernBertForSequenceClassification", pooling=pooling
    )
    model = build_model(config, ComputeConfig())
    params = randomize(parameter_shapes(model))

    def classify(hidden, mask=None):
        ids = np.ones(hidden.shape[:2], np.int32)
        return model.apply({"params": params}, hidden, ids, mask, method="classify")

    hidden = np.random.default_rng(1).standard_normal((2, 5, 12)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows = (
        hidden[:, 0] if pooling == "cls" else np.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    )
    expected = classify(rows[:, None])
    np.testing.assert_allclose(classify(hidden, mask), expected, rtol=1e-5, atol=1e-5)
    full = hidden[:, 0] if pooling == "cls" else hidden.mean(1)
    np.testing.assert_allclose(classify(hidden), classify(full[:, None]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_drop_rate_acts_in_training_alone(field):
    plain, config = run(TINY), dataclasses.replace(TINY, **{field: 0.5})
    np.testing.assert_array_equal(run(config), plain)
    rngs = {"dropout": jax.random.key(0)}
    assert not np.array_equal(run(config, deterministic=False, rngs=rngs), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prefix"), [("bare", True), ("tokens", False)])
def test_files_with_and_without_a_prefix_are_read_alike(name, prefix):
    tensors = drawn_tensors(CASES[name])
    other = {
        f"model.{key}" if prefix else key.removeprefix("model."): tensor
        for key, tensor in tensors.items()
    }
    assert other.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES[name], other), import_case(CASES[name], tensors))


@pytest.mark.slow
def test_a_copy_of_the_word_table_is_passed_over():
    tensors = drawn_tensors(CASES["published"])
    more = tensors | {"decoder.weight": tensors["model.embeddings.tok_embeddings.weight"]}
    assert_bit_equal(
        import_case(CASES["published"], more), import_case(CASES["published"], tensors)
    )


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = CASES[name].config
    ours = from_huggingface(theirs)
    assert from_huggingface(config_json(ours)) == ours
    old = {"num_labels", "hidden_activation", "classifier_activation"}
    new = {key: value for key, value in theirs.items() if key not in old}
    assert config_json(ours).items() >= new.items()


def test_a_model_of_ones_own_has_none_of_the_published_special_ids():
    written = config_json(dataclasses.replace(SIZES["modernbert-base"], vocab_size=400))
    names = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")
    assert [written[name] for name in names] == [None] * 4


def test_the_old_spelling_of_positions_and_the_new_one_are_the_same_model():
    old = {
        "global_rope_theta": 300.0,
        "local_rope_theta": 30.0,
        "global_attn_every_n_layers": 2,
        "num_hidden_layers": 3,
    }
    new = {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 300.0},
            SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        },
        "layer_types": [FULL, SLIDING, FULL],
        "num_hidden_layers": 3,
    }
    config = from_huggingface(old)
    assert config == from_huggingface(new)
    assert (config.rope, config.local_rope) == (Rope(theta=300.0), Rope(theta=30.0))
    assert config.kinds == (FULL, SLIDING, FULL)
    # Null, in files of transformers 4: local layers turn as global ones do.
    assert from_huggingface(old | {"local_rope_theta": None}).local_rope == Rope(theta=300.0)


def test_a_list_of_layers_wins_over_their_number():
    both = {"num_hidden_layers": 2, "layer_types": [FULL, FULL], "global_attn_every_n_layers": 3}
    assert from_huggingface(both).kinds == (FULL, FULL)


def test_positions_can_be_stretched():
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = from_huggingface({"rope_scaling": scaling})
    assert config.rope == Rope(theta=160000.0, scaling="linear", factor=4.0)
    assert config.local_rope == Rope(theta=10000.0, scaling="linear", factor=4.0)
    assert from_huggingface(to_huggingface(config)) == config


def test_fields_that_files_leave_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "modernbert"}) == SIZES["modernbert-base"]


def test_layers_in_no_pattern_are_read_at_once():
    types = [SLIDING] * 9999 + [FULL]
    found = from_huggingface({"num_hidden_layers": 10_000, "layer_types": types})
    assert found.kinds == tuple(types)


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_activation", "elu", "activation 'elu'"),
        ("classifier_activation", "tanh", "activation 'tanh'"),
        ("classifier_pooling", "max", "classifier_pooling 'max'"),
        ("model_type", "bert", "model_type 'bert'"),
        ("num_hidden_layers", "22", "num_hidden_layers '22'"),
        ("local_attention", 0, "local_attention is 0"),
        ("sliding_window", 128, "sliding_window 128, which is not supported; only 64 is"),
        ("layer_types", [FULL, "chunked_attention"], "layer_types 'chunked_attention'"),
        ("layer_types", [SLIDING, FULL], "names 2 layers, but model.num_layers is 22"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ("global_attn_every_n_layers", 0, "global_every is 0"),
        ("global_attn_every_n_layers", "3", "global_attn_every_n_layers '3'"),
        ("mlp_bias", "yes", "mlp_bias 'yes'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("gated", False), ("qkv_bias", True), ("norm", "rms")],
)
def test_a_model_that_hugging_face_has_no_modernbert_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(TINY, **{field: value}))


def test_a_norm_after_each_sub_layer_is_refused():
    with pytest.raises(
        ValueError, match=r"model\.norm_position is 'post'; ModernBERT has only 'pre'"
    ):
        dataclasses.replace(TINY, norm_position="post")


# Parameters of ModernBertForMaskedLM; the paper states 149M and 395M.
PUBLISHED = {"modernbert-base": 149_655_232, "modernbert-large": 395_881_664}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


def test_the_dropout_of_a_classifier_may_be_that_of_the_layers():
    config = dataclasses.replace(TINY, classifier_dropout=None, dropout=0.25)
    assert config_json(config)["classifier_dropout"] == 0.25
