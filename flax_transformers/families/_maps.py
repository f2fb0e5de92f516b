"""Layers of models whose hidden states are maps of features, for families that have any.

Shape letters: B batch, H and W rows and columns of a map, D width, F expanded width. In attention:
T positions of a map of X rows and Y columns (or R and S, of the keys), row by row, N heads of width
H, C the three of queries, keys and values, A offsets in rows.

Running statistics of batch norms (arXiv:1502.03167) are variables with the logical axis "running",
which the training state keeps apart from the parameters (``TrainState.model_state``). A layer says
what they move by as their gradient, by ``with_movement``: so an objective stays a function from
variables to a loss, and a step adds up movements over micro-batches and devices as gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.models.config import (
    Activation,
    ComputeConfig,
    TransformerConfig,
)
from flax_transformers.models.kernels.dispatch import dot_product_attention, probabilities_of_keys
from flax_transformers.models.kernels.relative_position_bias import by_difference
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.models.layers.stack import REMAT_POLICIES, Block, Stack
from flax_transformers.parallel.partitioning import HEADS, constrain


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    """How batch norm (arXiv:1502.03167) is trained."""

    momentum: float = 0.1
    """Share of a step's statistics in the running ones, which evaluation uses."""
    rows: int = 32
    """Images that are normalised together in training; it must divide the images of a micro-batch.
    The number of all images of a batch normalises them by the statistics of the whole batch."""

    RANGES: ClassVar[ranges.Ranges] = {"momentum": ranges.SHARE, "rows": ranges.EXAMPLES}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model.batch_norm")


class BatchNorm(nn.Module):
    """Batch norm over all axes of [B, ..., D] but the last, in float32 throughout, rounded last.

    In training the images i, i + G, i + 2G, ... of the global batch are normalised together, as a
    "ghost batch" (arXiv:1705.08741); the number G of groups is B / ``config.rows``. A group lies on
    all devices of a mesh: its sums and counts are over all of them. Micro-batch k of K is made of
    the images k, k + K, ...: the groups of all micro-batches are those of the whole batch, and the
    result depends neither on the number of micro-batches nor on that of devices. Running statistics
    move towards the mean, over the groups, of the mean and the unbiased variance (algorithm 2 of
    arXiv:1502.03167). The movements of all applications in a loss add up: a layer that is applied n
    times needs 1/n of the momentum.

    Raises OutOfRange for a batch that does not divide into groups.
    """

    config: BatchNormConfig
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        def variable(name: str, start: nn.initializers.Initializer, axis: str) -> jax.Array:
            init = nn.with_logical_partitioning(start, (axis,))
            return self.param(name, init, x.shape[-1:], jnp.float32)

        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        scale_D, bias_D = variable("scale", ones, "norm"), variable("bias", zeros, "norm")
        running = variable("mean", zeros, "running"), variable("variance", ones, "running")
        if deterministic:
            mean_D, variance_D = (jax.lax.stop_gradient(one) for one in running)
            factor_D = jax.lax.rsqrt(variance_D + self.eps) * scale_D
            y = (x.astype(jnp.float32) - _along(mean_D, x)) * _along(factor_D, x)
            return (y + _along(bias_D, x)).astype(self.dtype)
        groups = self._groups(len(x))
        # Axes of the result: images of a group, groups, positions, features.
        y = x.astype(jnp.float32).reshape(-1, groups, *x.shape[1:])
        over = (0, *range(2, y.ndim - 1))
        count = y.size // (groups * y.shape[-1])
        mean = jnp.mean(y, axis=over, keepdims=True)
        y = y - mean
        variance = jnp.mean(jnp.square(y), axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.eps)
        y = (y.reshape(x.shape) * _along(scale_D, x) + _along(bias_D, x)).astype(self.dtype)
        unbiased = variance * (count / max(count - 1, 1))
        found = (jnp.mean(each, axis=range(each.ndim - 1)) for each in (mean, unbiased))
        movement = tuple(
            self.config.momentum * (new_D - old_D)
            for new_D, old_D in zip(found, running, strict=True)
        )
        return with_movement(y, running, jax.lax.stop_gradient(movement))

    def _groups(self, batch: int) -> int:
        rows = self.config.rows
        if batch % rows:
            raise ranges.OutOfRange(
                f"model.batch_norm.rows is {rows}, which does not divide the {batch} images that "
                "pass through the model together; set it to a divisor of the images of a "
                "micro-batch"
            )
        return batch // rows


def _along(vector_D: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector_D, tuple(range(x.ndim - 1)))


@jax.custom_vjp
def with_movement(y: jax.Array, running: Any, movement: Any) -> jax.Array:
    """``y``; the gradient of the ``running`` statistics is ``movement``, whatever that of ``y``."""
    del running, movement
    return y


def _forward(y: jax.Array, running: Any, movement: Any) -> tuple[jax.Array, Any]:
    del running
    return y, movement


def _backward(movement: Any, gradient: jax.Array) -> tuple[jax.Array, Any, Any]:
    return gradient, movement, jax.tree.map(jnp.zeros_like, movement)


with_movement.defvjp(_forward, _backward)


SIDE = 3  # rows and columns of the kernel of every convolution


def fan_out_std(fan_out: int) -> float:
    """Standard deviation that initialises a kernel, of He et al. (arXiv:1502.01852 §2.2) for the
    backward pass: ``fan_out`` is the number of outputs that an input of the kernel goes into.
    Linear layers cut at two of them (`truncated_normal`)."""
    return math.sqrt(2.0 / fan_out)


class Convolution(nn.Module):
    """A convolution of 3 x 3 positions, padded by one, without a bias.

    [B, H, W, C] to [B, H / stride, W / stride, D], rounded up.
    """

    ins: int
    outs: int
    stride: int
    dtype: jnp.dtype
    from_pixels: bool = False
    """Whether the input is an image."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        std = fan_out_std(SIDE * SIDE * self.outs)
        axes = ("channels" if self.from_pixels else "features", "patch_height", "patch_width")
        init = nn.with_logical_partitioning(nn.initializers.normal(std), (*axes, "embed"))
        shape = (self.ins, SIDE, SIDE, self.outs)
        kernel = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
        return jax.lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            constrain(kernel, (None,) * 4),  # gathered where a mesh divides it
            window_strides=(self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "IHWO", "NHWC"),
        )


class Depthwise(nn.Module):
    """A convolution of 3 x 3 positions of each feature by itself, padded by one, without a bias.

    It is nine element-wise products, which the compiler fuses, and sums in float32.
    """

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWF: jax.Array) -> jax.Array:
        axes, std = ("patch_height", "patch_width", "mlp"), fan_out_std(SIDE * SIDE)
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        kernel_PQF = self.param("kernel", init, (SIDE, SIDE, self.width), jnp.float32)
        _, height, width, _ = x_BHWF.shape
        x_BHWF = jnp.pad(x_BHWF, ((0, 0), (1, 1), (1, 1), (0, 0)))
        total = None
        for p in range(SIDE):
            for q in range(SIDE):
                part = x_BHWF[:, p : p + height : self.stride, q : q + width : self.stride]
                product = part.astype(jnp.float32) * kernel_PQF[p, q][None, None, None]
                total = product if total is None else total + product
        assert total is not None
        return total.astype(self.dtype)


def average_pool(x_BHWD: jax.Array, stride: int) -> jax.Array:
    """Means of blocks of ``stride`` x ``stride`` positions, which must divide the map."""
    if stride == 1:
        return x_BHWD
    batch, height, width, features = x_BHWD.shape
    blocks = x_BHWD.reshape(batch, height // stride, stride, width // stride, stride, features)
    return blocks.mean(axis=(2, 4), dtype=jnp.float32).astype(x_BHWD.dtype)


def in_line(x_BHWD: jax.Array) -> jax.Array:
    """A map as a sequence [B, T, D], row by row."""
    return x_BHWD.reshape(len(x_BHWD), -1, x_BHWD.shape[-1])


class Shortcut(nn.Module):
    """The input of a layer in the shape of its output: pooled, and mapped to another width."""

    width: int
    stride: int
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        x_BHWD = average_pool(x_BHWD, self.stride)
        if x_BHWD.shape[-1] == self.width:
            return x_BHWD
        return Linear(
            "BHWD,DE->BHWE",
            (x_BHWD.shape[-1], self.width),
            ("embed", "features"),
            dtype=self.dtype,
            use_bias=self.use_bias,
            init_std=fan_out_std(self.width),
            name="expand",
        )(x_BHWD)


class SqueezeExcite(nn.Module):
    """Gates features by a function of their means over the map (arXiv:1709.01507)."""

    inner: int
    activation: Activation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWF: jax.Array) -> jax.Array:
        width = x_BHWF.shape[-1]
        mean_BF = jnp.mean(x_BHWF, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)
        down = Linear(
            "BF,FS->BS", (width, self.inner), ("mlp", "features"), self.dtype,
            init_std=fan_out_std(self.inner), name="down",
        )  # fmt: skip
        up = Linear(
            "BS,SF->BF", (self.inner, width), ("features", "mlp"), self.dtype,
            init_std=fan_out_std(width), name="up",
        )  # fmt: skip
        gate_BF = up(ACTIVATIONS[self.activation](down(mean_BF)))
        return x_BHWF * jax.nn.sigmoid(gate_BF)[:, None, None]


class RelativeAttention(nn.Module):
    """Self-attention with a bias for each head and offset in rows and columns (equation 2 of
    arXiv:2106.04803, with one table instead of two)."""

    config: TransformerConfig
    compute: ComputeConfig
    grid: tuple[int, int]
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        heads, width = c.num_heads, c.head_width
        qkv_BTNCH = Linear(
            "BTD,DNCH->BTNCH",
            (x_BTD.shape[-1], heads, 3, width),
            ("embed", "heads", "features", "head_dim"),
            dtype=dtype,
            use_bias=c.qkv_bias,
            init_std=c.init_std,
            name="query_key_value",
        )(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (constrain(qkv_BTNCH[..., k, :], HEADS) for k in range(3))
        bias = self._bias(heads)
        if self.is_mutable_collection("intermediates"):
            probabilities_BNTS = probabilities_of_keys(q_BTNH, k_BTNH, bias=bias)
            self.sow("intermediates", "probabilities", probabilities_BNTS)
        dropping = c.attention_dropout > 0.0 and not self.deterministic
        attended_BTNH = dot_product_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            bias=bias,
            dropout_rate=c.attention_dropout if dropping else 0.0,
            dropout_key=self.make_rng("dropout") if dropping else None,
            dropout_generator=self.compute.dropout_generator,
            kernel="auto" if self.is_initializing() else self.compute.attention,
        )
        return Linear(
            "BTNH,NHD->BTD",
            (heads, width, c.hidden_size),
            ("heads", "head_dim", "embed"),
            dtype=dtype,
            use_bias=c.output_bias,
            init_std=c.initial_std("output"),
            name="output",
        )(constrain(attended_BTNH, HEADS))

    def _bias(self, heads: int) -> jax.Array:
        """The bias float32 [1, N, T, S] of every pair of positions.

        The table [(2 X - 1) * (2 Y - 1), N] has the offsets of the query from the key in rows and
        in columns, from the most negative on.
        """
        rows, columns = self.grid
        offsets = (2 * rows - 1, 2 * columns - 1)
        start = truncated_normal(self.config.init_std)
        init = nn.with_logical_partitioning(start, ("positions", "heads"))
        table = self.param("relative_bias", init, (math.prod(offsets), heads), jnp.float32)
        table = jnp.flip(table.T.reshape(heads, *offsets), axis=(1, 2))  # of the key from the query
        bias_NAYS = by_difference(table, columns)  # A: offsets in rows; S: columns of the key
        bias_NYSXR = by_difference(jnp.moveaxis(bias_NAYS, 1, -1), rows)
        bias_NXYRS = bias_NYSXR.transpose(0, 3, 1, 4, 2)
        return bias_NXYRS.reshape(1, heads, rows * columns, rows * columns)


class _Entry(nn.Module):
    """The first layer of a stage, whose output has another shape than its input."""

    block: Block
    deterministic: bool

    @nn.compact
    def __call__(self, _: None, x: jax.Array, broadcast: Any, per_layer: Any) -> tuple[None, Any]:
        layer = self.block(deterministic=self.deterministic, name="block_0")
        return None, layer(x, broadcast, per_layer)[0]


class StageStack(Stack):
    """One stage of a pyramid: ``first``, a layer whose output has another shape than its input, and
    the pattern after it. Its layers have no output."""

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        broadcast: Any = None,
        per_layer: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """``hidden`` [B, ...] in the shape that the first layer reads; see ``Stack``."""
        entry = (
            nn.remat(_Entry, policy=REMAT_POLICIES[self.remat]) if self.remat != "none" else _Entry
        )
        # A loop of one pass, for the leading axis of its parameters.
        entered = nn.scan(
            entry,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, 0),
            length=1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.first[0], deterministic, name="first")
        part = jax.tree.map(lambda leaf: leaf[:1], per_layer)
        _, hidden = entered(None, hidden[None], broadcast, part)
        hidden = hidden[0]
        if self.repeats:
            part = jax.tree.map(lambda leaf: leaf[1:, None], per_layer)
            layers = self._scanned(self.pattern, self.repeats, deterministic, "layers")
            hidden, _ = layers(hidden, broadcast, part)
        return hidden, None
