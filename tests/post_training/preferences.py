"""A small decoder, and rows of conversations and preferences, for tests of objectives."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax

import flax_transformers as ft
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.testing import tiny_model

LENGTH = 56
VOCAB = Vocabulary(size=96, pad_id=0, eos_id=1, special_ids=(0, 1))


def element(rng, completions):
    """The completions of one prompt: ids, and their number of tokens after the prompt."""
    prompt = rng.integers(2, 96, rng.integers(2, 5))
    answers = [rng.integers(2, 96, rng.integers(1, 5)) for _ in range(completions)]
    return [(np.append(prompt, answer).astype(np.int32), len(prompt)) for answer in answers]


def example(elements, reference=None, margins=None):
    """Elements in the form of `ConversationExamples.read`."""
    sequences = [one for completions in elements for one in completions]
    learned = [np.arange(len(ids)) >= start for ids, start in sequences]
    scores = [np.arange(len(one), 0, -1) for one in elements]
    found = {
        "tokens": np.concatenate([ids for ids, _ in sequences]),
        "ends": np.cumsum([len(ids) for ids, _ in sequences], dtype=np.int32),
        "learned": np.concatenate(learned),
        "elements": np.array([len(one) for one in elements], np.int32),
        "scores": np.concatenate(scores).astype(np.float32),
        "margins": np.zeros(len(elements), np.float32) if margins is None else margins,
    }
    return found if reference is None else found | {"reference": reference}


def batch_of(objective, examples):
    rng = np.random.default_rng(0)
    rows = [objective.prepare(one, rng, VOCAB, LENGTH) for one in examples]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def pad_to(batch, rows):
    """The batch with rows of zeros, as at the end of an evaluation."""
    return {
        name: np.pad(values, [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1))
        for name, values in batch.items()
    }


@functools.cache
def model(architecture="LlamaForCausalLM"):
    labels = {"num_labels": 1} if architecture.endswith("Classification") else {}
    return tiny_model(architecture, tie_embeddings=False, **labels)


@functools.cache
def trainer(objective, architecture="LlamaForCausalLM", mesh=None, **settings):
    mesh = mesh or ft.make_mesh(devices=jax.devices()[:1])
    return ft.Trainer(
        model=model(architecture)[0],
        objective=objective,
        optimizer=optax.sgd(0.1),
        mesh=mesh,
        **settings,
    )


def scores(objective, batch, architecture="LlamaForCausalLM", params=None, **settings):
    """The metrics of one step, and the parameters after it."""
    made = trainer(objective, architecture, **settings)
    start = model(architecture)[1] if params is None else params
    state, metrics = made.step(made.init(params=start), batch)
    return {name: float(value) for name, value in metrics.items()}, state.params
