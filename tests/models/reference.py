"""The leaves of a transformer in plain numpy and float64, and a look inside traced functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

erf = np.vectorize(math.erf)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def layer_norm(x, scale, bias, eps):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * scale + bias


def rms_norm(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * scale


def attention(params, x, mask):
    """Self-attention of [B, T, D] with kernels [D, N, H] and [N, H, D]; ``mask`` bool [B, T, S]."""
    p = float64(params)
    q, k, v = (
        np.einsum("BTD,DNH->BTNH", x, p[name]["kernel"]) + p[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
    probabilities = softmax(np.where(mask[:, None], scores, -np.inf))
    attended = np.einsum("BNTS,BSNH->BTNH", probabilities, v)
    return np.einsum("BTNH,NHD->BTD", attended, p["output"]["kernel"]) + p["output"]["bias"]


def feed_forward(params, x, activation):
    """Two linear layers, or three if there is a gate; biases where there are any."""
    p = float64(params)
    up = x @ p["up"]["kernel"] + p["up"].get("bias", 0)
    if "gate" in p:
        hidden = activation(x @ p["gate"]["kernel"] + p["gate"].get("bias", 0)) * up
    else:
        hidden = activation(up)
    return hidden @ p["down"]["kernel"] + p["down"].get("bias", 0)


def float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def randomize(params: Any, seed: int = 0, std: float = 0.3) -> Any:
    """As ``params`` (unboxed, or their shapes) with every number random, biases included."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (std * random.standard_normal(leaf.shape)).astype(leaf.dtype), params
    )


def equations(function: Callable[..., Any], *args: Any) -> Iterator[jax.extend.core.JaxprEqn]:
    """All primitive operations in a traced function, those of loops and calls included; of what
    differs by platform, those for the CPU."""
    pending = [jax.make_jaxpr(function)(*args).jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            yield equation
            params = dict(equation.params)
            for number, platforms in enumerate(params.get("branches_platforms") or ()):
                if platforms is None or "cpu" in platforms:
                    params = {"branch": params["branches"][number]}
                    break
            for value in jax.tree.leaves(
                list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    pending.append(inner)
