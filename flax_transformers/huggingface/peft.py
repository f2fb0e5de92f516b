"""Low-rank adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT keeps ``A`` as [rank, in] and ``B`` as [out, rank], for each module of the original. A folder
is read as the weights of its base with the adapters merged into them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers import ranges
from flax_transformers.adapters.lora import Adapters, LoraConfig, adapters_of, base_of
from flax_transformers.errors import UserError
from flax_transformers.huggingface import tensor_files
from flax_transformers.huggingface.family import family_of
from flax_transformers.huggingface.folder_kinds import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    holds_adapter,
)
from flax_transformers.huggingface.tensor_files import FileTensor, TensorInfo
from flax_transformers.huggingface.weights import (
    Slot,
    WeightTable,
    find_slots,
    names_in_table,
    parse_axes,
    part_shapes,
    read_out,
    some,
    to_theirs,
)
from flax_transformers.models.config import TransformerConfig, VisionConfig
from flax_transformers.optim.selection import Axes, logical_axes, matrix_axes
from flax_transformers.storage.hub import Repository

_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_LABEL_KERNEL = "classification_head/kernel"
_EMBEDDING = "words/embedding"
_ONLY_IN_PEFT = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of PEFT under which an adapter is more than a product of two matrices."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. Names are those of the original's modules, without PEFT's prefix."""

    folder: Path
    described: Mapping[str, Any]
    """Its adapter_config.json."""
    pairs: Mapping[str, tuple[FileTensor, FileTensor]]
    """``A`` and ``B`` by the name of the module."""
    saved: Mapping[str, FileTensor]
    """The tensors that were trained in full, by name."""

    @property
    def base(self) -> str:
        """The folder or the id of the model that it belongs to."""
        return str(self.described["base_model_name_or_path"])

    @property
    def dropout(self) -> float:
        """The dropout that it was trained with, which matters only in training."""
        return float(self.described.get("lora_dropout") or 0)

    def architecture(self, known: Collection[str]) -> str | None:
        """Which of the ``known`` architectures of its base's family it is for, if it says so."""
        named = (self.described.get("auto_mapping") or {}).get("base_model_class")
        ending = _TASKS.get(str(self.described.get("task_type")), "?")
        return named if named in known else next((n for n in known if n.endswith(ending)), None)

    def num_labels(self, table: WeightTable) -> int | None:
        """The number of classes of the head in the adapter, if it has one."""
        name = next((row.theirs for row in table.weights if row.ours == _LABEL_KERNEL), "")
        return self.saved[name].shape[0] if name in self.saved else None

    def vocab_size(self, table: WeightTable) -> int | None:
        """The number of tokens of the embedding in the adapter, if it has one: PEFT saves that of a
        base whose vocabulary was resized."""
        names = {row.theirs for row in table.weights if row.ours == _EMBEDDING}
        names |= {name.removeprefix(table.prefix) for name in names}
        found = (self.saved[name].shape for name in names if name in self.saved)
        return next((shape[0] for shape in found if len(shape) == 2), None)

    def scale(self, module: str) -> float:
        """The factor of the product of a module's matrices."""
        rank = self.pairs[module][0].shape[0]
        patterns = self.described.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
            self.described.get("lora_alpha", 8),
        )
        return alpha / (math.sqrt(rank) if self.described.get("use_rslora") else rank)


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The config of the adapter in a folder, which names its base; None if there is none, or one of
    a kind that only PEFT can merge."""
    if not holds_adapter(folder):
        return None
    described = tensor_files.read_json(folder / ADAPTER_CONFIG)
    _check_adapter_config(described, folder / ADAPTER_CONFIG)
    if (
        described.get("peft_type") != "LORA"
        or not described.get("base_model_name_or_path")
        or described.get("bias", "none") != "none"
        or described.get("init_lora_weights") not in _PLAIN_STARTS
        or any(described.get(name) for name in _ONLY_IN_PEFT)
    ):
        return None
    return described


def _check_adapter_config(described: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a field that cannot be what it says."""
    patterns = described.get("alpha_pattern") or {}
    mapping = described.get("auto_mapping") or {}
    kinds = {"alpha_pattern": patterns, "auto_mapping": mapping}
    for name, value in kinds.items():
        if not isinstance(value, Mapping):
            raise UserError(f"{file} has {name} {ranges.shown(value)}; it must be an object")
    numbers = {f"alpha_pattern.{key}": value for key, value in patterns.items()}
    numbers |= {
        name: described[name] for name in ("lora_alpha", "lora_dropout") if described.get(name)
    }
    for name, value in numbers.items():
        if fault := ranges.numbers(-1e30).fault(value):
            raise UserError(f"{file} has {name} {ranges.shown(value)}; {fault}")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{file} has the alpha_pattern {key!r:.80}: {error}") from None


def open_adapter(folder: Path, described: Mapping[str, Any]) -> Adapter | None:
    """The adapter in a folder; None if it has tensors that only PEFT can merge."""
    matrices: dict[str, dict[str, FileTensor]] = {}
    saved = {}
    for tensor in tensor_files.open_tensor_file(folder / ADAPTER_WEIGHTS):
        name = tensor.name.removeprefix(_PREFIX)
        if match := _PAIR.fullmatch(name):
            matrices.setdefault(match[1], {})[match[2]] = tensor
        else:
            saved[name] = tensor
    plain = all(
        len(pair) == 2 and all(len(tensor.shape) == 2 for tensor in pair.values())
        for pair in matrices.values()
    )
    if not plain or any(".lora_" in name for name in saved):
        return None
    return Adapter(folder, described, {m: (p["A"], p["B"]) for m, p in matrices.items()}, saved)


@dataclass(frozen=True)
class _Merged:
    """A published matrix with an adapter, which ``np.asarray`` computes in float32."""

    base: Any
    pair: tuple[FileTensor, FileTensor]
    scale: float
    outputs: int
    """The axis of the matrix that has the outputs."""

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        a, b = (np.asarray(tensor).astype(np.float32) for tensor in self.pair)
        added = self.scale * (b @ a)
        return np.asarray(self.base).astype(np.float32) + (added.T if self.outputs else added)


def adapted_tensors(
    adapter: Adapter, tensors: Mapping[str, Any], table: WeightTable, boxed: Any
) -> dict[str, Any]:
    """The ``tensors`` of the base with an adapter merged into them, each when it is read.

    ``boxed``: shapes of the model's parameters with their logical axes. Raises UserError for a
    module that the model does not have, and for matrices of another shape.
    """
    params, axes = nn.meta.unbox(boxed), logical_axes(boxed)
    slots, leaves = find_slots(table, params), flatten_dict(params, sep="/")
    in_table = names_in_table(table, tensors, params)
    sources = {name: source for source, name in in_table.items()}
    found = dict(tensors)
    names = names_in_table(table, [f"{module}.weight" for module in adapter.pairs], params)
    unknown = [m for m in adapter.pairs if names.get(f"{m}.weight") not in sources]
    if unknown:
        raise UserError(
            f"{adapter.folder} adapts {some(unknown)}, which the model in {adapter.base} does not "
            "have under this name; merge the adapter with PEFT (merge_and_unload) instead"
        )
    for module, (a, b) in adapter.pairs.items():
        name = names[f"{module}.weight"]
        source, matrix = sources[name], _matrix(slots[name], leaves, axes)
        sizes = (b.shape[0], a.shape[1])
        if matrix is None or tuple(tensors[source].shape) != sizes[:: -1 if matrix.axis else 1]:
            raise UserError(
                f"{adapter.folder} has matrices for {module} of {sizes[0]} outputs and {sizes[1]} "
                f"inputs, which do not fit it in {adapter.base}; use the base that they belong to"
            )
        found[source] = _Merged(tensors[source], (a, b), adapter.scale(module), matrix.axis)
    own = names_in_table(table, adapter.saved, params)
    for name, tensor in adapter.saved.items():
        found[sources.get(own.get(name, name), name)] = tensor
    return found


@dataclass(frozen=True)
class _Matrix:
    """How a published matrix is made of kernels: letters of their inputs and outputs in the order
    of the kernel, and in that of the file, and the axis in the file that has the outputs."""

    inputs: tuple[str, str]
    outputs: tuple[str, str]
    axis: int


def _matrix(slot: Slot, leaves: Mapping[str, Any], axes: Axes) -> _Matrix | None:
    """None for tensors that are no matrix of one layer."""
    path = slot.paths[0]
    of = matrix_axes(tuple(path.split("/")), len(leaves[path].shape), axes)
    ours, groups = parse_axes(slot.axes)
    if len(groups) != 2 or len(of.batch) != len(slot.index) or len(slot.index) > 1:
        return None
    inputs, outputs = ours[: len(of.rows)], ours[len(of.rows) :]
    axis = 0 if set(groups[0]) == set(outputs) else 1
    if set(groups[axis]) != set(outputs) or (len(slot.paths) > 1 and slot.axis != axis):
        return None
    return _Matrix((inputs, groups[1 - axis]), (outputs, groups[axis]), axis)


def write_adapter(
    folder: Path,
    base: str,
    config: TransformerConfig,
    boxed: Any,
    adapters: Adapters,
    params: Mapping[str, Any],
) -> None:
    """Writes the adapters among ``params`` (arrays, with those of the model) as PEFT does.

    ``base``: the folder or id of the model, which is written into the config. Adapters of kernels
    that are one matrix in the original become one of the sum of their ranks. Raises UserError for
    kernels that are no linear layer in the original.
    """
    if isinstance(config, VisionConfig):
        raise UserError(
            f"{config.architecture} has other names of modules in transformers than in its files, "
            "so that PEFT would not find them; write the merged weights, without --adapter-of"
        )
    table, vocab_size = family_of(config).weights(config), getattr(config, "vocab_size", 0)
    model, axes = base_of(params), logical_axes(boxed)
    slots, leaves = find_slots(table, model), flatten_dict(model, sep="/")
    pairs = {"/".join(name): (a, b) for name, a, b in adapters_of(params)}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    inputs_first = False
    for name, slot in slots.items():
        if slot.unused or pairs.keys().isdisjoint(slot.paths):
            continue
        matrix, module = _matrix(slot, leaves, axes), name.removesuffix(".weight")
        if matrix is None or module == name:
            raise UserError(
                f"the adapter of {slot.paths[0]} has no linear layer in {config.architecture} of "
                "transformers; write the merged weights, without --adapter-of"
            )
        a, b = _their_pair(slot, matrix, pairs, leaves, vocab_size)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
        ranks[module], inputs_first = len(a), inputs_first or matrix.axis == 1
    whole = _modules(slots, {"/".join(name) for name in adapters.fully_trained})
    for name, slot in slots.items():
        if any(name.startswith(f"{module}.") for module in whole) and not slot.unused:
            tensors[name] = read_out(slot, leaves, vocab_size)
    repository = None if Path(base).is_dir() else Repository.of_id(base)
    described = _described(adapters.config, config.architecture, ranks) | {
        "base_model_name_or_path": repository.name if repository else base,
        "revision": repository.revision if repository and "@" in base else None,
        "fan_in_fan_out": inputs_first,
        "modules_to_save": whole or None,
    }
    named = {f"{_PREFIX}{name}": value for name, value in tensors.items()}
    infos = [TensorInfo(name, value.dtype, value.shape) for name, value in named.items()]
    tensor_files.write_file(folder / ADAPTER_WEIGHTS, infos, named.values())
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, "utf-8")


def _described(lora: LoraConfig, architecture: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter_config.json, but for what depends on the base; ``ranks`` are those of its
    modules."""
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    writes_targets = architecture.endswith(("ForConditionalGeneration", "MTModel"))
    # For heads of labels PEFT would add modules to save of its own.
    task = "CAUSAL_LM" if generates else "SEQ_2_SEQ_LM" if writes_targets else None
    kind = {"base_model_class": architecture, "parent_library": "transformers"}
    fused = {re.escape(module): rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else kind,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "rank_pattern": fused,
        "alpha_pattern": {
            module: lora.scale * (math.sqrt(rank) if lora.rslora else rank)
            for module, rank in fused.items()
        },
    }


def _their_pair(
    slot: Slot, matrix: _Matrix, pairs: Mapping[str, Any], leaves: Mapping[str, Any], vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """``A`` [ranks, in] and ``B`` [out, ranks] of a published matrix: of each kernel in it that has
    an adapter its own rows of ``A``, and its own block of ``B``."""
    a_axes = f"{matrix.inputs[0]}R->R({matrix.inputs[1]})"
    b_axes = f"R{matrix.outputs[0]}->({matrix.outputs[1]})R"
    all_a, blocks = [], []
    sizes = [shape[matrix.axis] for shape in part_shapes(slot, leaves, slot.vocab_size or vocab)]
    starts = np.cumsum([0, *sizes])
    for path, start in zip(slot.paths, starts[:-1], strict=True):
        if path in pairs:
            a, b = (np.asarray(one[slot.index]) for one in pairs[path])
            all_a.append(to_theirs(a_axes, a, slot.vocab_size or vocab))
            blocks.append((start, to_theirs(b_axes, b, slot.vocab_size or vocab)))
    whole = np.zeros((starts[-1], sum(map(len, all_a))), np.float32)
    column = 0
    for start, block in blocks:
        whole[start : start + len(block), column : column + block.shape[1]] = block
        column += block.shape[1]
    return np.concatenate(all_a), whole


def _modules(slots: Mapping[str, Slot], trained: Set[str]) -> list[str]:
    """The modules of the original that hold fully trained parameters."""
    names = [name for name, slot in slots.items() if not trained.isdisjoint(slot.paths)]
    return sorted({name.rpartition(".")[0] for name in names})
