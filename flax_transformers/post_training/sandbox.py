"""Jinja as chat templates need it: sandboxed, and limited in time and in what it computes.

The only file that imports Jinja, which is an optional dependency.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment
from jinja2.visitor import NodeTransformer

from flax_transformers.post_training.template_limits import (
    ALL,
    ELEMENT,
    Failure,
    check_bits,
    check_filter,
    check_length,
    check_method,
    check_operator,
    written,
)

SECONDS = 5.0
"""Time that rendering one conversation may take."""
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap")
"""Filters whose time is not limited by the length of their result."""
_METHODS_LEFT_OUT = frozenset({"encode", "expandtabs", "format_map", "to_bytes", "translate"})


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
    """Lets each turn of a loop and each call of a macro look at the clock, and values that no
    function of the environment computes be checked."""

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

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _of_environment("counted", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _of_environment("expanded", node) if node.ctx == "load" else node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _expanded(node.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        node.args = [_expanded(one) for one in node.args]
        return node


def _of_environment(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _expanded(node: nodes.Expr) -> nodes.Expr:
    """An operand of a comparison, which takes as long as its operand's text."""
    constants = node.items if isinstance(node, nodes.List) else [node]
    if all(isinstance(one, nodes.Const) for one in constants):
        return node
    return _of_environment("expanded", node)


class _Rendering(threading.local):
    """What is left for the rendering of this thread."""

    deadline = float("inf")
    characters = ALL


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    marks = ("", "")

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self.text, **options)
        self.rendering = _Rendering()
        self.filters = {
            name: self._limited(name, function)
            for name, function in (self.filters | {"tojson": _tojson}).items()
            if name not in _LEFT_OUT
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Limits().visit(tree)  # in place
        for node in tree.find_all(nodes.Node):
            node.environment = self
        tree.set_lineno(1)
        return tree

    def start(self) -> None:
        """The beginning of a rendering."""
        self.rendering.deadline = time.monotonic() + SECONDS
        self.rendering.characters = ALL

    def tick(self) -> None:
        """Raises `Failure` after the time that a template has."""
        if time.monotonic() > self.rendering.deadline:
            raise Failure(f"it takes more than {SECONDS:g} seconds")

    def counted(self, value: Any) -> Any:
        """A computed value. Raises `Failure` if it, or all of them, are too long."""
        self.tick()
        if isinstance(value, str | list | tuple | dict):
            length = len(value) if isinstance(value, str) else ELEMENT * len(value)
            check_length(length)
            self.rendering.characters -= length
            if self.rendering.characters < 0:
                raise Failure(f"it computes more than {ALL:,} characters")
        elif isinstance(value, int):
            check_bits(value.bit_length())
        return value

    def text(self, value: Any) -> str:
        """What is written of a value."""
        if isinstance(value, str):
            return value
        written(value)
        return str(value)

    def concat(self, parts: Iterable[str]) -> str:
        """The text of parts, which are counted as they come."""
        found, length = [], 0
        for part in parts:
            found.append(part)
            length += len(part)
            check_length(length)
            self.tick()
        return str(self.counted("".join(found)))

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        return self.concat(map(self.text, parts))

    def expanded(self, value: Any) -> Any:
        """A value that is compared or hashed. Raises `Failure` if that may take long."""
        written(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return self.counted(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # str.format is wrapped
        owner = getattr(method, "__self__", None)
        if owner is self:  # what `_Limits` adds
            return obj(*args)
        if isinstance(owner, str):
            check_method(method.__name__, owner, *args, **kwargs)
        elif isinstance(owner, list | tuple):  # compare their elements
            written(args)
        return self.counted(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _METHODS_LEFT_OUT and super().is_safe_attribute(obj, attr, value)

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is checked."""
        passed = int(hasattr(function, "jinja_pass_arg"))  # the context is its first argument

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            first, value, *others = args if passed else (None, *args)
            if isinstance(value, Iterator):
                value = self.counted(list(value))
            check_filter(name, value, (*others, *kwargs.values()))
            return self.counted(function(*((first,) * passed), value, *others, **kwargs))

        return limited


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

    def __repr__(self) -> str:
        return "<Namespace>"


@pass_environment
def _tojson(
    environment: _Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes of HTML that Jinja's own filter makes."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return (
        encoder.encode(value) if indent is None else environment.concat(encoder.iterencode(value))
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
    del environment.globals["lipsum"]
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
    environment.start()
    try:
        return str(environment.concat(template.generate(**variables)))
    except jinja2.TemplateError as error:
        raise Failure(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise Failure(f"it needs too much memory ({type(error).__name__})") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
