"""Apply experts to tokens, on one device or over a mesh.

Nothing is dropped, however full an expert is (MegaBlocks, arXiv:2211.15841): rows are sorted by
expert, and one product over groups of rows takes each group through its own kernel.

Under a mesh every device has its own tokens. If the experts are divided too, tokens rotate in a
ring: at each of X steps a device holds the tokens of one of its X peers, adds the outputs of its
own experts to sums that rotate along, and passes both on (a collective-permute), until the sums are
back at the device of the tokens. An all-to-all would move less, ``2 C (X - 1) / X`` times the
tokens against ``2 (X - 1)``, but with fixed shapes it needs buffers for X times a device's rows, in
case all go to one peer, or drops some. Here no buffer is larger than a device's own tokens, no
collective depends on the data, and each overlaps with the matrix products of a step: with Mixtral's
sizes and 8 peers, these are 6,000 operations for each byte moved, and a TPU v5e computes 4,400 (197
TFLOP/s) in the time one of its links sends a byte (45 GB/s). The backward pass rotates once more
and recomputes inner activations, so that those of X steps are never in memory together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from flax_transformers.parallel.matmul import PROJECTION
from flax_transformers.parallel.partitioning import mesh_axes_of, parts

AXES = {
    "up": ("expert", "embed", "mlp"),
    "gate": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}
"""The logical axes of the kernels."""

SLACK = 1.25
"""Rows processed at once, relative to the average number for a device's experts."""

Activation = Callable[[jax.Array], jax.Array]
Kernels = dict[str, jax.Array]
"""``up`` and ``gate`` [E, D, F], ``down`` [E, F, D], in the dtype of gradient reductions."""


class RoutedTokens(NamedTuple):
    """Vectors [M, D], the experts each of them chose int32 [M, C], and their weights float32."""

    x_MD: jax.Array
    experts_MC: jax.Array
    weights_MC: jax.Array


def mix_experts(
    x_BTD: jax.Array,
    probabilities_BTE: jax.Array,
    kernels: Kernels,
    choices: int,
    activation: Activation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted outputs of the most probable experts: [B, T, D] as ``x_BTD``.

    Also returns the ``choices`` experts, int32 [B, T, C], the best first, and their weights float32
    [B, T, C], which are their ``probabilities_BTE`` scaled to sum to one.

    Divided as the logical axis rules in force say for "batch", "length", "expert", "embed" and
    "mlp" over the mesh in force. Without one, or where a size does not divide (a batch of one in
    decoding), the partitioner decides.
    """
    layout = _layout(x_BTD.shape, kernels["up"].shape)
    if layout is None:
        return _mix(x_BTD, probabilities_BTE, kernels, choices, activation, None)
    local: Callable[..., Any] = partial(_mix, choices=choices, activation=activation, layout=layout)
    if layout.embed:
        local = jax.checkpoint(local, policy=_kept)
    return jax.shard_map(
        local,
        in_specs=(layout.tokens, layout.tokens, layout.kernels),
        out_specs=(layout.tokens, layout.tokens, layout.tokens),
    )(x_BTD, probabilities_BTE, kernels)


def _kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """All but whole kernels, for those of all layers are many: the backward pass gathers again."""
    return primitive is not jax.lax.all_gather_p


class _Layout(NamedTuple):
    """Mesh axes of tokens [B, T, features] and kernels; and those that divide one logical axis."""

    tokens: PartitionSpec
    kernels: dict[str, PartitionSpec]
    expert: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]
    peers: int
    """Over how many devices the experts are divided."""
    all: tuple[str, ...]
    """All mesh axes in use."""
    common_to_tokens: tuple[str, ...]
    """Those along which devices have the same tokens."""
    common_to_kernels: tuple[str, ...]
    """Those along which they have the same kernels."""


def _layout(tokens: tuple[int, ...], kernel: tuple[int, ...]) -> _Layout | None:
    """None where there is no mesh to divide over, or a size does not divide over it."""
    names = ("batch", "length", "expert", "embed", "mlp")
    divided = {name: mesh_axes_of(name) for name in names}
    every = tuple(dict.fromkeys(axis for axes in divided.values() for axis in axes))
    sizes = zip(names, (*tokens[:2], *kernel), strict=True)
    if not every or any(size % parts(name) for name, size in sizes):
        return None
    # Devices with different experts must have different tokens: these rotate.
    if not set(divided["expert"]) <= set(divided["batch"] + divided["length"]):
        return None
    return _Layout(
        tokens=PartitionSpec(divided["batch"], divided["length"], None),
        kernels={key: PartitionSpec(*(divided[name] for name in AXES[key])) for key in AXES},
        expert=divided["expert"],
        embed=divided["embed"],
        mlp=divided["mlp"],
        peers=parts("expert"),
        all=every,
        common_to_tokens=tuple(
            axis for axis in every if axis not in divided["batch"] + divided["length"]
        ),
        common_to_kernels=tuple(
            axis
            for axis in every
            if axis not in divided["expert"] + divided["embed"] + divided["mlp"]
        ),
    )


def _mix(
    x_BTD: jax.Array,
    probabilities_BTE: jax.Array,
    kernels: Kernels,
    choices: int,
    activation: Activation,
    layout: _Layout | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``mix_experts`` on one device, of its shares of tokens and kernels."""
    best_BTC, experts_BTC = jax.lax.top_k(probabilities_BTE, choices)
    weights_BTC = best_BTC / jnp.sum(best_BTC, axis=-1, keepdims=True)
    arrays = (x_BTD, experts_BTC, weights_BTC)
    tokens = RoutedTokens(*(array.reshape(-1, array.shape[-1]) for array in arrays))
    if layout is None:
        y_MD = _own_experts(tokens, kernels, activation)
        return y_MD.reshape(x_BTD.shape), experts_BTC, weights_BTC
    # Values that devices share get a gradient from each of them. Marking them as varying here sums
    # these gradients; those of kernels after each device has reduced to its share of the width.
    tokens = _varying(tokens, layout.common_to_tokens)
    kernels = _varying(kernels, layout.common_to_kernels)
    for name, kernel in kernels.items() if layout.embed else ():
        embed = AXES[name].index("embed")
        kernels[name] = jax.lax.all_gather(kernel, layout.embed, axis=embed, tiled=True)
    if layout.peers == 1:
        y_MD = _own_experts(tokens, kernels, activation)
    else:
        ring = _Ring(activation, layout.expert, layout.all, layout.peers)
        y_MD = _rotating_experts(ring)(*tokens, kernels)
    y_MD = jax.lax.psum(y_MD, layout.mlp)
    return y_MD.reshape(x_BTD.shape), experts_BTC, weights_BTC


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark ``tree`` as varying along mesh ``axes``."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), tree)


def _own_experts(tokens: RoutedTokens, kernels: Kernels, activation: Activation) -> jax.Array:
    """All experts at once: [M, D]."""
    x_MD, experts_MC, weights_MC = tokens
    count, choices = kernels["up"].shape[0], experts_MC.shape[1]
    # Rows: each token once per choice, those of expert 0 first.
    expert_R = experts_MC.reshape(-1)
    order_R = jnp.argsort(expert_R)
    sizes_E = jnp.bincount(expert_R, length=count).astype(jnp.int32)
    x_RD = x_MD[order_R // choices]
    up_RF = _named(grouped_product(x_RD, kernels["up"], sizes_E))
    gate_RF = _named(grouped_product(x_RD, kernels["gate"], sizes_E))
    inner_RF = activation(gate_RF) * up_RF
    y_RD = _named(grouped_product(inner_RF, kernels["down"], sizes_E))
    y_RD = y_RD[jnp.argsort(order_R)]  # back to the order of tokens
    y_MCD = y_RD.reshape(-1, choices, y_RD.shape[-1]).astype(jnp.float32)
    return jnp.sum(y_MCD * weights_MC[..., None], axis=1).astype(x_MD.dtype)


def _named(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, PROJECTION)


class _Ring(NamedTuple):
    """A rotation of tokens over the mesh axes ``expert``, through ``peers`` devices."""

    activation: Activation
    expert: tuple[str, ...]
    axes: tuple[str, ...]
    """All mesh axes in use."""
    peers: int

    def zeros(self, like: Any, dtype: Any = None) -> Any:
        """Initial sums, varying over devices."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), like)
        return _varying(zeros, self.axes)

    def send(self, tree: Any) -> Any:
        """Send a tree to the next device."""
        pairs = [(peer, (peer + 1) % self.peers) for peer in range(self.peers)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.expert, pairs), tree)

    def rotate(
        self, visit: Callable[[Any, Any, Any], Any], tokens: Any, sums: Any, own: Any
    ) -> tuple[Any, Any]:
        """Rotate ``tokens`` through all devices. ``visit`` updates ``sums``, which rotate along and
        end at the device of their tokens, and ``own``, which stay. The next tokens are sent while a
        step computes, but never more than one step ahead."""
        for step in range(self.peers):
            tokens, sums = jax.lax.optimization_barrier((tokens, sums))
            ahead = self.send(tokens) if step < self.peers - 1 else None
            sums, own = visit(tokens, self.send(sums) if step else sums, own)
            tokens = ahead
        return self.send(sums), own


def _rotating_experts(ring: _Ring) -> Callable[..., jax.Array]:
    """``_own_experts`` for devices that each have some of the experts."""

    @jax.custom_vjp
    def mixed(
        x_MD: jax.Array, experts_MC: jax.Array, weights_MC: jax.Array, kernels: Kernels
    ) -> jax.Array:
        def visit(visiting: RoutedTokens, y_MD: jax.Array, own: None) -> tuple[jax.Array, None]:
            return y_MD + _visit(ring, visiting, kernels).astype(y_MD.dtype), own

        tokens = RoutedTokens(x_MD, experts_MC, weights_MC)
        return ring.rotate(visit, tokens, ring.zeros(x_MD), None)[0]

    def forward(*operands: Any) -> tuple[jax.Array, Any]:
        return mixed(*operands), operands

    def backward(operands: Any, dy_MD: jax.Array) -> Any:
        *arrays, kernels = operands
        tokens = RoutedTokens(*arrays)

        def visit(
            visiting: tuple[RoutedTokens, jax.Array], sums: Any, own: Kernels
        ) -> tuple[Any, Kernels]:
            found, own = _visit_backward(ring, *visiting, kernels, own)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, found), own

        sums, own = ring.zeros((tokens.x_MD, tokens.weights_MC)), ring.zeros(kernels, jnp.float32)
        (dx_MD, dweights_MC), own = ring.rotate(visit, (tokens, dy_MD), sums, own)
        dkernels = jax.tree.map(lambda total, kernel: total.astype(kernel.dtype), own, kernels)
        return dx_MD, None, dweights_MC, dkernels

    mixed.defvjp(forward, backward)
    return mixed


class _Part(NamedTuple):
    """Some of the rows for a device's experts: S of the M x C choices of tokens, sorted by expert;
    the number of each expert's rows; and whether each is a row or padding."""

    choice_S: jax.Array
    token_S: jax.Array
    sizes_E: jax.Array
    real_S: jax.Array


def _parts(
    ring: _Ring, tokens: RoutedTokens, count: int
) -> tuple[jax.Array, Callable[[jax.Array], _Part]]:
    """Number of parts of the rows for a device's ``count`` experts, and each part by its index.

    A part has a fixed size, slightly more than the average number of rows. So there is usually one
    part, and the time taken depends on the actual number of rows.
    """
    chosen, choices = tokens.experts_MC.size, tokens.experts_MC.shape[1]
    size = min(chosen, -(-int(SLACK * chosen) // (8 * ring.peers)) * 8)
    local_R = tokens.experts_MC.reshape(-1) - count * jax.lax.axis_index(ring.expert)
    local_R = jnp.where((local_R >= 0) & (local_R < count), local_R, count)  # others last
    order_R = jnp.argsort(local_R)
    ends_E = jnp.sum(local_R[:, None] <= jnp.arange(count)[None, :], axis=0, dtype=jnp.int32)
    bounds_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E])
    rows = ends_E[-1]

    def part(index: jax.Array) -> _Part:
        first = index * size
        place_S = first + jnp.arange(size, dtype=jnp.int32)
        choice_S = jnp.take(order_R, place_S, mode="clip")
        sizes_E = jnp.diff(jnp.clip(bounds_E, first, first + size))
        return _Part(choice_S, choice_S // choices, sizes_E, (place_S < rows)[:, None])

    return -(-rows // size), part


def _feed_forward(
    x_SD: jax.Array,
    weights_S1: jax.Array,
    kernels: Kernels,
    sizes_E: jax.Array,
    activation: Activation,
) -> jax.Array:
    """Rows through their experts, times their weights: [S, D].

    The weight is applied inside, where its gradient needs no further matrix product.
    """
    up_SF = grouped_product(x_SD, kernels["up"], sizes_E)
    gate_SF = grouped_product(x_SD, kernels["gate"], sizes_E)
    inner_SF = activation(gate_SF) * up_SF
    weighted_SF = (inner_SF.astype(jnp.float32) * weights_S1).astype(x_SD.dtype)
    return grouped_product(weighted_SF, kernels["down"], sizes_E)


def _visit(ring: _Ring, tokens: RoutedTokens, kernels: Kernels) -> jax.Array:
    """The outputs of a device's experts for visiting tokens, float32 [M, D]."""
    count, part = _parts(ring, tokens, kernels["up"].shape[0])
    weights_R1 = tokens.weights_MC.reshape(-1, 1)

    def add(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        choice_S, token_S, sizes_E, real_S1 = part(index)
        y_SD = _feed_forward(
            tokens.x_MD[token_S], weights_R1[choice_S], kernels, sizes_E, ring.activation
        )
        return y_MD.at[token_S].add(jnp.where(real_S1, y_SD, 0).astype(jnp.float32))

    return jax.lax.fori_loop(0, count, add, ring.zeros(tokens.x_MD, jnp.float32))


def _visit_backward(
    ring: _Ring, tokens: RoutedTokens, dy_MD: jax.Array, kernels: Kernels, own: Kernels
) -> tuple[tuple[jax.Array, jax.Array], Kernels]:
    """Derivatives by visiting tokens, float32 [M, D], and weights [M, C]; ``own``, the float32 sums
    of those by the kernels, with more added."""
    count, part = _parts(ring, tokens, kernels["up"].shape[0])
    weights_R1 = tokens.weights_MC.reshape(-1, 1)

    def add(index: jax.Array, sums: Any) -> Any:
        dx_MD, dweights_R1, own = sums
        choice_S, token_S, sizes_E, real_S1 = part(index)
        _, derivatives = jax.vjp(
            lambda x, weights, kernels: _feed_forward(
                x, weights, kernels, sizes_E, ring.activation
            ),
            tokens.x_MD[token_S],
            weights_R1[choice_S],
            kernels,
        )
        dx_SD, dweights_S1, dkernels = derivatives(jnp.where(real_S1, dy_MD[token_S], 0))
        dx_SD = jnp.where(real_S1, dx_SD, 0).astype(jnp.float32)
        return (
            dx_MD.at[token_S].add(dx_SD),
            dweights_R1.at[choice_S].add(jnp.where(real_S1, dweights_S1, 0)),
            jax.tree.map(lambda total, more: total + more.astype(jnp.float32), own, dkernels),
        )

    sums = (*ring.zeros((tokens.x_MD, weights_R1), jnp.float32), own)
    dx_MD, dweights_R1, own = jax.lax.fori_loop(0, count, add, sums)
    return (dx_MD, dweights_R1.reshape(tokens.weights_MC.shape)), own


@jax.custom_vjp
def grouped_product(x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The first ``sizes_E[0]`` rows of x times the first kernel, the next times the second ...

    [R, F] in the dtype of ``x_RD``, to which kernels are rounded; sums run in float32, in the
    backward pass too, where the cotangent is first cast to that dtype (as in ``linear.einsum``) and
    the derivative by the kernels has theirs. Rows of no group have undefined
    results; on TPUs they cost nothing, except with a single kernel: that product is a plain one,
    because libtpu 0.0.42 fails on some products of one group.
    """
    kernel_EDF = kernel_EDF.astype(x_RD.dtype)
    if len(kernel_EDF) == 1:
        product = jnp.dot(x_RD, kernel_EDF[0], preferred_element_type=jnp.float32)
    else:
        product = jax.lax.ragged_dot(x_RD, kernel_EDF, sizes_E, preferred_element_type=jnp.float32)
    return product.astype(x_RD.dtype)


def _grouped_product_forward(
    x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return grouped_product(x_RD, kernel_EDF, sizes_E), (x_RD, kernel_EDF, sizes_E)


_KERNEL_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""Rows are summed over, group by group: [R, D] and [R, F] give [E, D, F]."""


def _grouped_product_backward(
    operands: tuple[jax.Array, jax.Array, jax.Array], cotangent_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, kernel_EDF, sizes_E = operands
    x_gradient = grouped_product(cotangent_RF, kernel_EDF.swapaxes(1, 2), sizes_E)
    if len(kernel_EDF) == 1:
        grouped_R1 = (jnp.arange(len(x_RD)) < sizes_E[0])[:, None]
        kernel_gradient = jnp.einsum(
            "RD,RF->DF",
            jnp.where(grouped_R1, x_RD, 0),
            cotangent_RF,
            preferred_element_type=jnp.float32,
        )[None]
    else:
        kernel_gradient = jax.lax.ragged_dot_general(
            x_RD, cotangent_RF, sizes_E, _KERNEL_GRADIENT, preferred_element_type=jnp.float32
        )
    return x_gradient, kernel_gradient.astype(kernel_EDF.dtype), None


grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)
