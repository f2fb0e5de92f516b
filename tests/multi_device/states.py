"""States of training on a mesh, for which no program is compiled that draws them."""

from __future__ import annotations

import jax
import numpy as np


def placed_state(abstract, variables):
    """A state before the first step, with these ``variables`` of the model, placed as ``abstract``.

    The optimizer's state is zeros, as that of AdamW and of SGD is.
    """
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    # From the host, for a step donates its state, and these variables start on every mesh.
    state = zeros.with_variables(jax.device_get(variables))
    state = state.replace(rng=np.array([0, 1], np.uint32))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
