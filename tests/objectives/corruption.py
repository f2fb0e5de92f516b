"""What the tests of encoder-decoder objectives share: a vocabulary, and the source put together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.testing import GivenLogits

SENTINELS = tuple(range(32099, 31999, -1))
VOCAB = Vocabulary(
    size=32100,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    special_ids=(0, 1, 2, *SENTINELS),
    sentinel_ids=SENTINELS,
)
# Bytes as ids: the sentinels are ids of bytes, of which 248 to 258 are in no UTF-8 text.
BYTES = Vocabulary(
    size=262,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    special_ids=(0, 1, 2, 259, 260, 261),
    sentinel_ids=tuple(range(258, 158, -1)),
)
TEXT_BYTES = np.setdiff1d(np.arange(3, 248), [3 + 0xC0, 3 + 0xC1])


def example(tokens, document_ends=(), sentence_ends=()):
    return {
        "tokens": np.array(tokens, np.int32),
        "document_ends": np.array(document_ends, np.int32),
        "sentence_ends": np.array(sentence_ends, np.int32),
    }


def used(row, name):
    """The ids of a row's side, without padding."""
    return row[name][row[name.replace("input_ids", "attention_mask")] == 1].tolist()


def labels_of(row):
    return row["labels"][row["weights"] == 1].tolist()


def rebuilt(inputs, targets, sentinels, end):
    """The source, from nothing but what encoder and decoder are given: the slow way."""
    assert inputs[-1] == end and targets[-1] == end
    inputs, targets = inputs[:-1], targets[:-1]
    source = []
    for number, sentinel in enumerate(sentinels):
        if sentinel not in targets:
            assert sentinel not in inputs
            break
        before = inputs.index(sentinel)
        source += inputs[:before]
        inputs = inputs[before + 1 :]
        assert targets[0] == sentinel
        following = sentinels[number + 1]
        after = targets.index(following) if following in targets else len(targets)
        source += targets[1:after]
        targets = targets[after:]
    assert not targets
    return source + inputs


def assert_shifted(row, first_id):
    """The decoder reads what it had to say one place before."""
    labels = labels_of(row)
    assert used(row, "decoder_input_ids") == [first_id, *labels[:-1]]


def terms_of(objective, batch, vocabulary=12):
    """Losses and metrics of a model whose logits are 4 at the id that the decoder reads, else 0."""

    def hidden_states(params, batch, rngs):
        return HiddenStates(batch["decoder_input_ids"][..., None].astype(jnp.float32))

    def unembedding(params, hidden):
        ids = jnp.arange(vocabulary, dtype=jnp.float32)
        return GivenLogits(4.0 * (hidden == ids[None, None, :]))

    functions = ModelFunctions(hidden_states, unembedding, head=None)

    def terms(batch):
        found = objective.terms(functions, {}, batch, {})
        return found.losses, found.metrics

    return jax.device_get(jax.jit(terms)(batch))


def without(vocab, *names):
    return dataclasses.replace(vocab, **dict.fromkeys(names))
