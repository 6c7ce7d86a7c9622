"""The options of plans and of writing as options of a command: built from the fields that the library defines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, TypeVar, get_args

from cyclopts import Parameter

from graftax.errors import flag
from graftax.plans.options import choices, field_types

Command = TypeVar("Command", bound=Callable[..., Any])
Options = TypeVar("Options")


def flags(**behind: type | Sequence[inspect.Parameter]) -> Callable[[Command], Command]:
    """For a command of `**options`: behind each parameter that is named, the fields of PlanOptions or WriteOptions, or
    further parameters. The command gets those that were given; `options_given` reads the fields."""

    def named(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            parameters.append(parameter)
            if parameter.name in behind:
                more = behind[parameter.name]
                parameters += _parameters(more) if isinstance(more, type) else more
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return named


def options_given(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of one `kind` among those that a command got."""
    values: dict[str, Any] = {}
    for f in fields(kind):  # pyright: ignore[reportArgumentType]
        if (name := _name(f)) in given:
            values[f.name] = not given[name] if f.default is True else given[name]
    return kind(**values)


def option_names(kind: type) -> list[str]:
    """The parameters of a command that set the fields of `kind`."""
    return [_name(f) for f in fields(kind)]


def _name(option: Field[Any]) -> str:
    """The parameter of the command: what is True by default is turned off, with --no-NAME."""
    return f"no_{option.name}" if option.default is True else option.name


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    types = field_types(kind)
    for f in fields(kind):
        default = False if f.default is True else f.default
        word = _word(types[f.name])
        about = Parameter(name=flag(_name(f)), negative="", help=_help(f.metadata["help"]))
        yield inspect.Parameter(
            _name(f),
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[word | None if default is None else word, about],
        )


def _word(kind: Any) -> Any:
    """What a word of the command line is read as: a choice, a flag, a number, or text."""
    if words := choices(kind):
        return Literal[words]
    parts = get_args(kind) or (kind,)
    return next((plain for plain in (str, bool, int, float) if plain in parts), str)


def _help(text: str) -> str:
    """A help line in the words of the command line: `like` is LIKE."""
    return re.sub(r"`(\w+)`", lambda found: found[1].upper(), text)
