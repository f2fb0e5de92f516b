"""The command line as typed objects: options of a command, and changes to fields of a config."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import (
    AvoidSubcommands,
    FlagConversionOff,
    FlagCreatePairsOff,
    HelptextFromCommentsOff,
    Positional,
)
from tyro.constructors import PrimitiveConstructorSpec

from flax_transformers.config_json import FORMER_FIELDS
from flax_transformers.errors import UserError
from flax_transformers.ranges import Range, parse_integer, shown

PROGRAM = "flax-transformers"
_SENTENCES = (
    (r"^Missing from (.*?): (?:--\S+, )*(\S+).*", r"\2 is missing; see \1 --help"),
    (r"^Missing value for argument '(.*?)'.*", r"\1 has no value; give it one"),
    (
        r"^invalid choice '(.*)' for argument '(.*?)'\. Expected one of \((.*?),?\)\.?$",
        r"\2 is '\1'; it must be one of \3",
    ),
    (
        r"^Error parsing (--\S+): no type matching (.*) could be instantiated from \[(.*)\].*",
        r"\1 is \3; it must be \2",
    ),
    (
        r"^Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)",
        r"\1 is \2; it must be a whole number",
    ),
    (
        r"^Error parsing (--\S+): could not convert string to float: (.*)",
        r"\1 is \2; it must be a number",
    ),
    (r"^Error parsing [^:]*: (?=\S+ is )", ""),  # the message names the field itself
)
"""Patterns of tyro's messages, and what to say instead."""
_MARKERS = (AvoidSubcommands, HelptextFromCommentsOff)
T = TypeVar("T")


def option(metavar: str | None = None, help: str | None = None) -> Any:
    """The placeholder and the help of an option; a default of None is not shown."""
    return tyro.conf.arg(
        metavar=metavar,
        help=help,
        help_behavior_hint=lambda default: "" if default == "None" else f"(default: {default})",
    )


def number(option: str, allowed: Range) -> PrimitiveConstructorSpec[Any]:
    """A number of ``option`` that must be in a range; integers in ASCII digits."""

    def read(texts: list[str]) -> Any:
        try:
            value = parse_integer(texts[0]) if allowed.whole else float(texts[0])
        except ValueError:
            value = None
        fault = allowed.fault(value)
        if fault:
            given = shown(texts[0]) if value is None else texts[0]
            raise ValueError(f"{option} is {given}; {fault}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT" if allowed.whole else "FLOAT",
        instance_from_str=read,
        is_instance=lambda value: value is None or allowed.admits(value),
        str_from_instance=lambda value: [str(value)],
    )


Flag = FlagCreatePairsOff[bool]
"""An option without a value."""
Config = Positional[
    Annotated[str, option("CONFIG", "A recipe's name, such as bert_tiny, or a config file.")]
]
Model = Positional[
    Annotated[
        str,
        option(
            "MODEL",
            "A workdir or a checkpoint step, RUN/checkpoints/120 or RUN/checkpoints/best; or a "
            "Hugging Face directory, or an id, such as gpt2 or gpt2@REVISION.",
        ),
    ]
]
Architecture = Annotated[
    str | None,
    option(
        "CLASS",
        "Read a Hugging Face directory as this class, such as BertForMaskedLM (default: the class "
        "that the directory names).",
    ),
]


class UnknownOption(UserError):
    """An argument that no command and no field of the config takes."""

    def __init__(self, argument: str, known: Sequence[str] = ()) -> None:
        self.argument = argument
        self.known = list(known)
        super().__init__(self._sentence())

    def among(self, options: Sequence[str]) -> UnknownOption:
        """The same error with more ``options`` for the nearest name."""
        return UnknownOption(self.argument, [*options, *self.known])

    def _sentence(self) -> str:
        if not self.argument.startswith("--"):
            return (
                f"unexpected argument {self.argument!r}; give arguments without a name first, and "
                "set a config field with --section.field value"
            )
        name = self.argument.partition("=")[0].removeprefix("--").replace("_", "-")
        near = difflib.get_close_matches(name, self.known, 1, 0.4)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        return f"there is no option --{name}; {hint}"


def option_names(kind: type) -> list[str]:
    """Names of the options of a command's dataclass, without its positional arguments."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        field.name.replace("_", "-")
        for field in dataclasses.fields(kind)
        if not _is_positional(hints[field.name])
    ]


def _is_positional(hint: Any) -> bool:
    """Whether an annotated type is a positional argument."""
    return Positional in getattr(hint, "__metadata__", ())


def split(kind: type, tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of a command, and all others: options that it does not have, with their values."""
    known = {f"--{name}" for name in option_names(kind)} | {"--help"}
    own: list[str] = []
    others: list[str] = []
    current = own
    for token in tokens:
        if token == "-h":
            token = "--help"
        if token.startswith("--"):
            current = own if token.partition("=")[0].replace("_", "-") in known else others
        current.append(token)
    return own, others


def parse_arguments(kind: Any, tokens: Sequence[str], **settings: Any) -> Any:
    """``tyro.cli``. Raises UserError with one sentence for what it refuses; --help exits."""
    shows_help = "--help" in tokens
    with contextlib.nullcontext() if shows_help else _errors_as_sentences():
        return tyro.cli(kind, args=list(tokens), prog=PROGRAM, config=_MARKERS, **settings)


def show_help(name: str, kind: type, config: Any) -> None:
    """Prints the options of a command together with every field of a config.

    Raises UserError for a type of the config whose annotations cannot be evaluated.
    """
    _field_names(config)  # evaluates them all
    fields = [
        ("command", Annotated[kind, tyro.conf.arg(name="")]),
        ("config", Annotated[_concrete(config, option_names(kind)), tyro.conf.arg(name="")]),
    ]
    both = dataclasses.make_dataclass("both", fields)
    with contextlib.suppress(SystemExit):
        tyro.cli(
            both,
            args=["--help"],
            prog=f"{PROGRAM} {name}",
            description=kind.__doc__,
            config=_MARKERS,
        )


def override(config: T, overrides: Sequence[str]) -> T:
    """``config``, a dataclass of dataclasses, with ``--section.field value`` pairs applied.

    ``--section None`` removes a section that is optional. An option of data.validation_source that
    is None makes it a copy of data.source, as the other options leave that. Raises UserError for an
    unknown field (with the nearest name), for a value that does not fit, and for a type whose
    annotations cannot be evaluated.
    """
    config, overrides = _without_sections(config, overrides)
    others, overrides = _of_new_sections(config, overrides)
    if overrides:
        config = override(config, others)
        for token in overrides:
            config = _with_section(config, _path(token))
    overrides = overrides or others
    if not overrides:
        return config
    names = _field_names(config)
    overrides = [_current(token, names) for token in overrides]
    try:
        with _errors_as_sentences():
            parsed: Any
            parsed, unknown = tyro.cli(
                _concrete(config),
                args=list(overrides),
                prog=PROGRAM,
                config=_MARKERS,
                return_unknown_args=True,
            )
        values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed)}
        changed = type(config)(**values)
    except ValueError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UnknownOption(unknown[0], names)
    return changed


def _current(token: str, names: Sequence[str]) -> str:
    """An option by the current names of its fields, if only these are of ``names``."""
    option, equals, value = token.removeprefix("--").partition("=")
    if not token.startswith("--") or option.replace("_", "-") in names:
        return token
    path = [FORMER_FIELDS.get(name.replace("-", "_"), name) for name in option.split(".")]
    current = ".".join(path).replace("_", "-")
    return f"--{current}{equals}{value}" if current in names else token


def _without_sections(config: T, overrides: Sequence[str]) -> tuple[T, list[str]]:
    """``config`` with each section None that ``overrides`` set so, and the other overrides: tyro
    knows a section by its fields alone."""
    tokens, others = [part for token in overrides for part in _parts(token)], []
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--") and tokens[:1] == ["None"]:
            changed = without_section(config, token[2:].replace("-", "_").split("."))
            if changed is not None:
                config = changed
                del tokens[0]
                continue
        others.append(token)
    return config, others


def _parts(token: str) -> list[str]:
    """``--name=None`` as two tokens."""
    name, equals, value = token.partition("=")
    return [name, value] if name.startswith("--") and equals and value == "None" else [token]


def without_section(config: Any, path: Sequence[str]) -> Any:
    """``config`` with the section at ``path`` None, or without that entry of a tuple of sections;
    None if there is no such section."""
    name, *inner = path
    if isinstance(config, tuple | list) and name.isdecimal() and not inner:
        left = [one for i, one in enumerate(config) if i != int(name)]
        is_section = len(left) < len(config) and dataclasses.is_dataclass(config[int(name)])
        return type(config)(left) if is_section else None
    known = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    if name not in [field.name for field in known]:
        return None
    value: Any = getattr(config, name)
    if inner:
        value = without_section(value, inner)
        return None if value is None else dataclasses.replace(config, **{name: value})
    optional = type(None) in typing.get_args(_hints(type(config)).get(name))
    if not optional or not dataclasses.is_dataclass(value):
        return None
    return dataclasses.replace(config, **{name: None})


def _of_new_sections(config: Any, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The other ``overrides``, and those of sections that `_with_section` makes."""
    others: list[str] = []
    new: list[str] = []
    option = others
    for token in overrides:
        if token.startswith("--"):
            option = others if _with_section(config, _path(token)) is config else new
        option.append(token)
    return others, new


def _path(token: str) -> list[str]:
    """The names in ``--section.field``; none in a value."""
    return token[2:].partition("=")[0].replace("-", "_").split(".") if token[:2] == "--" else [""]


def _with_section(config: Any, path: Sequence[str]) -> Any:
    """``config`` with a copy of ``source`` as the ``validation_source`` above ``path`` that is
    None."""
    name, *inner = path
    value = getattr(config, name, None) if dataclasses.is_dataclass(config) else None
    if inner and value is None:
        value = _start_of(config, name)
    if not inner or value is None:
        return config
    changed = _with_section(value, inner)
    is_same = changed is getattr(config, name)
    return config if is_same else dataclasses.replace(config, **{name: changed})


def _start_of(config: Any, name: str) -> Any:
    """What the options of a section that is None change; None if it has no options."""
    is_held_out = name == "validation_source" and hasattr(config, name)
    return getattr(config, "source", None) if is_held_out else None


def refuse_arguments(overrides: Sequence[str]) -> None:
    """For commands without a config: raises UserError if there are other arguments."""
    if overrides:
        raise UnknownOption(overrides[0])


def _concrete(config: Any, hidden: Sequence[str] = ()) -> Any:
    """The config's type with every field typed as the value of ``config``, which is its default.

    The file chose the types of the model, the objective and the optimizer, so that the command line
    knows exactly their fields. It does not offer the ``hidden`` ones.
    """
    hints = _hints(type(config))
    fields = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = tuple(value) if isinstance(value, list) else value  # a list cannot be a default
        kind: Any = type(value) if dataclasses.is_dataclass(value) else hints[field.name]
        if field.name in hidden:
            kind = Annotated[kind, tyro.conf.Suppress, tyro.conf.Fixed]
        fields.append((field.name, kind, dataclasses.field(default=value)))
    made = dataclasses.make_dataclass(
        type(config).__name__, fields, bases=(type(config),), frozen=True, kw_only=True
    )
    made.__doc__ = type(config).__doc__
    return FlagConversionOff[made]  # type: ignore[misc,valid-type]


def _hints(kind: type) -> dict[str, Any]:
    """The evaluated annotations of a type of the config, which may be the user's own."""
    try:
        return typing.get_type_hints(kind)
    except Exception as error:  # an annotation is any expression
        raise UserError(
            f"the annotations of {kind.__qualname__} in module {kind.__module__} cannot be "
            f"evaluated ({error}), so that it has no options; import what they name outside of "
            "`if TYPE_CHECKING:`"
        ) from error


def _field_names(value: Any, path: str = "") -> list[str]:
    """Option names of all fields that are no dataclasses themselves, nor sections that are None."""
    items: list[tuple[str, Any]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        items = [
            (f.name.replace("_", "-"), found)
            for f in dataclasses.fields(value)
            if (found := getattr(value, f.name)) is not None
            or (found := _start_of(value, f.name)) is not None
            or not any(map(dataclasses.is_dataclass, typing.get_args(hints[f.name])))
        ]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return [path]
    return [n for key, item in items for n in _field_names(item, f"{path}.{key}" if path else key)]


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Raises UserError for what tyro would print in a panel before it exits with 2."""
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that no sentence is wrapped
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit:
        raise UserError(_sentence(printed.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _sentence(panel: str) -> str:
    """The text of tyro's panel between its title and the rule that follows, as one sentence."""
    lines = [line.strip(" │╭╮╰╯") for line in panel.splitlines()][1:]
    if lines and not lines[0].strip("-─"):
        del lines[0]
    rules = [i for i, line in enumerate(lines) if not line.strip("-─")]
    text = " ".join(lines[: rules[0]] if rules else lines).strip()
    for pattern, sentence in _SENTENCES:
        text = re.sub(pattern, sentence, text, flags=re.DOTALL)
    return text.rstrip(".") or "the command line does not fit; see --help"
