"""Jinja as chat templates need it: sandboxed, and limited in time and memory.

The only file that imports Jinja, which is an optional dependency.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Time that rendering one conversation may take."""
LONGEST = 1 << 24
"""Number of characters that a template may write."""


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
    """Lets each turn of a loop and each call of a macro look at the clock, and each ``~`` at the
    length of its result."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _call("tick"))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _call("tick"))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _of_environment("joined", node.nodes)


def _call(name: str) -> nodes.Node:
    return nodes.ExprStmt(_of_environment(name, []))


def _of_environment(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})
    deadline = float("inf")
    marks = ("", "")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Limits().visit(tree)  # in place
        for node in tree.find_all(nodes.Node):
            node.environment = self
        tree.set_lineno(1)
        return tree

    def tick(self) -> str:
        """Raises `Failure` after the time that a template has."""
        if time.monotonic() > self.deadline:
            raise Failure(f"it takes more than {SECONDS:g} seconds")
        return ""

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        return _of_length("".join(map(str, parts)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make long results of short arguments."""
        numbers = [one for one in (left, right) if isinstance(one, int)]
        sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
        if operator == "*" and sizes and numbers and sizes[0] * numbers[0] > LONGEST:
            raise Failure(f"it writes more than {LONGEST:,} characters")
        if operator == "**" and len(numbers) == 2 and numbers[1] > 64:
            raise Failure("it computes a large power")
        return _of_length(super().call_binop(context, operator, left, right))


def _of_length(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > LONGEST:
        raise Failure(f"it writes more than {LONGEST:,} characters")
    return value


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)


class _PlainNamespace(Namespace):
    """A namespace without attributes of Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise Failure(f"it sets {name!r} in a namespace")
        super().__setitem__(name, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
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
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _PlainNamespace,
    }
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise Failure(str(error)) from error


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables. Raises `Failure`."""
    environment: Any = template.environment
    environment.deadline = time.monotonic() + SECONDS
    try:
        return str(_of_length(template.render(**variables)))
    except jinja2.TemplateError as error:
        raise Failure(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise Failure(f"it needs too much memory ({type(error).__name__})") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
