"""What is in a field of a record: one rule for all formats and sources.

A record is an object, whose fields have names, or a list, whose fields have numbers from 0. Readers
give texts as str or, where the file holds them so, as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax_transformers.data.sources.documents import Decoder, Invalid, Where, listed

Row = Mapping[str, Any] | Sequence[Any]


def row_of(decoder: Decoder, content: Any, where: Where) -> Row:
    """The record that a reader found, or the one in a line of JSON. Raises `Invalid`."""
    if isinstance(content, bytes):
        text = decoder.text(content, where).removeprefix("\ufeff")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Invalid(where, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict | list):
        raise Invalid(where, f"holds a JSON {type(content).__name__}, not an object")
    return content


def value_in(row: Row, field: str, where: Where) -> Any:
    """The value of a field; None for null. Raises `Invalid` where it is missing.

    "a.b" is the field of that name or, where there is none, b of the object in a; of a list of
    objects, the list of their values. What is null has null fields.
    """
    if isinstance(row, list):
        if not field.isdecimal():
            raise Invalid(where, f"holds a JSON list, not one object with the field {field!r}")
        row = {str(place): value for place, value in enumerate(row)}
    value: Any = row
    for key in [field] if field in row else field.split("."):
        if value is None:
            return None
        objects = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) and key in one for one in objects):
            raise Invalid(where, f"has no field {field!r}, it has {listed(row)}")
        found = [one[key] for one in objects]
        value = found if isinstance(value, list) else found[0]
    return value


def text_in(decoder: Decoder, row: Row, field: str, where: Where) -> str:
    """The text in a field; that of null is empty. Raises `Invalid`.

    A list of texts counts as the lines of one; null is no line. Bytes, and characters that are no
    text, follow the decoder's policy.
    """
    value = value_in(row, field, where)
    if value is None:
        return ""
    lines = value if isinstance(value, list) else [value]
    wrong = next((one for one in lines if not isinstance(one, str | bytes | None)), None)
    if wrong is not None:
        holds = type(wrong).__name__ if wrong is value else f"list of {type(wrong).__name__}"
        raise Invalid(where, f"has a {holds} in {field!r}, not text")
    return "\n".join(_decoded(decoder, line, where) for line in lines if line is not None)


def _decoded(decoder: Decoder, text: str | bytes, where: Where) -> str:
    if isinstance(text, bytes):
        return decoder.text(text, where)
    if text.isascii():
        return text
    try:  # bytes of a table that are not UTF-8 come as surrogates
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # escapes of JSON can be lone surrogates, which are no text
        raw = text.encode("utf-8", "surrogatepass")
    return decoder.text(raw, _TextOf(where))


@dataclass(frozen=True)
class _TextOf:
    where: Where

    def __str__(self) -> str:
        return f"The text of {self.where}"
