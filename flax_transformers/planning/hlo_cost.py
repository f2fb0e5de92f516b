"""Cost of an optimised program on each device: matmuls, collectives, main-memory traffic.

Everything is counted in the text of the program, loop bodies as often as they run. The cost
analysis of the compiler counts the body of a loop once, has no mesh axes, and for a kernel only has
the estimate of its author.

Sent bytes are what one device sends in a ring over a group of n, for a collective whose unsharded
side has S bytes: S (n-1)/n for an all-gather, a reduce-scatter and an all-to-all, twice that for an
all-reduce, and S for a permutation. Per step of a model whose matmul weights are W bytes as they
cross the interconnect (2 per weight where that is bfloat16), this gives

- fsdp = n: 3 W (n-1)/n, because W is gathered for the forward and for the backward pass, and
  gradients are scattered;
- tensor = n, each layer 4 all-reduces of its activations [rows, length, width] of A bytes: two
  forward, two backward, 8 A (n-1)/n in total, and one more if the layer is rematerialized (its
  last product is not needed again).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flax_transformers.planning.hlo_text import (
    HBM,
    Array,
    Computation,
    Instruction,
    Module,
    device_groups,
    parse_module,
    trip_count,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

SLICES = "slices"
"""Replaces mesh axes for collectives over the network between slices."""


@dataclass(frozen=True)
class Collective:
    """One collective of the program, and its number of runs in a step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes of the devices in a group, or SLICES."""
    members: int
    """Devices in a group."""
    runs: int
    arrays: tuple[Array, ...]
    """The communicated arrays, unsharded."""
    op_name: str
    per_host: int | None = None
    """Devices of a group on one host, where groups reach over several of the given hosts."""

    @property
    def bytes(self) -> float:
        """Bytes of the unsharded side in one run."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in a step."""
        share = (self.members - 1) / self.members
        factor = {"collective-permute": 1.0, "all-reduce": 2 * share}.get(self.kind, share)
        return self.runs * self.bytes * factor


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel that is not HLO, and its number of runs in a step."""

    name: str
    """Name of the instruction, which compilers derive from that of the kernel."""
    op_name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    estimate: float | None
    """FLOPs of one run by the kernel's cost estimate."""
    runs: int


@dataclass
class HloCost:
    """Sums over one step, on one device."""

    matmul_flops: float = 0.0
    """A multiply-add counts as 2; without those of ``kernels``."""
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[KernelCall] = field(default_factory=list)
    memory_bytes: float = 0.0
    """Read from and written to main memory by fused loops, matmuls, copies and collectives."""
    num_instructions: int = 0
    """Number of instructions in the text."""
    unknown: list[str] = field(default_factory=list)
    """Loops whose trip count cannot be read."""


def account(
    text: str, mesh: Mapping[str, int], *, hosts: Sequence[int] = (), unknown_rounds: int = 1
) -> HloCost:
    """Count the cost of ``text``, an optimised HLO module, on each device of ``mesh``.

    ``mesh`` gives the size of each axis, in the order of the devices, and ``hosts`` the host of
    each device, if links between hosts are others than those within one. Loops whose trip count
    cannot be read count as ``unknown_rounds``. Raises ValueError for a text that is not a module.
    """
    module = parse_module(text)
    found = HloCost(num_instructions=module.num_instructions)
    _Walk(module, dict(mesh), hosts, found, unknown_rounds).computation(module.entry, 1)
    return found


@dataclass
class _Walk:
    """Walks through a module from its entry, and counts loops as often as they run."""

    module: Module
    mesh: dict[str, int]
    hosts: Sequence[int]
    found: HloCost
    unknown_rounds: int

    def computation(self, computation: Computation, runs: int) -> None:
        """Count a computation whose instructions read and write memory."""
        overlapped: set[str] = set()
        for one in computation:
            if one.opcode == "while":
                count = trip_count(one, computation, self.module)
                if count is None:
                    self.found.unknown.append(one.name)
                    count = self.unknown_rounds
                self.computation(self._called(one, "body"), runs * count)
            elif one.opcode == "conditional":
                for name in re.findall(r"%([\w.\-]+)", _branches(one)):
                    self.computation(self.module.computations[name], runs)
            elif one.opcode == "call":
                self.computation(self._called(one, "to_apply"), runs)
            elif one.opcode == "async-start":
                self.computation(self._called(one, "calls"), runs)
            else:
                if one.opcode == "fusion":
                    self._fused(self._called(one, "calls"), runs, overlapped)
                else:
                    self._work(one, computation, runs)
                self.found.memory_bytes += runs * self._traffic(one, computation)

    def _called(self, one: Instruction, attribute: str) -> Computation:
        return self.module.computations[one.attribute(attribute) or ""]

    def _fused(self, computation: Computation, runs: int, overlapped: set[str]) -> None:
        """Count a fused loop. ``overlapped`` are the channels of collectives counted so far.

        A collective that overlaps with matmuls occurs in each of their fusions, with the same
        channel.
        """
        for one in computation:
            if one.opcode == "fusion":
                self._fused(self._called(one, "calls"), runs, overlapped)
            elif one.opcode.removesuffix("-start") in COLLECTIVES:
                channel = one.attribute("channel_id")
                if channel is None or channel not in overlapped:
                    self._collective(one, computation, runs, fused=True)
                overlapped |= {channel} if channel is not None else set()
            else:
                self._work(one, computation, runs)

    def _work(self, one: Instruction, inside: Computation, runs: int) -> None:
        if one.opcode == "dot":
            self.found.matmul_flops += runs * _dot_flops(one, inside)
        elif one.opcode == "convolution":
            self.found.matmul_flops += runs * _convolution_flops(one, inside) / _groups(one)
        elif one.opcode.removesuffix("-start") in COLLECTIVES:
            self._collective(one, inside, runs, fused=False)
        elif one.opcode == "custom-call":
            self._custom_call(one, inside, runs)
        elif one.opcode == "send":
            self._between_slices(one, inside, runs)

    def _custom_call(self, one: Instruction, inside: Computation, runs: int) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
        name = "" if target is None else target[1]
        if "gemm" in name or "matmul" in name:
            self.found.matmul_flops += runs * _gemm_flops(one, inside)
        elif name == "tpu_custom_call" or "fmha" in name:
            estimate = re.search(r'cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', one.attributes)
            call = KernelCall(
                name=one.name,
                op_name=one.op_name,
                operands=tuple(_operands(one, inside)),
                results=tuple(one.arrays),
                estimate=None if estimate is None else float(estimate[1]),
                runs=runs,
            )
            self.found.kernels.append(call)

    def _collective(self, one: Instruction, inside: Computation, runs: int, *, fused: bool) -> None:
        kind, moved = one.opcode.removesuffix("-start"), _operands(one, inside)
        if fused and kind == "all-reduce" and _bytes(inside.root.arrays) < _bytes(one.arrays):
            kind = "reduce-scatter"  # only this device's part is kept
        groups = device_groups(one, math.prod(self.mesh.values()))
        members = len(groups[0])
        if members < 2 and kind != "collective-permute":
            return
        if kind == "all-gather":
            moved = [Array(a.dtype, (members, *a.shape), a.space) for a in moved]
        axes, per_host = self._axes(groups), self._per_host(groups)
        self.found.collectives.append(
            Collective(kind, axes, members, runs, tuple(moved), one.op_name, per_host)
        )

    def _between_slices(self, one: Instruction, inside: Computation, runs: int) -> None:
        """Count the part of a collective between slices, which libtpu leaves to the hosts."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        target = re.search(r'_xla_megascale_target="\{([^}]*)\}', one.attributes)
        if kind is None or target is None:
            return
        ranges = [[int(end) for end in part.split(":")] for part in target[1].split(",")]
        members = sum(ends[-1] - ends[0] + 1 for ends in ranges)
        moved = tuple(_operands(one, inside)[:1])
        name = kind[1].lower().replace("_", "-")
        self.found.collectives.append(
            Collective(name, (SLICES,), members, runs, moved, one.op_name)
        )

    def _axes(self, groups: list[list[int]]) -> tuple[str, ...]:
        """Mesh axes on which the devices of a group differ."""
        differing, stride = [], math.prod(self.mesh.values())
        for name, size in self.mesh.items():
            stride //= size
            indices = ({device // stride % size for device in group} for group in groups)
            if any(len(different) > 1 for different in indices):
                differing.append(name)
        return tuple(differing)

    def _per_host(self, groups: list[list[int]]) -> int | None:
        """As in ``Collective``; of the groups with the fewest, which are the slowest."""
        hosts = [Counter(self.hosts[device] for device in group) for group in groups if self.hosts]
        return min((max(one.values()) for one in hosts if len(one) > 1), default=None)

    def _traffic(self, one: Instruction, inside: Computation) -> float:
        """Bytes that one run of an instruction reads from and writes to main memory."""
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return 0.0
        operands, results = _operands(one, inside), one.arrays
        if one.opcode in ("copy-start", "slice-start"):
            return _in_hbm(results[1:2]) + (_bytes(results[1:2]) if operands[0].space == HBM else 0)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return _in_hbm(results) + (_bytes(results) if operands[0].space == HBM else 0)
        if one.opcode == "dynamic-update-slice":
            return 2 * _in_hbm(operands[1:2])
        if one.opcode.removesuffix("-start") in COLLECTIVES and one.opcode.endswith("-start"):
            return _in_hbm(results)  # both sides
        if one.opcode != "fusion":
            return _in_hbm(operands) + _in_hbm(results)
        return self._fusion_traffic(one, operands)

    def _fusion_traffic(self, one: Instruction, operands: list[Array]) -> float:
        """As `_traffic` for a fusion: only the slices that it reads or updates in place."""
        computation = self._called(one, "calls")
        aliased = re.findall(r"\{(\d*)\}: \((\d+), \{\}", one.attributes)
        kept_operands = {int(operand) for _, operand in aliased}
        kept_results = {int(result or 0) for result, _ in aliased}
        total = 0.0
        for number, array in enumerate(operands):
            parameter = computation.parameter(number)
            if array.space != HBM or number in kept_operands or parameter is None:
                continue
            total += min(array.bytes, self._read(parameter, computation))
        root = computation.root
        roots = root.operands if root.opcode == "tuple" else (root.name,)
        for number, (name, array) in enumerate(zip(roots, one.arrays, strict=False)):
            if array.space == HBM and number not in kept_results:
                total += _written(computation.seen_through(name), array, computation)
        return total

    def _read(self, parameter: Instruction, computation: Computation) -> float:
        """Bytes that a fused loop reads of a parameter; infinite if it reads all of it."""
        total = 0.0
        for one in computation:
            for index, name in enumerate(one.operands):
                if name != parameter.name:
                    continue
                if one.opcode in ("dynamic-slice", "slice", "gather"):
                    total += _bytes(one.arrays)
                elif one.opcode == "bitcast":
                    total += self._read(one, computation)
                elif one.opcode == "fusion":
                    inner = self._called(one, "calls")
                    inside = inner.parameter(index)
                    total += math.inf if inside is None else self._read(inside, inner)
                elif one.opcode != "dynamic-update-slice" or index > 0:
                    return math.inf
        return total


_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
    | {"partition-id", "replica-id", "opt-barrier", "broadcast-in-dim"}
)


def _branches(one: Instruction) -> str:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if listed is not None:
        return listed[1]
    return " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", one.attributes))


def _operands(one: Instruction, inside: Computation) -> list[Array]:
    return [
        array
        for name in one.operands
        if name in inside.instructions
        for array in inside.instructions[name].arrays
    ]


def _bytes(several: list[Array]) -> float:
    return sum(array.bytes for array in several)


def _in_hbm(several: list[Array]) -> float:
    return sum(array.bytes for array in several if array.space == HBM)


def _written(one: Instruction | None, array: Array, computation: Computation) -> float:
    if one is not None and one.opcode == "dynamic-update-slice":
        return _bytes(computation.instructions[one.operands[1]].arrays)
    return array.bytes


def _dot_flops(one: Instruction, inside: Computation) -> float:
    left = _operands(one, inside)[0]
    summed = math.prod(left.shape[axis] for axis in one.integers("lhs_contracting_dims"))
    return 2.0 * one.arrays[0].size * summed


def _gemm_flops(one: Instruction, inside: Computation) -> float:
    """FLOPs of a matmul of an NVIDIA library, from the contracted axes in its settings."""
    axes = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', one.attributes)
    left = _operands(one, inside)[0]
    summed = [left.shape[int(axis)] for axis in re.findall(r"\d+", axes[1])] if axes else [0]
    return 2.0 * one.arrays[0].size * math.prod(summed)


def _convolution_flops(one: Instruction, inside: Computation) -> float:
    """FLOPs of products of elements, without those of padding and of dilation.

    On a TPU all matmuls are convolutions, whose windows also represent batch dimensions.
    """
    left, right = _operands(one, inside)[:2]
    result = one.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    of_left, of_right, of_result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    settings = dict(re.findall(r"(\w+)=(\S+)", "" if window is None else window[1]))
    pairs = 1
    for axis in (label for label in of_left if label.isdigit()):
        number = int(axis)

        def setting(name: str, default: str, number: int = number) -> str:
            text = settings.get(name)
            return default if text is None else text.split("x")[number]

        pairs *= _window_pairs(
            size=left.shape[of_left.index(axis)],
            kernel=right.shape[of_right.index(axis)],
            results=result.shape[of_result.index(axis)],
            stride=int(setting("stride", "1")),
            before=int(setting("pad", "0_0").split("_")[0]),
            spread=int(setting("lhs_dilate", "1")),
            kernel_spread=int(setting("rhs_dilate", "1")),
        )
    summed = right.shape[of_right.index("i")]
    kept = result.shape[of_result.index("b")] * result.shape[of_result.index("f")]
    return 2.0 * pairs * summed * kept


def _groups(one: Instruction) -> int:
    """The number of groups of a ragged product, in which a row is multiplied with one kernel.

    On a TPU it is written as the product of all rows with all kernels, which are the window; at run
    time, blocks in which no row belongs to the kernel are skipped.
    """
    if re.search(r'op_name="[^"]*ragged_dot', one.attributes) is None:
        return 1
    window = re.search(r"window=\{size=([\dx]+)", one.attributes)
    return 1 if window is None else math.prod(map(int, window[1].split("x")))


def _window_pairs(
    *,
    size: int,
    kernel: int,
    results: int,
    stride: int,
    before: int,
    spread: int,
    kernel_spread: int,
) -> int:
    """The number of (result, kernel) pairs on one axis whose product has a real element."""
    last = (size - 1) * spread
    pairs = 0
    for index in range(kernel):
        # Result r uses element r * stride + offset of the dilated and padded left side.
        offset = index * kernel_spread - before
        pairs += sum(
            0 <= r * stride + offset <= last and (r * stride + offset) % spread == 0
            for r in range(results)
        )
    return pairs
