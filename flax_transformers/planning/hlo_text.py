"""Parse optimised HLO, the text of ``compiled.as_text()``, into computations of instructions.

Only what `hlo_cost` needs is parsed: shapes, operands, and trip counts of loops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

HBM = 0
"""The memory space of the device's main memory, the default of a layout."""

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r"\s*\{([^}]*)\}"
)
_UNSEEN = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclass(frozen=True)
class Array:
    """An array type, such as ``bf16[8,1024]{1,0:T(8,128)S(1)}``."""

    dtype: str
    shape: tuple[int, ...]
    space: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes without the padding of the layout; an element of an unknown type has 1."""
        if self.dtype in ("token", "opaque"):
            return 0
        return self.size * _BITS.get(self.dtype, 8) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """One line: ``name = type opcode(operands), attributes``."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    """Text of the parentheses without names: a constant, the index of a parameter."""
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """Result arrays, those of a tuple in order."""
        return arrays(self.type)

    def attribute(self, name: str) -> str | None:
        """Value of an attribute: a name, or the text inside braces."""
        match = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return None if match is None else (match[1] if match[2] is None else match[2])

    def integers(self, name: str) -> list[int]:
        """Integers of an attribute."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(name) or "")]

    @property
    def op_name(self) -> str:
        """Origin in the JAX program."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return "" if match is None else match[1]


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in program order."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(one for one in self if one.is_root)

    def parameter(self, number: int) -> Instruction | None:
        wanted = str(number)
        found = (one for one in self if one.opcode == "parameter" and one.literal == wanted)
        return next(found, None)

    def seen_through(self, name: str) -> Instruction | None:
        """The instruction of that name, or the original if it is a copy."""
        found = self.instructions.get(name)
        while found is not None and found.opcode in _UNSEEN:
            found = self.instructions.get(found.operands[0])
        return found

    def constant(self, name: str) -> int | None:
        """The value of an instruction that is an integer constant, else None."""
        found = self.seen_through(name)
        if found is None or found.opcode != "constant":
            return None
        return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None


@dataclass(frozen=True)
class Module:
    """An HLO module."""

    computations: dict[str, Computation]
    entry: Computation

    @property
    def num_instructions(self) -> int:
        return sum(len(one.instructions) for one in self.computations.values())


def arrays(text: str) -> list[Array]:
    """The array types in a text."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size) for size in shape.split(",") if size)
        found.append(Array(dtype, sizes, HBM if space is None else int(space[1])))
    return found


def parse_module(text: str) -> Module:
    """Parse a module. Raises ValueError for a text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _whole_lines(text):
        if current is not None and line[:1].isspace():
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
        elif (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations[header[2]] = Computation(header[2], {})
            entry = current if header[1] else entry
    if entry is None:
        raise ValueError("the text is not an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Logical lines: configurations of kernels continue on several lines."""
    whole = ""
    for line in text.splitlines():
        if whole and not line[:1].isspace() and line[:1] in ('"', "}") and line != "}":
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(line: str) -> Instruction | None:
    line = _COMMENT.sub("", line)
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    end = _closing(line, match.end() - 1)
    inside, rest = line[match.end() : end], line[end + 1 :]
    names = tuple(_NAME.findall(inside))
    literal = "" if names else inside
    return Instruction(match[2], match[3], match[4], names, literal, rest, bool(match[1]))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i
    return len(text)


def trip_count(loop: Instruction, inside: Computation, module: Module) -> int | None:
    """Number of runs of the body of a ``while``; None if the text does not determine it.

    Some compilers record it. Otherwise the loop must compare a counter, which starts at a constant
    and is incremented by a constant in the body, with a constant limit.
    """
    known = re.search(r'known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes)
    if known is not None:
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    state = inside.seen_through(loop.operands[0])
    comparison = _comparison(condition, module)
    if comparison is None or state is None or state.opcode != "tuple":
        return None
    direction, sides = comparison

    def value(side: int | str) -> int | None:
        """A constant of the condition, or the initial value of an element of the loop state."""
        return inside.constant(state.operands[side]) if isinstance(side, int) else int(side)

    counters = [s for s in sides if isinstance(s, int) and _step(body, s) is not None]
    if len(counters) != 1 or direction not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    counter = counters[0]
    limit, first = value(sides[1 - sides.index(counter)]), value(counter)
    step = _step(body, counter)
    if limit is None or first is None or not step:
        return None
    return max(0, math.ceil((abs(limit - first) + (direction in ("LE", "GE"))) / abs(step)))


def _comparison(condition: Computation, module: Module) -> tuple[str, list[int | str]] | None:
    """Direction and operands of a loop's comparison: state elements by index, constants as text."""
    root, outer = condition.root, None
    if root.opcode == "fusion":
        outer, condition = root, module.computations[root.attribute("calls") or ""]
        root = condition.root
    if root.opcode != "compare":
        return None
    sides: list[int | str] = []
    for name in root.operands:
        found, where = condition.seen_through(name), condition
        if outer is not None and found is not None and found.opcode == "parameter":
            where = _enclosing(outer, module)
            found = where.seen_through(outer.operands[int(found.literal)])
        if found is None:
            return None
        if found.opcode == "get-tuple-element":
            sides.append(int(found.attribute("index") or 0))
        elif (number := where.constant(found.name)) is not None:
            sides.append(str(number))
        else:
            return None
    return root.attribute("direction") or "", sides


def _enclosing(instruction: Instruction, module: Module) -> Computation:
    found = (c for c in module.computations.values() if instruction.name in c.instructions)
    return next(found)


def _step(body: Computation, part: int) -> int | None:
    """The constant that the body adds to an element of the loop state, else None."""
    if body.root.opcode != "tuple":
        return None
    updated = body.seen_through(body.root.operands[part])
    if updated is None or updated.opcode not in ("add", "subtract"):
        return None
    steps = [body.constant(name) for name in updated.operands]
    return next((step for step in steps if step is not None), None)


def device_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Groups of devices of a collective, by index in the mesh; pairs for a permutation."""
    text = instruction.attributes
    if listed := _LISTED.search(text):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if iota := _IOTA.search(text):
        return _regrouped(_numbers(iota[2]), _numbers(iota[3] or ""), _numbers(iota[1])[-1])
    if named := _NAMED.search(text):
        groups = _named_groups(named[1], named[4])
        if named[2] is None:
            return groups
        # The compiler's mesh has another device order.
        order = _regrouped(_numbers(named[2]), _numbers(named[3] or ""), devices)[0]
        return [[order[index] for index in group] for group in groups]
    return [list(range(devices))]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _regrouped(sizes: list[int], order: list[int], members: int) -> list[list[int]]:
    """Devices 0, 1, ... in a grid of ``sizes``, transposed to ``order`` and split into groups."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    numbers = [0]
    for axis in order or range(len(sizes)):
        numbers = [n + strides[axis] * i for n in numbers for i in range(sizes[axis])]
    return [numbers[i : i + members] for i in range(0, len(numbers), members)]


def _named_groups(mesh: str, joined: str) -> list[list[int]]:
    """Groups over axes of the compiler's mesh: ``'a'=4,'b'=2`` and ``'a','b':(1)2``.

    ``'b':(m)s`` is the part of size s of an axis that has a more significant part of size m.
    """
    parts = {
        name: (int(major or 1), int(size or 0))
        for name, major, size in re.findall(r"'([\w.\-]+)'(?::\((\d+)\)(\d+))?", joined)
    }
    sizes: list[int] = []
    apart: list[int] = []
    together: list[int] = []
    for name, text in re.findall(r"'([\w.\-]+)'=(\d+)", mesh):
        major, size = parts.get(name, (1, 0))
        size = size or int(text)
        first = len(sizes)
        sizes += [major, size, int(text) // (major * size)]
        apart += [first, first + 2] if name in parts else [first, first + 1, first + 2]
        together += [first + 1] if name in parts else []
    members = math.prod(sizes[axis] for axis in together)
    return _regrouped(sizes, apart + together, members)
