"""Which trees count as finite."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.optim.finite import is_finite

GOOD = {"a": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16), "scale": jnp.array(2.0)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", GOOD)
def test_one_value_of_any_array_or_dtype_is_enough(name, value):
    leaf = GOOD[name]
    bad = GOOD | {name: leaf.at[(-1,) * leaf.ndim].set(value)}
    assert is_finite(GOOD, GOOD, GOOD)
    assert not is_finite(bad, {})
    assert not is_finite({}, {}, bad)
    # A running minimum starts at infinity.
    assert bool(is_finite({}, bad)) == (name == "scale" and np.isinf(value))


def test_counts_and_keys_do_not_matter_and_the_largest_number_is_finite():
    state = optax.adam(1e-3).init({"w": jnp.full(2, jnp.finfo(jnp.float32).max)})
    assert is_finite({"w": jnp.full(2, 3.4e38)}, (state, jnp.zeros(2, jnp.uint32)))


def test_the_state_of_a_rate_that_waits_for_a_plateau_is_finite_at_its_start():
    state = optax.contrib.reduce_on_plateau().init({"w": jnp.ones(2)})
    assert any(np.isinf(leaf) for leaf in map(np.asarray, (state.best_value,)))
    assert is_finite({}, state)
