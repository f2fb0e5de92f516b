"""The one check of numbers: what it admits, and what it says of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest

from flax_transformers import ranges
from flax_transformers.cli.parsing import number
from flax_transformers.errors import UserError
from flax_transformers.ranges import OutOfRange, Range, Ranges, integers, numbers


@pytest.mark.parametrize(
    ("allowed", "value", "fault"),
    [
        (integers(1, 100), 0, "it must be at least 1"),
        (integers(1, 100), 101, "it must be at most 100"),
        (integers(1, 100), 5.0, "it must be a whole number"),
        (integers(1, 100), True, "it must be a whole number"),
        (integers(1, 100), "5", "it must be a whole number"),
        (integers(1, 100), 10**400, "it must be at most 100"),
        (integers(), 2**31, "it must be at most 2,147,483,647"),
        (numbers(0, 1e6), math.nan, "it must be finite"),
        (numbers(0, 1e6), math.inf, "it must be finite"),
        (numbers(0, 1e6), -0.5, "it must not be negative"),
        (numbers(0, 1e6), 1e20, "it must be at most 1e+06"),
        (numbers(0, 1e6), None, "it must be a number"),
        (numbers(0, 1e6, above=True), 0, "it must be positive"),
        (numbers(1, 1e6, above=True), 1.0, "it must be greater than 1"),
        (ranges.RATE, 1.0, "it must be in [0, 1)"),
        (ranges.RATE, math.nan, "it must be finite and in [0, 1)"),
        (numbers(0, 1, above=True), 0.0, "it must be in (0, 1]"),
    ],
)
def test_what_a_number_must_be_is_said(allowed: Range, value, fault):
    assert allowed.fault(value) == fault
    assert not allowed.admits(value)


@pytest.mark.parametrize(
    ("allowed", "value"),
    [
        (integers(1, 100), 1),
        (integers(1, 100), 100),
        (integers(1, 100), np.int64(7)),
        (ranges.RATE, 0),
        (ranges.RATE, 0.999),
        (numbers(0, 1, above=True), 1),
        (numbers(1, 1e6, above=True), np.float32(1.5)),
    ],
)
def test_ends_belong_to_a_range_unless_left_out(allowed: Range, value):
    assert allowed.fault(value) == ""


@dataclass(frozen=True)
class Base:
    RANGES: ClassVar[Ranges] = {"layers": integers(1, 12), "rate": ranges.RATE}

    layers: int = 2
    rate: float = 0.1
    free: float = 0.0
    size: int | tuple[int, int] = 8
    name: str | None = None
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = True

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model")


@dataclass(frozen=True)
class Deeper(Base):
    RANGES: ClassVar[Ranges] = {"layers": integers(1, 20), "size": integers(1, 9)}


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (Base, {"layers": 13}, "model.layers is 13; it must be at most 12"),
        (Base, {"layers": 2.0}, "model.layers is 2.0; it must be a whole number"),
        (Base, {"layers": None}, "model.layers is None; it must be a whole number"),
        (Base, {"layers": 10**5000}, "model.layers is a number of 16610 bits; it must be at most"),
        (Base, {"rate": math.nan}, "model.rate is nan; it must be finite and in [0, 1)"),
        (Base, {"free": math.inf}, "model.free is inf; it must be finite"),
        (Base, {"size": 2**63}, "model.size is 9223372036854775808; it must be at most"),
        (Base, {"size": (1, 2, 3)}, "it must be a whole number or 2 items"),
        (Base, {"name": "a\0b"}, "model.name is 'a\\x00b'; it must not contain a NUL character"),
        (Base, {"names": ("\udcff",)}, "model.names is '\\udcff'; it must be valid UTF-8"),
        (Base, {"name": 3}, "model.name is 3; it must be a string or None"),
        (Base, {"names": "abc"}, "model.names is 'abc'; it must be a tuple, each item a string"),
        (Base, {"kind": "c"}, "model.kind is 'c'; it must be 'a' or 'b'"),
        (Base, {"on": 1}, "model.on is 1; it must be True or False"),
        (Deeper, {"layers": 21}, "model.layers is 21; it must be at most 20"),
        (Deeper, {"size": (1, 10)}, "model.size is 10; it must be in [1, 9]"),
        (Deeper, {"rate": -1.0}, "model.rate is -1.0; it must be in [0, 1)"),
    ],
)
def test_a_field_of_the_wrong_type_or_out_of_range_is_named(kind, fields, says):
    with pytest.raises(OutOfRange) as caught:
        kind(**fields)
    assert says in str(caught.value)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_scalars_of_numpy_become_numbers_of_python():
    config = Base(layers=np.int32(3), rate=np.float64(0.5))  # type: ignore[arg-type]
    assert (type(config.layers), type(config.rate)) == (int, float)


@pytest.mark.parametrize("text", ["²", "٣", "1_0", " 1", "1.0", "", "-", "1" * 19, "+1", "0x1"])
def test_only_ascii_digits_write_a_whole_number(text):
    assert ranges.parse_integer(text) is None


def test_whole_numbers_are_read():
    assert [ranges.parse_integer(text) for text in ("0", "-12", "007")] == [0, -12, 7]


@pytest.mark.parametrize(
    ("allowed", "text", "says"),
    [
        (integers(1, 100), "0", "--top is 0; it must be at least 1"),
        (integers(1, 100), "²", "--top is '²'; it must be a whole number"),
        (integers(1, 100), "1e20", "--top is '1e20'; it must be a whole number"),
        (numbers(0, 1e6), "nan", "--top is nan; it must be finite"),
        (numbers(0, 1e6), "x", "--top is 'x'; it must be a number"),
    ],
)
def test_an_option_out_of_range_is_named(allowed: Range, text, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        number("--top", allowed).instance_from_str([text])


def test_numbers_of_the_environment_are_checked(monkeypatch):
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    assert ranges.from_environment("SOME_VARIABLE", integers(1, 9), 4) == 4
    monkeypatch.setenv("SOME_VARIABLE", "7")
    assert ranges.from_environment("SOME_VARIABLE", integers(1, 9), 4) == 7
    monkeypatch.setenv("SOME_VARIABLE", "²")
    with pytest.raises(OutOfRange, match="SOME_VARIABLE is '²'; it must be a whole number, or uns"):
        ranges.from_environment("SOME_VARIABLE", integers(1, 9), 4)
