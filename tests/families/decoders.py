"""What the tests of several decoder families ask alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.testing import relative_difference
from tests.families.parity import TOLERANCE, load_case
from tests.golden.hub import read_golden
from tests.huggingface.tensors import export_weights


def assert_gradients(case, script: str, **compute) -> None:
    """The loss of the next token and its gradient by tensor are those of torch."""
    config, model, params, table = load_case(case, **compute)

    def loss(params):
        logits = model.apply({"params": params}, **case.inputs).logits[:, :-1]
        labels = jnp.asarray(case.labels[:, 1:])
        scores = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0.0)) / jnp.sum(labels >= 0)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected = read_golden(script, case)
    assert relative_difference(value, expected["loss"]) < TOLERANCE
    found = {
        f"gradients/{name}": gradient
        for name, gradient in export_weights(table, grads, config.vocab_size).items()
    }
    assert found.keys() == {name for name in expected if name.startswith("gradients/")}
    far = {name: relative_difference(found[name], expected[name]) for name in found}
    assert {name: value for name, value in far.items() if value >= TOLERANCE} == {}
