"""Models as compiled programs: StableHLO for a batch of any size, which runs without the modules.

A folder of `export_program` has three files: ``program.bin``, serialised by ``jax.export`` (which
keeps such files readable for at least six months); ``parameters.safetensors``, by their paths; and
``signature.json`` with inputs, outputs and platforms.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from flax_transformers.errors import UserError
from flax_transformers.huggingface.tensor_files import read_json, require_file
from flax_transformers.huggingface.write import appearing
from flax_transformers.models.config import TextConfig
from flax_transformers.version import __version__

_PROGRAM, _PARAMETERS, _SIGNATURE = "program.bin", "parameters.safetensors", "signature.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_program(
    directory: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    sequence_length: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write the forward pass of ``model`` to a new directory, for batches of any size.

    Inputs are int32 ``input_ids`` and ``attention_mask`` [B, ``sequence_length``], with
    ``token_type_ids`` of that length for a model of several token types (BERT), and
    ``decoder_input_ids`` for an encoder-decoder, unless it labels its input, which its decoder then
    reads; or float32 ``pixel_values`` [B, C, H, W] of the model's size, with ``noise`` [B, patches]
    in MAE. ``platforms``: "cpu", "cuda", "rocm" and "tpu". For others than that of the default
    device, attention is the kernel "xla", which runs on all of them.

    Raises UserError for a length that the model does not take, a platform that JAX does not know,
    if flatbuffers is not installed, and if the directory holds files.
    """
    inputs = _inputs(model, sequence_length)
    if tuple(platforms) != (_platform(),):  # the kernel of this platform may run nowhere else
        compute: Any = model.compute
        model = model.clone(compute=replace(compute, attention="xla"))
    (batch,) = export.symbolic_shape("batch")
    abstract = {
        name: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)
        for name, array in inputs.items()
    }
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(params))

    def forward(params: Any, inputs: Any) -> dict[str, jax.Array]:
        return _outputs(model.apply({"params": params}, **inputs))

    try:
        exported = export.export(jax.jit(forward), platforms=tuple(platforms))(shapes, abstract)
        program = exported.serialize()
    except ImportError as error:
        raise UserError(f"{error}; pip install flatbuffers") from error
    except ValueError as error:
        raise UserError(
            f"the model cannot be exported for {', '.join(platforms)} ({error})"
        ) from error
    outputs = jax.eval_shape(forward, shapes, inputs)
    signature = {
        "flax_transformers": __version__,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "inputs": {name: _described(array) for name, array in inputs.items()},
        "outputs": {name: _described(array) for name, array in outputs.items()},
    }
    # safetensors writes the buffer of an array as it is, in whatever order.
    flat = {"/".join(p): np.asarray(x, order="C") for p, x in flatten_dict(dict(params)).items()}
    with appearing(Path(os.path.abspath(Path(directory).expanduser()))) as folder:
        (folder / _PROGRAM).write_bytes(program)
        safetensors.numpy.save_file(flat, folder / _PARAMETERS)
        (folder / _SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Program:
    """A program of `export_program`. Called with its inputs by name, it returns its outputs."""

    signature: Mapping[str, Any]
    """Platforms, and shapes and dtypes of inputs and outputs; B is the size of the batch."""
    exported: export.Exported
    params: Any

    def __call__(self, **inputs: Any) -> dict[str, jax.Array]:
        """Raises UserError for inputs of other names, shapes or dtypes."""
        expected = self.signature["inputs"]
        if inputs.keys() != expected.keys():
            raise UserError(
                f"the program takes {', '.join(sorted(expected))}, not "
                f"{', '.join(sorted(inputs)) or 'nothing'}"
            )
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        sizes = {array.shape[0] for array in arrays.values() if array.ndim}
        for name, array in arrays.items():
            given = {"shape": ["B", *array.shape[1:]], "dtype": str(array.dtype)}
            if array.ndim == 0 or given != expected[name] or len(sizes) != 1:
                raise UserError(
                    f"{name} is {array.dtype} {list(array.shape)}; the program takes "
                    f"{expected[name]['dtype']} {expected[name]['shape']} with one B for all inputs"
                )
        found: dict[str, jax.Array] = self.exported.call(self.params, arrays)
        return found


def load_program(directory: str | os.PathLike[str]) -> Program:
    """The program in a directory, with its parameters on the default device.

    Raises UserError for another directory, a damaged file, and a platform that the program was not
    exported for.
    """
    folder = Path(directory).expanduser()
    signature = read_json(folder / _SIGNATURE)
    for name in (_PROGRAM, _PARAMETERS):
        require_file(folder / name)
    platform = _platform()
    if platform not in signature.get("platforms", ()):
        raise UserError(
            f"{folder} was exported for {', '.join(signature.get('platforms', ())) or 'nothing'}, "
            f"and this is {platform}; export it for {platform} too"
        )
    try:
        exported = export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
        flat = safetensors.numpy.load_file(folder / _PARAMETERS)
    except Exception as error:  # of flatbuffers, MLIR or safetensors
        raise UserError(f"{folder} is damaged ({error!s:.200}); export the model again") from error
    params = unflatten_dict({tuple(name.split("/")): jnp.asarray(flat[name]) for name in flat})
    return Program(signature, exported, params)


def _platform() -> str:
    """The platform of the default device, as ``jax.export`` names it."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def _inputs(model: Any, sequence_length: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes for a batch of one, and dtypes."""
    inputs: dict[str, Any] = dict(model.example_inputs())
    if "input_ids" in inputs:
        limit = getattr(model.config, "length_limit", None)
        if sequence_length is None or not 1 <= sequence_length <= (limit or sequence_length):
            raise UserError(
                f"sequence_length is {sequence_length}; give the number of tokens of the rows"
                f"{f', at most {limit}' if limit else ''}"
            )
        tokens = jax.ShapeDtypeStruct((1, sequence_length), jnp.int32)
        names = ["input_ids", "attention_mask"]
        if "token_type_ids" in model.inputs and model.config.token_types > 1:
            names.append("token_type_ids")
        writes = hasattr(model, "unembedding") or model.config.architecture.endswith("Model")
        if "decoder_input_ids" in model.inputs and writes:
            names.append("decoder_input_ids")
        inputs |= dict.fromkeys(names, tokens)
    elif isinstance(model.config, TextConfig) or "signals" in inputs:
        raise UserError(f"{type(model).__name__} has no input_ids and cannot be exported")
    return {
        name: jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)
        for name, value in inputs.items()
    }


def _outputs(output: Any) -> dict[str, jax.Array]:
    """The arrays of a model's output by name."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    return {name: value for name, value in values.items() if isinstance(value, jax.Array)}


def _described(array: Any) -> dict[str, Any]:
    return {"shape": ["B", *array.shape[1:]], "dtype": str(array.dtype)}
