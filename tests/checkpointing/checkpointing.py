"""States and damage for the tests of checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    Checkpoints,
)

Tree = Any


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def abstract_state(mesh: Mesh, width: int = 16) -> Tree:
    def build() -> Tree:
        params = {
            "encoder": {"kernel": jnp.zeros((3, width, 32)), "bias": jnp.zeros((3, 32))},
            "head": {"scale": jnp.zeros((width,), jnp.bfloat16)},
        }
        return {
            "params": params,
            "opt_state": optax.adamw(1e-3).init(params),
            "step": jnp.zeros((), jnp.int32),
            "rng": jnp.zeros((2,), jnp.uint32),
        }

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(None, "fsdp", "tensor") if len(leaf.shape) == 3 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(build))


def make_state(abstract: Tree, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.asarray(rng.integers(0, 1000, leaf.shape)).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(draw, abstract)


def fingerprint(tree: Tree) -> str:
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        raw = np.asarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {raw.dtype} {raw.shape}".encode())
        whole.update(raw.tobytes())
    return whole.hexdigest()


def write_steps(directory: Path, *steps: int, **config: Any) -> dict[int, str]:
    """Saves a different state at each step; their fingerprints."""
    checkpoints = Checkpoints(directory, CheckpointConfig(**config))
    abstract = abstract_state(make_mesh(1, 1, 1))
    states = {step: make_state(abstract, step) for step in steps}
    for step, state in states.items():
        files = {"tokenizer/vocab.txt": b"[PAD]\nthe\n"}
        assert checkpoints.save(step, state, {"config": "tiny", "position": 8 * step}, files)
    checkpoints.close()
    return {step: fingerprint(state) for step, state in states.items()}


def restore_newest(directory: Path, **config: Any) -> Any:
    checkpoints = Checkpoints(directory, CheckpointConfig(**config))
    return checkpoints.restore_newest(abstract_state(make_mesh(1, 1, 1)))


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_bit(path: Path, bit: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    bit = 8 * len(raw) // 2 if bit is None else bit
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
