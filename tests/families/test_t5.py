"""T5, mT5 and umT5 against Hugging Face's, through tests/golden/t5.npz."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.families.t5 import (
    SIZES,
    T5Config,
    from_huggingface,
    settle,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import assert_bit_equal, relative_difference
from tests.families.parity import (
    TOLERANCE,
    assert_parity,
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import t5 as golden
from tests.golden.hub import read_golden
from tests.huggingface.tensors import export_weights
from tests.models.encoder_decoders import (
    assert_packed_examples_are_as_alone,
    assert_packed_examples_do_not_see_each_other,
    assert_steps_are_as_the_full_pass,
)

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
BOTH_BIASES = pytest.mark.parametrize("name", first_by_default(["original", "every_layer"]))
TINY = T5Config(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    head_dim=5,
    intermediate_size=8,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=9,
)


@pytest.mark.slow
@pytest.mark.full  # test_modernbert.py has an example
def test_a_stack_that_is_written_out_gives_the_same():
    assert_parity(CASES["every_layer"], golden.__file__, scan_layers=False)


@pytest.mark.slow
@BOTH_BIASES
def test_the_gradients_of_the_loss_are_those_of_torch(name):
    case = CASES[name]
    config, model, params, table = load_case(case)
    labels = jnp.asarray(case.labels)

    def loss(params):
        scores = jax.nn.log_softmax(model.apply({"params": params}, **case.inputs).logits)
        picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0.0)) / jnp.sum(labels >= 0)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = read_golden(golden.__file__, case)
    assert relative_difference(value, expected["loss"]) < TOLERANCE
    found = export_weights(table, grads, config.vocab_size)
    theirs = {name: value for name, value in expected.items() if name.startswith("gradients/")}
    assert theirs.keys() == {f"gradients/{name}" for name in found}
    biases = [name for name in found if "relative_attention_bias" in name]
    assert len(biases) == (2 if name == "original" else 4)
    assert all(np.any(found[name]) for name in biases)
    far = {name: relative_difference(found[name], theirs[f"gradients/{name}"]) for name in found}
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}


@pytest.mark.slow
def test_the_logits_of_published_umt5_files_are_those_of_hugging_face_before_it_scales_them():
    _, model, params, _ = load_case(case := golden.PUBLISHED_UMT5)
    output = jax.jit(partial(model.apply, {"params": params}))(**case.inputs)
    scaled = case.attended("logits", np.asarray(output.logits)) * case.config["d_model"] ** -0.5
    expected = read_golden(golden.__file__, case)["logits"]
    assert relative_difference(scaled, expected) < TOLERANCE


@pytest.mark.slow
@BOTH_BIASES
def test_cached_steps_give_the_logits_of_the_full_pass(name):
    config, model, params, _ = load_case(CASES[name])
    assert_steps_are_as_the_full_pass(model, params, config.vocab_size)


@pytest.mark.slow
@BOTH_BIASES
def test_packed_examples_do_not_see_each_other(name):
    config, model, params, _ = load_case(CASES[name])
    assert_packed_examples_do_not_see_each_other(model, params, config.vocab_size)


@pytest.mark.slow
@BOTH_BIASES
def test_packed_examples_are_as_alone(name):
    config, model, params, _ = load_case(CASES[name])
    assert_packed_examples_are_as_alone(model, params, config.vocab_size)


def with_copies(tensors):
    """The layout of old files, with a table that cross-attention never had a use for."""
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return (
        tensors
        | dict.fromkeys(names, tensors["shared.weight"])
        | {unused: np.ones((8, 3), np.float32)}
    )


def with_tied_head(tensors):
    return with_copies(tensors) | {"lm_head.weight": tensors["shared.weight"]}


def with_decoder(tensors):
    """An encoder alone is read from the file of a whole model."""
    return tensors | {
        "decoder.final_layer_norm.weight": np.ones(3, np.float32),
        "lm_head.weight": np.ones((3, 3), np.float32),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("original", with_tied_head),
        ("newer", with_copies),
        ("every_layer", with_copies),
        ("encoder", with_decoder),
    ],
)
def test_published_layouts_are_read_as_the_freshly_saved_one(name, layout):
    tensors = drawn_tensors(CASES[name])
    published = layout(tensors)
    assert published.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES[name], published), import_case(CASES[name], tensors))


def test_the_tensors_tell_whether_the_logits_have_a_table_of_their_own():
    tied = dataclasses.replace(TINY, scale_logits=False)
    untied = dataclasses.replace(tied, tie_embeddings=False)
    words, head = np.ones((50, 12)), np.zeros((50, 12))
    both = {"shared.weight": words, "lm_head.weight": head}
    assert settle(tied, both) == settle(untied, both) == untied
    assert settle(dataclasses.replace(tied, architecture="T5Model"), both).tie_embeddings is False
    assert settle(untied, {"shared.weight": words}) == untied
    assert settle(tied, {"shared.weight": words}) == tied
    assert settle(tied, {"shared.weight": words, "lm_head.weight": words}) == tied


@pytest.mark.slow
def test_a_directory_that_calls_an_untied_model_tied_is_read_as_it_is(tmp_path):
    _, model, params, _ = load_case(CASES["newer"])
    ft.save_pretrained(tmp_path, model, params)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    found, again = ft.load_pretrained(tmp_path)
    settings = found.config.generation  # which this folder has
    assert found.config == dataclasses.replace(model.config, generation=settings)
    assert_bit_equal(again, params)


def save_newer(directory, architecture, **fields):
    """T5 1.1 without logits' own table: a bare model, whose config.json may say otherwise."""
    config = dataclasses.replace(
        TINY, architecture="T5Model", tie_embeddings=False, scale_logits=False
    )
    model = build_model(config, ComputeConfig())
    boxed = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), nn.meta.unbox(boxed))
    ft.save_pretrained(directory, model, params)
    path = directory / "config.json"
    described = json.loads(path.read_text()) | {"architectures": [architecture]} | fields
    path.write_text(json.dumps(described))


def test_an_untied_model_without_its_table_for_the_logits_is_refused(tmp_path):
    save_newer(tmp_path / "model", "T5ForConditionalGeneration")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        ft.load_pretrained(tmp_path / "model")


@pytest.mark.slow
def test_a_bare_untied_model_gets_a_new_table_for_the_logits_and_says_so(tmp_path, caplog):
    save_newer(tmp_path / "model", "T5Model")
    model, params = ft.load_pretrained(
        tmp_path / "model", architecture="T5ForConditionalGeneration"
    )
    assert not model.config.tie_embeddings
    assert params["lm_head"]["words"]["kernel"].shape == (12, 128)
    assert "lm_head: newly initialised" in caplog.text


def test_a_bare_tied_model_makes_logits_with_its_words(tmp_path, caplog):
    save_newer(tmp_path / "model", "T5Model", tie_word_embeddings=True)
    model, params = ft.load_pretrained(
        tmp_path / "model", architecture="T5ForConditionalGeneration"
    )
    assert model.config.tie_embeddings
    assert "lm_head" not in params
    assert not caplog.text


def test_the_width_of_heads_is_written_where_it_is_left_to_the_model_width():
    config = dataclasses.replace(TINY, head_dim=None)
    assert config_json(config)["d_kv"] == 4
    assert from_huggingface(config_json(config)) == config


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("T5EncoderModel", "t5-small"),
        ("MT5ForConditionalGeneration", "mt5-small"),
        ("UMT5ForConditionalGeneration", "umt5-small"),
    ],
)
def test_an_architecture_alone_tells_the_kind(architecture, name):
    config = from_huggingface({"architectures": [architecture], "tie_word_embeddings": False})
    same = ("bias_in_every_layer", "gated", "num_layers")
    assert config.architecture == architecture
    assert [getattr(config, field) for field in same] == [
        getattr(SIZES[name], field) for field in same
    ]


def test_what_transformers_5_writes_of_an_untied_model_is_read():
    theirs = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    config = from_huggingface(theirs)
    assert (config.tie_embeddings, config.scale_logits) == (True, False)
    assert config_json(config).items() >= theirs.items()


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = {key: value for key, value in CASES[name].config.items() if key != "num_labels"}
    assert config_json(from_huggingface(CASES[name].config)).items() >= theirs.items()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": True, "activation": "gelu_tanh", "tie_embeddings": False, "scale_logits": False},
        {"gated": True, "activation": "gelu", "scale_logits": False},
        {"activation": "gelu_tanh", "eos_ids": (7,), "pad_id": 3, "decoder_start_id": 4},
        {"architecture": "MT5EncoderModel", "scale_logits": False, "init_std": 0.5},
        {"architecture": "UMT5ForSequenceClassification", "bias_in_every_layer": True},
    ],
)
def test_the_configuration_survives_the_way_out_and_back(changes):
    ours = dataclasses.replace(TINY, **changes)
    assert from_huggingface(to_huggingface(ours)) == ours


def test_fields_that_old_files_leave_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "t5"}) == SIZES["t5-small"] == T5Config()
    newer = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    newer |= {"d_ff": 1024, "num_layers": 8, "num_heads": 6}
    assert from_huggingface(newer) == SIZES["t5-v1_1-small"]
    mt5 = from_huggingface({"model_type": "mt5", "tie_word_embeddings": False})
    assert mt5 == SIZES["mt5-small"]
    umt5 = {"model_type": "umt5", "tie_word_embeddings": False, "vocab_size": 256384}
    assert from_huggingface(umt5) == SIZES["umt5-small"]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("feed_forward_proj", "gated-quick", "activation 'quick'.*gelu_new"),
        ("feed_forward_proj", "double-gelu", "activation 'double-gelu'"),
        ("model_type", "longt5", "model_type 'longt5'"),
        ("d_kv", "64", "d_kv '64'"),
        ("architectures", ["Llama"], "model_type 't5', which does not go with.*'Llama'"),
        ("decoder_start_token_id", 32128, "decoder_start_id is 32128.*below 32128"),
        ("relative_attention_num_buckets", 7, "relative_buckets is 7; it must be even"),
        ("relative_attention_max_distance", 16, "relative_max_distance is 16"),
        ("architectures", ["T5ForCausalLM"], "architecture is 'T5ForCausalLM'.*T5EncoderModel"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        build_model(from_huggingface({field: value}), ComputeConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_position", "post"),
        ("qkv_bias", True),
        ("num_decoder_heads", 2),
        ("decoder_intermediate_size", 9),
    ],
)
def test_a_model_that_hugging_face_has_no_t5_for_is_not_written(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(TINY, **{field: value}))


# Parameters of the models for conditional generation.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "umt5-small": 306_601_984,
    "umt5-base": 592_043_520,
    "umt5-xl": 3_768_356_864,
    "umt5-xxl": 12_972_531_712,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
    "byt5-large": 1_228_183_552,
    "byt5-xl": 3_737_801_728,
    "byt5-xxl": 12_906_899_328,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decoder_start_token_id", "0", "decoder_start_token_id '0'; it must be a whole number"),
        ("d_kv", 0, "head_dim is 0; it must be at least 1"),
    ],
)
def test_numbers_that_are_none_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        from_huggingface({"architectures": ["T5ForConditionalGeneration"], field: value})
