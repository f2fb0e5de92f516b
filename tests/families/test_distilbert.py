"""DistilBERT against Hugging Face's, through tests/golden/distilbert.npz; its configuration."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformers.config_json import from_json, to_json
from flax_transformers.errors import UserError
from flax_transformers.families.distilbert import FAMILY, JSON, SIZES, DistilBertConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.huggingface.fields import kept_fields
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import check_resumable
from tests.families.parity import count_parameters, first_by_default
from tests.golden import distilbert as golden
from tests.huggingface.tensors import drawn_model

CASES = {case.name: case for case in golden.CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert JSON.read(config_json(config)) == config


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "distilbert"}) == DistilBertConfig()
    assert JSON.read({"hidden_size": 24, "num_attention_heads": 3}).hidden_size == 24


HEADS = {
    "SequenceClassification": ("seq_classif_dropout", 0.2),
    "MultipleChoice": ("seq_classif_dropout", 0.2),
    "QuestionAnswering": ("qa_dropout", 0.1),
    "TokenClassification": ("dropout", 0.15),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_dropout_before_a_head_is_that_of_the_original(head):
    field, rate = HEADS[head]
    given = {"architectures": [f"DistilBertFor{head}"], "dropout": 0.15}
    config = JSON.read(given)
    assert config.head_dropout == rate
    assert config_json(config)[field] == rate
    other = JSON.read(given | {"seq_classif_dropout": 0.3, "qa_dropout": 0.3, "dropout": 0.3})
    assert other.head_dropout == 0.3 and JSON.read(config_json(other)) == other


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head_reads_the_hidden_states_after_dropout(head, monkeypatch):
    model, params = drawn_model(f"DistilBertFor{head}", dropout=0.0, attention_dropout=0.0)
    ids = np.arange(5, 15, dtype=np.int32).reshape(
        (1, 2, 5) if head == "MultipleChoice" else (2, 5)
    )

    def logits(rate):
        monkeypatch.setattr(DistilBertConfig, "head_dropout", rate)
        rngs = {"dropout": jax.random.key(0)}
        outputs = jax.jit(
            lambda tree: model.apply({"params": tree}, ids, deterministic=False, rngs=rngs)
        )(params)
        return np.asarray(outputs.start_logits if head == "QuestionAnswering" else outputs.logits)

    assert not np.array_equal(logits(0.5), logits(0.0))


@pytest.mark.parametrize("head", [*HEADS, "MaskedLM"])
def test_runs_from_before_answer_dropout_are_resumed(head):
    model = DistilBertConfig(architecture=f"DistilBertFor{head}")
    config = dataclasses.replace(tiny_config("text.txt", "store"), model=model)
    saved = to_json(config)
    del saved["model"]["answer_dropout"]
    assert saved["model"]["classifier_dropout"] == 0.2  # which they saved for every head
    assert check_resumable(saved, config, "here") == []
    assert from_json(saved) == config


@pytest.mark.parametrize("head", HEADS)
def test_the_fields_of_the_published_files_are_known(head, caplog):
    given = {"architectures": [f"DistilBertFor{head}"], "qa_dropout": 0.1, "dropout": 0.1}
    given |= {"seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False}
    kept_fields(given, config_json(JSON.read(given)), FAMILY.aliases)
    assert caplog.text == ""


PUBLISHED = {
    "distilbert-base": 66_985_530,
    "distilbert-base-cased": 65_812_036,
    "distilbert-base-multilingual-cased": 135_445_755,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_type", "bert", "model_type 'bert'"),
        ("activation", "tanh", "activation 'tanh'"),
        ("dim", "768", "dim '768'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


def test_token_types_cannot_be_written():
    with pytest.raises(UserError, match=r"model\.token_types is 2.*checkpoint format"):
        config_json(DistilBertConfig(token_types=2))
