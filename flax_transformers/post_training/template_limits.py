"""How long the results of a chat template's operations can be, known before they are computed."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from typing import Any

LONGEST = 1 << 24
"""Number of characters of the text of a template, and of each value on the way to it."""
ALL = 1 << 28
"""Number of characters of all values that one rendering computes."""
ELEMENT = 16
"""Number of characters that an element of a list counts as."""
BITS = 4096
"""Number of bits of an integer."""
_ARGUMENT = 1 << 20  # largest integer that a filter or a method of text is given
_VIEWS = KeysView | ValuesView | ItemsView
_NUMBER = 400  # characters of the longest number in decimals


class Failure(Exception):
    """A template cannot be compiled or rendered; the message says why."""


def check_length(length: int) -> None:
    """Raises `Failure` for a text that is too long."""
    if length > LONGEST:
        raise Failure(f"it writes more than {LONGEST:,} characters")


def check_bits(bits: int) -> None:
    """Raises `Failure` for an integer of too many bits."""
    if bits > BITS:
        raise Failure(f"it computes an integer of more than {BITS:,} bits")


def written(value: Any) -> int:
    """About how many characters a value has as text, where what is there several times counts
    several times. Raises `Failure` above `LONGEST`."""
    total, todo = 0, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping | _VIEWS | list | tuple):
            total += ELEMENT * len(one)
            check_length(total)
            todo.extend(one)
            if isinstance(one, Mapping):
                todo.extend(one.values())
        elif isinstance(one, int):
            total += one.bit_length() // 3
        check_length(total)
    return total


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raises `Failure` if the result of ``+``, ``*``, ``**`` or ``%`` can be too long."""
    if operator == "+" and isinstance(left, str):
        return
    numbers = [one for one in (left, right) if isinstance(one, int)]
    if isinstance(left, str) and operator == "%":
        _format(left, right)
    elif len(numbers) == 2 and operator == "*":
        check_bits(left.bit_length() + right.bit_length())
    elif len(numbers) == 2 and operator == "**":
        check_bits(left.bit_length() * max(right, 0))
    for one in (left, right):
        if operator == "*" and numbers and isinstance(one, str | list | tuple):
            length = written(one) if isinstance(one, tuple) else len(one)
            check_length((length if isinstance(one, str) else ELEMENT * length) * numbers[0])
    if operator == "+" and isinstance(left, tuple) and isinstance(right, tuple):
        check_length(written(left) + written(right))


def check_method(name: str, text: str, *values: Any, **named: Any) -> None:
    """Raises `Failure` if the result of a method of ``str`` can be too long."""
    values = (*values, *named.values())
    check_numbers(values)
    if name in _GROWTH:
        _GROWTH[name](text, *values)


def check_filter(name: str, value: Any, values: Sequence[Any]) -> None:
    """The same for a filter."""
    if name in ("default", "d"):
        return
    check_numbers(values)
    for one in values:
        written(one)
    if name == "sum" and any(isinstance(one, list | tuple) for one in values):
        raise Failure("it adds up lists")
    if name in _ITERATING and isinstance(value, str):
        check_length(ELEMENT * len(value))
    if name not in _PICKING:
        written(value)
    if name in _GROWTH:
        _GROWTH[name](value, *values)


def check_numbers(values: Iterable[Any]) -> None:
    """Raises `Failure` for an integer that no width or count needs."""
    if any(isinstance(one, int) and one > _ARGUMENT for one in values):
        raise Failure(f"it asks for a width or a number above {_ARGUMENT:,}")


def _format(text: Any, *values: Any) -> None:
    """``%`` and ``format``: each field may write all arguments, and each number be a width."""
    text = str(text)
    if re.search(r"%[#0\- +]*(\d*\.)?\*", text.replace("%%", "")) or re.search(r"\{[^}]*\{", text):
        raise Failure("it writes with a width that is an argument")
    fields = text.count("%") + text.count("{")
    check_length(len(text) + fields * (sum(map(written, values)) + _NUMBER))
    widths = re.findall(r"\d+", text)
    check_length(sum(int(one) if len(one) < 9 else LONGEST + 1 for one in widths))


def _replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    check_length(len(text) + text.count(old) * len(new))


def _join(text: Any, parts: Any = "", *_: Any) -> None:
    """The method; of the filter, the text is the list."""
    if not isinstance(text, str):
        text, parts = parts, text
    if isinstance(parts, str | list | tuple):
        check_length(written(parts) + len(parts) * len(str(text)))


def _indent(text: Any, width: Any = 4, *_: Any) -> None:
    text = str(text)
    lines = len(text.splitlines()) + 1
    check_length(len(text) + lines * (width if isinstance(width, int) else len(str(width))))


_GROWTH: dict[str, Callable[..., None]] = {
    "format": _format,
    "replace": _replace,
    "join": _join,
    "indent": _indent,
}
_ITERATING = frozenset(
    {"batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select",
     "selectattr", "slice", "sort", "unique"}
)  # fmt: skip
"""Filters for which a text is a list of characters."""
_PICKING = frozenset(
    {"attr", "count", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
     "reverse", "select", "selectattr"}
)  # fmt: skip
"""Filters that do not read what is in the elements of a list."""
