"""CLIP: its configuration, published files and sizes; tests/golden/clip.npz has its outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families.clip import (
    SIZES,
    ClipClassifierConfig,
    ClipConfig,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
    from_huggingface,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json, family_of_json
from flax_transformers.huggingface.fields import kept_fields, with_kept
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.huggingface.read import initial_directory_config
from flax_transformers.optim.optimizers import AdamW, decay_mask
from flax_transformers.optim.selection import depths, logical_axes
from flax_transformers.testing import tiny_architecture
from tests.families.parity import (
    assert_parity,
    assert_weights_come_back,
    count_parameters,
    first_by_default,
    first_of_each_by_default,
    import_case,
    load_case,
)
from tests.golden import clip as golden
from tests.huggingface.tensors import export_weights


@pytest.mark.slow
@pytest.mark.full
def test_layers_that_are_written_out_compute_the_same():
    assert_parity(golden.END_ID, golden.__file__, scan_layers=False)


def test_the_end_of_a_text_is_its_first_end_id_or_its_highest_id():
    ids = jnp.array([[5, 71, 82, 71], [71, 3, 4, 5]])
    hidden = jnp.arange(8.0).reshape(2, 4, 1)

    def pooled(ends):
        config = replace(from_huggingface(golden.END_ID.config), eos_ids=ends, hidden_size=1,
                         num_heads=1, projection_dim=1)  # fmt: skip
        model = build_model(config)
        kernel = {"text_projection": {"kernel": jnp.ones((1, 1))}}
        names = ("text_tower", "image_tower", "image_projection", "logit_scale")
        params = kernel | {key: {} for key in names}
        params["logit_scale"] = {"scale": jnp.zeros(())}
        return model.apply({"params": params}, hidden, ids, method="pool_text")[:, 0].tolist()

    assert pooled((71,)) == [1.0, 4.0]
    assert pooled(()) == [2.0, 4.0]


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.PAIRS:
        config = from_huggingface(case.config)
        assert from_huggingface(config_json(config)) == config
    assert from_huggingface(golden.HIGHEST_ID.config).eos_ids == ()
    ours = ClipConfig(
        vocab_size=50,
        hidden_size=6,
        num_layers=1,
        num_heads=3,
        intermediate_size=5,
        max_positions=9,
        projection_dim=7,
        activation="gelu",
        norm_eps=0.5,
        attention_dropout=0.125,
        initial_logit_scale=1.25,
        pad_id=3,
        bos_id=4,
        eos_ids=(7,),
        vision=ClipVision(
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            intermediate_size=9,
            image_size=9,
            patch_size=3,
            num_channels=1,
            drop_path=0.5,
        ),
    )
    read = from_huggingface(config_json(ours))
    # What only training needs is not in the file.
    assert replace(read, vision=replace(read.vision, drop_path=0.5)) == ours


def test_the_configuration_of_an_encoder_alone_survives_the_way_out_and_back():
    for case in golden.TOWERS:
        read = family_of_json(case.config).from_huggingface
        config = read(case.config)
        assert read(config_json(config)) == config
        assert config_json(config)["model_type"] == case.config["model_type"]
    small = {"hidden_size": 6, "num_layers": 1, "num_heads": 3, "intermediate_size": 5}
    text = ClipTextConfig(
        architecture="CLIPTextModelWithProjection", **small, vocab_size=50, max_positions=9,
        projection_dim=7, activation="gelu", pad_id=3, bos_id=4, eos_ids=(),
    )  # fmt: skip
    vision = ClipVisionConfig(**small, patch_size=3, image_size=9, projection_dim=7)
    for config in (text, vision):
        written = config_json(config)
        assert family_of_json(written).from_huggingface(written) == config


TEXT_OF_A_DIFFUSION_MODEL = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
"""The text_encoder/config.json of published diffusion models, without the version."""


def test_the_text_encoder_of_a_diffusion_model_has_the_published_size():
    config = family_of_json(TEXT_OF_A_DIFFUSION_MODEL).from_huggingface(TEXT_OF_A_DIFFUSION_MODEL)
    assert config.eos_ids == () and config.projection_dim == 768
    assert count_parameters(config) == 123_060_480


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    first_of_each_by_default({case.name: case.config["model_type"] for case in golden.TOWERS}),
)
def test_an_encoder_alone_computes_what_the_original_does(name):
    case = next(case for case in golden.TOWERS if case.name == name)
    assert_parity(case, golden.__file__)
    assert_weights_come_back(case)


@pytest.mark.slow
def test_the_embeddings_of_an_encoder_alone_are_those_of_the_whole_before_scaling():
    _, model, params, _ = load_case(golden.END_ID)
    pixels = golden.END_ID.inputs["pixel_values"]
    embed_image = jax.jit(partial(model.apply, method="embed_image"))
    whole = embed_image({"params": params}, pixels)
    vision = golden.tower_case("v", golden.END_ID, "CLIPVisionModelWithProjection", "image_embeds")
    alone = build_model(family_of_json(vision.config).from_huggingface(vision.config))
    own = params["image_tower"] | {"image_projection": params["image_projection"]}
    found = jax.jit(alone.apply)({"params": own}, pixels).image_embeds
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(found / length, whole, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a model of both encoders, and its parameters."""
    _, model, params, _ = load_case(golden.END_ID)
    folder = tmp_path_factory.mktemp("clip")
    save_pretrained(folder, model, params)
    return folder, params


@pytest.mark.parametrize(
    ("architecture", "tower", "heads"),
    [
        ("CLIPVisionModelWithProjection", "image", {"image_projection"}),
        ("CLIPTextModel", "text", set()),
        pytest.param(
            "CLIPForImageClassification", "image", {"classification_head"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "CLIPTextForSequenceClassification",
            "text",
            {"classification_head"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_folder_of_both_encoders_is_read_as_one(whole, architecture, tower, heads):
    folder, params = whole
    assert initial_directory_config(folder, architecture).architecture == architecture
    model, own = load_pretrained(folder, architecture=architecture)
    assert model.config.architecture == architecture
    expected = params[f"{tower}_tower"]
    if architecture == "CLIPForImageClassification":
        del expected["final_norm"]  # which its classifier does not use
    assert own.keys() == expected.keys() | heads
    jax.tree.map(np.testing.assert_array_equal, {key: own[key] for key in expected}, expected)
    if "image_projection" in heads:
        jax.tree.map(
            np.testing.assert_array_equal, own["image_projection"], params["image_projection"]
        )


def test_a_folder_of_both_encoders_is_not_read_as_another_family(whole):
    folder, _ = whole
    assert initial_directory_config(folder, "BertModel").architecture == "CLIPModel"
    with pytest.raises(UserError, match="'SiglipTextModel' is not one .*CLIPForImageClassific"):
        load_pretrained(folder, architecture="SiglipTextModel")


def test_a_classifier_is_written_with_its_labels_as_a_clip():
    config = ClipClassifierConfig(num_labels=3, label_names=("a", "b", "c"), hidden_size=24)
    written = config_json(config)
    assert (written["model_type"], written["id2label"]["1"]) == ("clip", "b")
    assert family_of_json(written).from_huggingface(written) == config


def test_the_norm_before_the_layers_learns_as_slowly_as_the_embeddings():
    boxed = boxed_shapes(build_model(tiny_architecture("CLIPVisionModel")))
    found, head = depths(nn.meta.unbox(boxed), logical_axes(boxed))
    assert found["pre_norm"]["scale"] == found["embeddings"]["patches"]["kernel"] == 0
    assert found["final_norm"]["scale"] == head == 3


OLD = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "projection_dim": 512,
    "text_config": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "top_k": 50,
        "length_penalty": 1.0,
    },
    "text_config_dict": None,
    "vision_config": {"hidden_size": 768, "patch_size": 32, "dropout": 0.0},
    "vision_config_dict": None,
}
"""The config.json of openai/clip-vit-base-patch32, without most of the fields that say nothing."""


def test_a_published_config_is_read_and_written_back():
    config = from_huggingface(OLD)
    assert config == replace(
        SIZES["clip-b32"], eos_ids=(), bos_id=0, initial_logit_scale=2.6592
    )  # fmt: skip
    aliases = {"text_config_dict": "text_config", "vision_config_dict": "vision_config"}
    kept = kept_fields(OLD, to_huggingface(config), aliases)
    written = with_kept(config_json(config), replace(config, hub_fields=kept), {}, from_huggingface)
    assert OLD.items() <= written.items()


def test_the_part_that_transformers_reads_is_read():
    text = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 8}
    other = {"hidden_size": 99}
    config = from_huggingface({"text_config": other, "text_config_dict": text})
    assert config.hidden_size == 12


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("text_config", {"hidden_act": "elu"}, "activation 'elu'"),
        ("vision_config", {"patch_size": [16, 8]}, "patch_size"),
        ("vision_config", {"image_size": 8}, "image_size 8 is less than one patch"),
        ("text_config", {"num_attention_heads": 7}, "does not divide"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(part, fields, message):
    with pytest.raises(UserError, match=message):
        from_huggingface({part: fields})


def test_position_ids_of_older_files_are_passed_over():
    case = golden.END_ID
    _, _, params, table = load_case(case)
    tensors = export_weights(table, params, from_huggingface(case.config).vocab_size)
    for tower in ("text", "vision"):
        tensors[f"{tower}_model.embeddings.position_ids"] = np.arange(9.0)[None]
    read = import_case(case, tensors)
    assert read["logit_scale"] == params["logit_scale"]
    assert read["logit_scale"]["scale"].shape == ()


def test_the_scale_of_the_logits_is_not_decayed():
    axes = logical_axes(boxed_shapes(build_model(from_huggingface(golden.END_ID.config))))
    _, _, params, _ = load_case(golden.END_ID)
    decayed = decay_mask(params, AdamW(learning_rate=1.0).no_decay, axes)
    assert not decayed["logit_scale"]["scale"]
    assert decayed["text_projection"]["kernel"]


def test_the_first_temperature_is_the_published_one():
    assert math.exp(-ClipConfig().initial_logit_scale) == pytest.approx(0.07)


PUBLISHED = {
    "clip-b32": 151_277_313,
    "clip-b16": 149_620_737,
    "clip-l14": 427_616_513,
    "clip-l14-336": 427_944_193,
    "clip-h14": 986_109_441,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
