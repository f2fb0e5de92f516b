"""Encoders as a whole: names of axes, inputs, heads, vocabulary padding, dropout and dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.families.bert import BertForNextSentencePrediction, BertForPreTraining
from flax_transformers.huggingface.placement import body_names
from flax_transformers.models.config import ComputeConfig, TextConfig
from flax_transformers.models.encoder import (
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderWithPooler,
)
from flax_transformers.models.heads import mean_of_tokens
from flax_transformers.models.text import (
    TextForQuestionAnswering,
    TextForTokenClassification,
    TextModel,
)
from flax_transformers.parallel.rules import mesh_axes
from tests.huggingface.tensors import drawn_model
from tests.models import reference

POST_NORM = TextConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=2,
    num_heads=3,
    intermediate_size=5,
    max_positions=8,
    norm_position="post",
    token_types=2,
    embedding_norm=True,
    dropout=0.1,
    attention_dropout=0.1,
)
PRE_NORM = TextConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=2,
    num_heads=3,
    intermediate_size=5,
    max_positions=8,
    norm="rms",
    activation="silu",
    gated=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
    positions="none",
    dropout=0.1,
)
IDS = jnp.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
CONFIGS = pytest.mark.parametrize("config", [POST_NORM, PRE_NORM], ids=["post_norm", "pre_norm"])


@cache
def build(config, kind=EncoderForMaskedLM, **compute):
    model = kind(config, ComputeConfig(**compute))
    boxed = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return model, boxed, reference.randomize(nn.meta.unbox(boxed))


@cache
def forward(config, kind=EncoderForMaskedLM, **compute):
    """The outputs of a model as a compiled function of its inputs."""
    model, _, params = build(config, kind, **compute)
    return jax.jit(lambda *args, **inputs: model.apply({"params": params}, *args, **inputs))


@CONFIGS
def test_every_parameter_has_axis_names_that_the_rules_know(config):
    _, boxed, _ = build(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    ):
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim
        assert None not in leaf.names, path
        assert (leaf.names[0] == "layers") == (path[0].key == "stack")
        mesh_axes(leaf.get_partition_spec())


@pytest.mark.slow
@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_never_sums_in_bfloat16(config, dtype):
    # Tracing it also shows that no operation needs rank promotion, which tests forbid.
    model, _, params = build(config, dtype=dtype)

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        output = model.apply({"params": params}, IDS, MASK, deterministic=False, rngs=rngs)
        return jnp.sum(output.logits)

    dtypes = {"dot_general": set(), "reduce_sum": set(), "scatter-add": set()}
    for equation in reference.equations(jax.grad(loss), params):
        if equation.primitive.name in dtypes:
            dtypes[equation.primitive.name].add(str(equation.outvars[0].aval.dtype))
    assert dtypes == {name: {"float32"} for name in dtypes}


@pytest.mark.slow
@CONFIGS
def test_logits_have_the_real_vocabulary_and_unembedding_the_padded_one(config):
    model, _, params = build(config)
    output = forward(config)(IDS, MASK)
    assert output.logits.shape == (2, 5, 11)
    assert output.last_hidden_state.shape == (2, 5, 6)
    unembed = jax.jit(partial(model.apply, method="unembed"))
    logits = unembed({"params": params}, output.last_hidden_state)
    assert logits.shape == (2, 5, 128)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[..., :11], output.logits, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(jax.nn.softmax(logits, axis=-1)[..., 11:]) == 0


@pytest.mark.slow
@CONFIGS
def test_what_stands_at_padding_does_not_reach_the_tokens(config):
    before, after = (forward(config)(ids, MASK).logits for ids in (IDS, IDS.at[1, 3:].set(9)))
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1, :3], before[1, :3])
    assert not np.array_equal(after[1, 3:], before[1, 3:])


@pytest.mark.slow
def test_inputs_left_out_have_the_usual_meaning():
    def apply(inputs):
        return forward(POST_NORM)(**inputs).logits

    explicit = {
        "input_ids": IDS,
        "attention_mask": jnp.ones_like(IDS),
        "token_type_ids": jnp.zeros_like(IDS),
        "position_ids": jnp.broadcast_to(jnp.arange(5), (2, 5)),
    }
    np.testing.assert_allclose(apply({"input_ids": IDS}), apply(explicit), rtol=1e-6)
    for name in ("token_type_ids", "position_ids"):
        other = explicit | {name: 1 - jnp.minimum(explicit[name], 1)}
        assert not np.allclose(apply(other), apply(explicit), rtol=1e-3)


@pytest.mark.slow
def test_segments_of_one_example_are_its_attention_mask():
    by_mask = forward(POST_NORM)(IDS, MASK).logits
    by_segment = forward(POST_NORM)(IDS, segment_ids=3 * MASK).logits
    np.testing.assert_array_equal(by_segment[MASK == 1], by_mask[MASK == 1])


@CONFIGS
def test_a_pre_norm_stack_ends_in_a_norm_and_a_post_norm_stack_does_not(config):
    _, boxed, _ = build(config)
    assert ("final_norm" in boxed) == (config.norm_position == "pre")


@pytest.mark.slow
def test_padding_sees_the_tokens_for_a_pooler_may_read_it():
    model, _, params = build(POST_NORM, EncoderWithPooler)
    left = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pool = jax.jit(lambda ids: model.apply({"params": params}, ids, left).pooler_output)
    before, after = pool(IDS), pool(IDS.at[0, 4].set(9))
    assert not np.array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    # But padding is seen by none: the first place reads itself and the tokens.
    np.testing.assert_array_equal(pool(IDS.at[0, 1].set(9)), before)


HEADS = {
    TextModel: {},
    EncoderWithPooler: {"pooler_output": (2, 6)},
    EncoderForMaskedLM: {"logits": (2, 5, 11)},
    BertForNextSentencePrediction: {"logits": (2, 2)},
    BertForPreTraining: {"prediction_logits": (2, 5, 11), "seq_relationship_logits": (2, 2)},
    EncoderForSequenceClassification: {"logits": (2, 4)},
    TextForTokenClassification: {"logits": (2, 5, 4)},
    TextForQuestionAnswering: {"start_logits": (2, 5), "end_logits": (2, 5)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_each_architecture_gives_its_own_outputs_in_float32_and_no_others(kind):
    model = kind(replace(POST_NORM, num_labels=4), ComputeConfig(dtype="bfloat16"))
    output = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), IDS), IDS, MASK))
    there = {name: value for name, value in vars(output).items() if value is not None}
    assert there.pop("last_hidden_state").dtype == jnp.bfloat16
    assert {name: value.shape for name, value in there.items()} == HEADS[kind]
    pooled = {"pooler_output"}
    assert {there[name].dtype for name in there.keys() - pooled} <= {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_architectures_differ_in_what_counts_as_a_head_alone(kind):
    model, _, _ = build(POST_NORM, kind)
    assert body_names(model) == {"words", "embeddings", "stack"}


@pytest.mark.slow
def test_a_classifier_drops_at_its_own_rate_in_training_alone():
    config = replace(POST_NORM, dropout=0.0, attention_dropout=0.0, classifier_dropout=0.5)
    hidden = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    for kind, method, inputs in (
        (EncoderForSequenceClassification, "classify", (hidden, IDS)),
        (TextForTokenClassification, "tag", (hidden,)),
    ):
        model, _, params = build(config, kind)
        label = jax.jit(
            partial(model.apply, {"params": params}, *inputs, method=method),
            static_argnames="deterministic",
        )
        rngs = {"dropout": jax.random.key(0)}
        plain = label()
        np.testing.assert_array_equal(label(rngs=rngs), plain)
        assert not np.array_equal(label(deterministic=False, rngs=rngs), plain)


@pytest.mark.slow
def test_dropout_is_off_unless_asked_for_and_differs_between_steps():
    model, _, params = build(POST_NORM)

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, IDS, MASK, deterministic=False, rngs=rngs).logits

    plain = forward(POST_NORM)(IDS, MASK).logits
    one, again, other = train(jax.random.key(1)), train(jax.random.key(1)), train(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, plain)
    assert np.isfinite(one).all()


@pytest.mark.slow
def test_bfloat16_computes_nearly_what_float32_does():
    # Rounding to eight binary digits, some ten times in a row, stays within a few percent.
    outputs = []
    for dtype, run in (
        ("float32", forward(POST_NORM)),
        ("bfloat16", forward(POST_NORM, dtype="bfloat16")),
    ):
        output = run(IDS, MASK)
        assert output.last_hidden_state.dtype == dtype
        assert output.logits.dtype == jnp.float32
        outputs.append(output.last_hidden_state.astype(jnp.float32))
    assert float(jnp.abs(outputs[0] - outputs[1]).max() / jnp.abs(outputs[0]).max()) < 0.03


def test_the_mean_of_a_row_without_tokens_is_finite_and_leaves_the_others():
    hidden_BTD = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[1, 1, 0], [0, 0, 0]])
    found = mean_of_tokens(hidden_BTD, mask)
    assert found[0].tolist() == [1.0, 2.0]
    assert jnp.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_row_that_fills_up_a_batch_has_finite_logits_and_changes_no_other(pooling):
    model, params = drawn_model("ModernBertForSequenceClassification", pooling=pooling)
    ids, mask = np.full((2, 6), 7), np.array([[1, 1, 1, 1, 0, 0], [0] * 6])
    both = jax.jit(model.apply)({"params": params}, ids, attention_mask=mask).logits
    one = jax.jit(model.apply)({"params": params}, ids[:1], attention_mask=mask[:1]).logits
    assert np.isfinite(both).all()
    np.testing.assert_allclose(both[:1], one, rtol=1e-5, atol=1e-6)
