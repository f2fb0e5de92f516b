"""Jinja as chat templates need it: sandboxed, and limited in time and in the length of its text.

The only file that imports Jinja, which is an optional dependency.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Time that rendering one conversation may take."""
_LONGEST = 1 << 24
"""Number of characters of the text of a template, and of each value that an operator computes."""
_BITS = 4096
"""Number of bits of an integer that an operator computes."""


class Failure(Exception):
    """A template cannot be compiled or rendered; the message says why."""


class _Generation(Extension):
    """Puts marks around what ``{% generation %}`` encloses."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        begin, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class _Limits(NodeTransformer):
    """Lets each turn of a loop and each call of a macro look at the clock, and limits ``~``, which
    Jinja does not let an environment intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_of_environment("tick")))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_of_environment("tick")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _of_environment("joined", *node.nodes)


def _of_environment(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Rendering(threading.local):
    """What is left for the rendering of this thread."""

    deadline = float("inf")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})
    marks = ("", "")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rendering = _Rendering()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Limits().visit(tree)  # in place
        for node in tree.find_all(nodes.Node):
            node.environment = self
        tree.set_lineno(1)
        return tree

    def tick(self) -> None:
        """Raises `Failure` after the time that a template has."""
        if time.monotonic() > self.rendering.deadline:
            raise Failure(f"it takes more than {SECONDS:g} seconds")

    def concat(self, parts: Iterable[str]) -> str:
        """The text of parts, which are counted as they come."""
        found, length = [], 0
        for part in parts:
            found.append(part)
            length += len(part)
            _check_length(length)
            self.tick()
        return "".join(found)

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        return self.concat(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int):
                _check_length(len(value) * times)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            _check_length(len(result))
        elif isinstance(result, int):
            _check_bits(result.bit_length())
        return result


def _check_length(length: int) -> None:
    if length > _LONGEST:
        raise Failure(f"it writes more than {_LONGEST:,} characters")


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise Failure(f"it computes an integer of more than {_BITS:,} bits")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> None:
    raise Failure(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def compiled(source: str, marks: tuple[str, str]) -> jinja2.Template:
    """A template, with the functions and settings that ``transformers`` gives it.

    ``marks``: what is put around the text in ``{% generation %}``. Raises `Failure`.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.marks = marks
    del environment.globals["lipsum"]  # which may take long
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise Failure(str(error)) from error


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables. Raises `Failure`."""
    environment: Any = template.environment
    environment.rendering.deadline = time.monotonic() + SECONDS
    try:
        return str(environment.concat(template.generate(**variables)))
    except jinja2.TemplateError as error:
        raise Failure(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise Failure(f"it needs too much memory ({type(error).__name__})") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
