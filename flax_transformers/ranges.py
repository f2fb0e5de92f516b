"""Checks of the types and ranges of settings in configs, files and command lines.

A config dataclass declares the ranges of its numbers in a table, ``RANGES``, and calls
`check_fields` in ``__post_init__``; types are those of its annotations. NaN, infinity and integers
of more than 64 bits are in no range. Readers of files use `check_number`, the command line
`cli.parsing.number`, and environment variables `from_environment`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from flax_transformers.errors import UserError


class OutOfRange(UserError, ValueError):
    """A setting has a wrong type or is out of range; the message names the setting."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, without these if ``above`` or ``below``."""

    least: float
    most: float
    whole: bool
    above: bool = False
    below: bool = False

    def admits(self, value: Any) -> bool:
        """Whether ``value`` is a number of this range."""
        return not self.fault(value)

    def fault(self, value: Any) -> str:
        """The violated condition, such as "it must be at least 1", or an empty string."""
        if not _is_number(value, self.whole):
            return f"it must be {'a whole number' if self.whole else 'a number'}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"it must be finite{self._where()}"
        too_small = value <= self.least if self.above else value < self.least
        too_large = value >= self.most if self.below else value > self.most
        if not (too_small or too_large):
            return ""
        if self._is_short():
            return f"it must be {self._interval()}"
        if too_large:
            return f"it must be {'below' if self.below else 'at most'} {_plain(self.most)}"
        if self.above and not self.least:
            return "it must be positive"
        if self.above:
            return f"it must be greater than {_plain(self.least)}"
        if not self.whole and not self.least:
            return "it must not be negative"
        return f"it must be at least {_plain(self.least)}"

    def _is_short(self) -> bool:
        return self.most - self.least <= 10

    def _where(self) -> str:
        return f" and {self._interval()}" if self._is_short() else ""

    def _interval(self) -> str:
        opening, closing = "(" if self.above else "[", ")" if self.below else "]"
        return f"in {opening}{_plain(self.least)}, {_plain(self.most)}{closing}"


Ranges = Mapping[str, Range]

INT32 = 2**31 - 1


def integers(least: int = 1, most: int = INT32) -> Range:
    """Whole numbers from ``least`` to ``most``."""
    return Range(least, most, whole=True)


def numbers(
    least: float = 0.0, most: float = 1e30, *, above: bool = False, below: bool = False
) -> Range:
    """Finite numbers from ``least`` to ``most``; ``above`` and ``below`` exclude these two."""
    return Range(least, most, whole=False, above=above, below=below)


SHARE = numbers(0, 1)
"""A share, including 1."""
RATE = numbers(0, 1, below=True)
"""A share below 1: dropout, moments, smoothing."""
COEFFICIENT = numbers(0, 1e6)
"""The coefficient of a term."""
SECONDS = numbers(0, 1e8)
"""A time limit of at most three years, beyond which timers of the operating system overflow."""
WIDTH = integers(1, 2**20)
"""Width of a layer, in features or heads."""
LAYERS = integers(1, 10_000)
ENTRIES = integers(1, 2**24)
"""Entries of a vocabulary, or classes."""
TOKEN_ID = integers(-1, 2**24)
"""A token id, or -1 for none."""
POSITIONS = integers(1, 2**25)
"""Number of tokens of a sequence."""
PIXELS = integers(1, 2**14)
"""Side of an image."""
EXAMPLES = integers(1, 2**24)
"""Number of examples of a batch."""

_ANY_INTEGER = integers(-(2**63), 2**63 - 1)
_ANY_NUMBER = numbers(-1.7e308, 1.7e308)


def check_fields(config: Any, where: str) -> None:
    """Raise OutOfRange if a field of the dataclass ``config`` has another type than its annotation,
    or is outside the ``RANGES`` of its class or a base class.

    ``where`` is the prefix of field names: "model" gives "model.num_layers". NumPy scalars become
    Python numbers, so that every config can be written as JSON.
    """
    kind: type = type(config)
    hints, table = _hints(kind), _table(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (Integral, Real)) and hasattr(value, "item"):
            value = value.item()
            object.__setattr__(config, field.name, value)
        name = f"{where}.{field.name}" if where else field.name
        hint = hints.get(field.name, Any)
        if not _fits(value, hint):
            raise OutOfRange(f"{name} is {shown(value)}; it must be {_described(hint)}")
        _check_leaves(name, value, table.get(field.name))


def field_range(config: Any, name: str) -> Range | None:
    """The range that the class of a config declares for a field, if any."""
    kind: type = type(config)
    return _table(kind).get(name)


def check_number(name: str, value: Any, allowed: Range) -> Any:
    """Return ``value``; raise OutOfRange, beginning with ``name``, if it is out of range."""
    fault = allowed.fault(value)
    if fault:
        raise OutOfRange(f"{name} is {shown(value)}; {fault}")
    return value


def check_text(name: str, value: str) -> str:
    """Return ``value``; raise OutOfRange for a NUL character or invalid UTF-8."""
    if "\0" in value:
        raise OutOfRange(f"{name} is {shown(value)}; it must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OutOfRange(f"{name} is {shown(value)}; it must be valid UTF-8") from None
    return value


def parse_integer(text: str) -> int | None:
    """The number in at most 18 ASCII digits with an optional minus sign; else None.

    Python's ``int`` also accepts underscores, blanks and digits of other scripts.
    """
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
        return None
    return int(text)


def from_environment(variable: str, allowed: Range, default: int) -> int:
    """The whole number in an environment variable, or ``default`` if it is unset or empty.

    Raises OutOfRange, which names the variable.
    """
    text = os.environ.get(variable)
    if not text:
        return default
    value = parse_integer(text)
    fault = allowed.fault(value)
    if fault:
        raise OutOfRange(f"{variable} is {shown(text)}; {fault}, or unset it")
    assert value is not None
    return value


def shown(value: Any) -> str:
    """``value`` for a message, shortened; Python does not print integers of 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    if dataclasses.is_dataclass(value):
        kind = value if isinstance(value, type) else type(value)
        return f"a {kind.__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_leaves(name: str, value: Any, allowed: Range | None) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_leaves(name, item, allowed)
    elif isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        default = _ANY_INTEGER if isinstance(value, int) else _ANY_NUMBER
        check_number(name, value, allowed or default)


@functools.cache
def _table(kind: type) -> dict[str, Range]:
    """The ranges of a class, which override those of its bases."""
    return {
        name: allowed
        for base in reversed(kind.__mro__)
        for name, allowed in vars(base).get("RANGES", {}).items()
    }


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields; empty if an annotation cannot be evaluated."""
    try:
        return typing.get_type_hints(kind)
    except Exception:  # an annotation is any expression
        return {}


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type; True for types that cannot be checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint in (int, float):
        return _is_number(value, hint is int)
    if hint is types.NoneType:
        return value is None
    if hint in (bool, str) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return isinstance(value, hint)
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, name) for name in _members(hint))
    return True


@functools.cache
def _members(protocol: type) -> tuple[str, ...]:
    """Names of the methods and attributes of a protocol."""
    names = (*vars(protocol), *vars(protocol).get("__annotations__", {}))
    return tuple(n for n in names if n == "__dataclass_fields__" or not n.startswith("_"))


def _described(hint: Any) -> str:
    """Description of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _listed([repr(option) for option in arguments], "or")
    if origin in (typing.Union, types.UnionType):
        return _listed([_described(option) for option in arguments], "or")
    if origin is tuple:
        of = _described(arguments[0]) if arguments else "anything"
        return f"a tuple, each item {of}" if arguments[-1:] == (...,) else f"{len(arguments)} items"
    if getattr(hint, "_is_protocol", False):
        methods = [name for name in _members(hint) if not name.startswith("_")]
        return f"a dataclass with {_listed(methods, 'and')}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    if hint in (None, types.NoneType):
        return "None"
    name = getattr(hint, "__name__", str(hint))
    return words.get(hint) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _listed(items: list[str], word: Literal["and", "or"]) -> str:
    return f"{', '.join(items[:-1])} {word} {items[-1]}" if len(items) > 1 else items[0]


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
