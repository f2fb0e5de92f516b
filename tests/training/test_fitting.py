"""Objectives and models that do not go together, and runs that start from weights."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.t5 import T5Config
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.pretrained import initial_parameters
from flax_transformers.testing import tiny_bert, tiny_config, write_corpus
from flax_transformers.training.loop import train_prepared
from flax_transformers.training.step import check_fits
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

pytestmark = pytest.mark.usefixtures("one_device", "compiled_once")

PRETRAINING = "BertForPreTraining"


@pytest.mark.parametrize(
    ("objective", "config", "message"),
    [
        (NextSentence(), tiny_bert(), "needs next_sentence, which BertForMaskedLM does not have"),
        (SpanCorruption(), tiny_bert(), "needs decoder_input_ids, which BertForMaskedLM"),
        (MaskedLM(), T5Config(), "gives no targets to the decoder of T5ForCond"),
        (CausalLM(), tiny_bert(), "for a model that sees only what came before, and BertForM"),
        (MaskedLM(), GPT2Config(), "for a model that sees both ways, and GPT2LMHeadModel does not"),
        (MaskedLM(), tiny_bert(architecture="BertModel"), "needs unembed, which BertModel"),
    ],
)
def test_an_objective_that_a_model_cannot_serve_is_refused(objective, config, message):
    with pytest.raises(UserError, match=f"{type(objective).__name__} .*{message}"):
        check_fits(objective, build_model(config, ComputeConfig()))


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (MaskedLM(), tiny_bert()),
        (NextSentence(), tiny_bert(architecture=PRETRAINING)),
        (CausalLM(), GPT2Config()),
        (SpanCorruption(), T5Config()),
    ],
)
def test_objectives_fit_the_models_they_are_for(objective, config):
    check_fits(objective, build_model(config, ComputeConfig()))


def save(folder, model):
    """Writes a model with drawn parameters; what a reader finds comes back."""
    ft.save_pretrained(folder, model, drawn_parameters(model, parameter_shapes(model)))
    return ft.load_pretrained(folder)[1]


@pytest.mark.slow
def test_a_run_starts_from_the_weights_it_is_given_and_draws_the_heads_they_lack(tmp_path):
    model = build_model(tiny_bert(), ComputeConfig())
    given = save(tmp_path / "bert", model)
    write_corpus(tmp_path / "text.txt", documents=20)
    config = tiny_config(
        tmp_path / "text.txt",
        tmp_path / "store",
        steps=1,
        model=tiny_bert(architecture=PRETRAINING, dropout=0.0),
        optimizer=AdamW(learning_rate=1e-30),
        init_from=str(tmp_path / "bert"),
    )
    prepared = prepare(config.data)

    def initial(mesh):
        return initial_parameters(config.init_from, config.model, mesh, config.seed)

    train_prepared(config, prepared, tmp_path / "run", initial=initial)
    trained = restore_params(find_checkpoint(tmp_path / "run"))
    fresh = {name: trained.pop(name) for name in ("pooler", "next_sentence_head")}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-20), trained, given)
    assert np.std(fresh["pooler"]["dense"]["kernel"]) > 0.01


@pytest.mark.slow
def test_weights_of_another_model_are_refused_by_field(tmp_path):
    save(tmp_path / "bert", build_model(tiny_bert(), ComputeConfig()))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match="num_layers is 2, but model.num_layers is 3"):
        initial_parameters(tmp_path / "bert", tiny_bert(num_layers=3), mesh, seed=0)
