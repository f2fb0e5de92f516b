"""Low-rank adapters of linear layers (LoRA, arXiv:2106.09685).

An adapted kernel ``W`` [in, out] stays as it is, and the model computes with ``W + scale * A @ B``,
where ``A`` [in, rank] and ``B`` [rank, out] are trained. They lie beside the kernel in the tree of
parameters, as ``kernel_lora_a`` and ``kernel_lora_b``, with its leading axes of layers and experts
and with its logical axes. The sum is formed in float32 outside the model, whose modules, gradient
checkpoints and kernels know nothing of it.
"""

from __future__ import annotations

import glob
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.optim.selection import (
    Axes,
    Name,
    kind_of,
    logical_axes,
    matches,
    matrix_axes,
)

A, B = "_lora_a", "_lora_b"
"""Ends of the names of adapters, after the name of their kernel."""

_GROUPS = {"attention": ("attention", "cross_attention"), "feed-forward": ("mlp",)}
_ALL = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685); off by default.

    With a ``rank``, only adapters and ``fully_trained`` parameters are trained.
    """

    rank: int | None = None
    """Rank of the adapters, such as 8; None: no adapters, all parameters are trained."""
    alpha: float = 16.0
    """The product of an adapter's matrices is multiplied by ``alpha / rank``."""
    rslora: bool = False
    """Divide by the root of the rank instead (arXiv:2312.03732)."""
    targets: tuple[str, ...] = ("query", "value")
    """The layers that are adapted: names ("query", "key", "value", "output", "up", "down"), groups
    ("attention", "feed-forward", and "all-linear" for both), or patterns ("*/cross_attention")."""
    fully_trained: tuple[str, ...] | None = None
    """Patterns of parameters that are trained as they are. None: the heads of a model that predicts
    labels or values, but no head that predicts tokens."""

    RANGES: ClassVar[ranges.Ranges] = {
        "rank": ranges.integers(1, 2**14),
        "alpha": ranges.numbers(0, 1e6, above=True),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "lora")

    @property
    def is_on(self) -> bool:
        return self.rank is not None

    @property
    def scale(self) -> float:
        """The factor of the products of adapters."""
        rank = self.rank or 1
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model."""

    config: LoraConfig
    kernels: tuple[Name, ...]
    """Names of the adapted kernels."""
    fully_trained: tuple[Name, ...]
    frozen: tuple[str, ...]
    """Patterns of the parameters that are not trained."""

    def added(self, boxed: Any, key: jax.Array) -> Any:
        """``boxed`` parameters (with their logical axes) with fresh adapters beside them.

        ``A`` is uniform within ``1 / sqrt(inputs)``, as in PEFT (Kaiming's with a slope of the root
        of 5), ``B`` zero. Each is drawn by ``key`` and the name of its kernel.
        """
        leaves, axes = flatten_dict(boxed), logical_axes(boxed)
        for name in self.kernels:
            own = jax.random.fold_in(key, zlib.crc32("/".join(name).encode()))
            a, b = _fresh(leaves[name], name, axes, self.config.rank or 1, own)
            leaves[(*name[:-1], name[-1] + A)], leaves[(*name[:-1], name[-1] + B)] = a, b
        return unflatten_dict(leaves)


def find_adapters(config: LoraConfig, boxed: Any, body: Collection[str]) -> Adapters:
    """The adapters of a model with ``boxed`` parameters, or their shapes.

    ``body``: top-level names of the parameters that belong to no head. Raises UserError for a
    target or a pattern that matches nothing.
    """
    axes, names = logical_axes(boxed), sorted(flatten_dict(nn.meta.unbox(boxed)))
    trained = set(_fully_trained(config, names, axes, body))
    linear = [name for name in names if kind_of(name, axes) == "kernel" and name not in trained]
    if not linear:
        raise UserError("lora.fully_trained has every linear layer; leave some of them to adapt")
    kernels: set[Name] = set()
    for target in config.targets:
        found = {name for name in linear if _is_meant(target, name, axes)}
        if not found:
            known = ", ".join(sorted({name[-2] for name in linear if _is_layer(name, axes)}))
            raise UserError(
                f"lora.targets: {target!r} matches no linear layer that is not fully trained; "
                f"there are {known}, the groups {', '.join(_GROUPS)} and {_ALL}, and patterns such "
                f"as {'/'.join(linear[0][:-1])!r}"
            )
        kernels |= found
    if not kernels:
        raise UserError(f"lora.targets is empty; name the layers to adapt, such as {_ALL}")
    frozen = tuple(glob.escape("/".join(name)) for name in names if name not in trained)
    return Adapters(config, tuple(sorted(kernels)), tuple(sorted(trained)), frozen)


def _fully_trained(
    config: LoraConfig, names: Collection[Name], axes: Axes, body: Collection[str]
) -> list[Name]:
    if config.fully_trained is None:
        untrained = {*body, *(name[0] for name in names if "vocab" in axes.get(name, ()))}
        heads = [name for name in names if name[0] not in untrained]
        return heads if any("labels" in axes.get(name, ()) for name in heads) else []
    for pattern in config.fully_trained:
        if not any(matches(name, pattern) for name in names):
            known = ", ".join(sorted({name[0] for name in names}))
            raise UserError(
                f"lora.fully_trained: {pattern!r} matches no parameter; there are {known}, and "
                "what is in them"
            )
    return [name for name in names if any(matches(name, p) for p in config.fully_trained)]


def _is_meant(target: str, name: Name, axes: Axes) -> bool:
    """Whether a target of the config means the kernel ``name``."""
    if target == _ALL:
        return _is_layer(name, axes)
    if target in _GROUPS:
        return _is_layer(name, axes) and not set(_GROUPS[target]).isdisjoint(name)
    return target in name[:-1] or matches(name, target)


def _is_layer(name: Name, axes: Axes) -> bool:
    """Whether a kernel is a linear layer of a stack; routers of experts are none."""
    named = axes.get(name, ())
    return "layers" in named and "router" not in named


def _fresh(
    boxed: Any, name: Name, axes: Axes, rank: int, key: jax.Array
) -> tuple[jax.Array | Any, jax.Array | Any]:
    """The two adapters of a kernel, boxed as it is."""
    shape = nn.meta.unbox(boxed).shape
    of = matrix_axes(name, len(shape), axes)

    def pick(sizes: Any, where: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(sizes[axis] for axis in where)

    inputs = pick(shape, of.rows)
    bound = 1 / math.sqrt(math.prod(inputs))
    batch, outputs = pick(shape, of.batch), pick(shape, of.columns)
    a = jax.random.uniform(key, (*batch, *inputs, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*batch, rank, *outputs), jnp.float32)
    if not isinstance(boxed, nn.Partitioned):
        return a, b
    batch, inputs, outputs = (pick(boxed.names, part) for part in (of.batch, of.rows, of.columns))
    return (
        boxed.replace(value=a, names=(*batch, *inputs, "rank")),
        boxed.replace(value=b, names=(*batch, "rank", *outputs)),
    )


def is_adapter(name: Name) -> bool:
    """Whether a parameter is one of the two of an adapter."""
    return name[-1].endswith((A, B))


def base_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, or anything in a tree like them, without adapters."""
    leaves = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict({name: leaf for name, leaf in leaves.items() if not is_adapter(name)})


def adapters_of(params: Mapping[str, Any]) -> Iterator[tuple[Name, Any, Any]]:
    """The name of each adapted kernel, and its two matrices."""
    leaves = flatten_dict(params)
    for name, a in leaves.items():
        if name[-1].endswith(A):
            kernel = name[-1].removesuffix(A)
            yield (*name[:-1], kernel), a, leaves[(*name[:-1], kernel + B)]


def merged(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The parameters of the model, with its own names and shapes: adapters are added to their
    kernels, ``W + scale * A @ B``."""
    leaves = flatten_dict(base_of(params), keep_empty_nodes=True)
    for name, a, b in adapters_of(params):
        leaves[name] = leaves[name] + scale * product(a, b, leaves[name].ndim)
    return unflatten_dict(leaves)


def product(a: Any, b: Any, rank_of_kernel: int) -> jax.Array:
    """``A @ B`` [..., in, out] for ``A`` [..., in, rank] and ``B`` [..., rank, out], where inputs
    and outputs of the kernel may have several axes; in full float32 on every platform."""
    batch = a.ndim + b.ndim - 2 - rank_of_kernel
    letters = "abcdefghijklmnopqrstuvw"
    shared, own = letters[:batch], letters[batch:rank_of_kernel]
    ins, outs = own[: a.ndim - batch - 1], own[a.ndim - batch - 1 :]
    return jnp.einsum(
        f"{shared}{ins}z,{shared}z{outs}->{shared}{ins}{outs}", a, b, precision="highest"
    )
