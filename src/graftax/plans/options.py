"""The options of a plan, and of writing what it makes: one definition for the library and the command line.

To add an option of `plan`, `port`, `port_file` and `load_into`, write a field of `PlanOptions`, and its name and type
in `PlanKeywords`: a type checker cannot unpack a dataclass into keywords, and a test compares the two. The public
functions and the commands then take it, `help` and `--help` show it, and a word that is not one of its choices is
refused.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from graftax.errors import UsageError, escape
from graftax.tree import Side, nearest

Missing = Literal["error", "keep", "zeros"]
Unused = Literal["error", "drop"]
Overflow = Literal["error", "saturate"]
Dtype = Literal[
    "source", "like", "float16", "bfloat16", "float32", "float64",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
Size = int | str
"""Bytes, or text such as "512MiB" or "5GB"."""


def _help(text: str) -> dict[str, str]:
    """One help line for the library and the command line: a parameter stands in backticks."""
    return {"help": text}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a plan is made. rules to overflow may be given by position, in this order; what is added is a keyword."""

    rules: Any = field(default=None, metadata=_help("A rules file (TOML) for what inference cannot know."))
    missing: Missing = field(
        default="error",
        metadata=_help(
            "What to do with missing keys (leaves of `like` that no source tensor fills): an error, keep `like`'s own "
            "value, or zeros."
        ),
    )
    unused: Unused = field(
        default="error",
        metadata=_help(
            "What to do with unexpected keys (source tensors that no leaf of `like` takes): an error, or drop them."
        ),
    )
    dtype: Dtype | Mapping[str, Dtype] | None = field(
        default=None,
        metadata=_help("source, like, or a dtype's name. Without it a floating dtype that differs is an error."),
    )
    source_side: Side | None = field(
        default=None,
        kw_only=True,
        metadata=_help("Whether `source` is torch or Flax, if it does not say so itself."),
    )
    to: Side | None = field(
        default=None,
        metadata=_help("Whether `like`, or what is written, is torch or Flax, if `like` does not say so itself."),
    )
    overflow: Overflow = field(
        default="error",
        metadata=_help(
            "What to do when a cast meets a value too large for its dtype: an error, or its largest finite value."
        ),
    )

    inputs: Any = field(
        default=None,
        kw_only=True,
        metadata=_help(
            "One input of both models: running them then decides and proves the plan. Without it an example that "
            "`like` brings is used; False switches that off."
        ),
    )
    source_model: Any = field(
        default=None, kw_only=True, metadata=_help("The live model of a `source` that is a file, for `inputs`.")
    )
    layout: str | None = field(
        default=None,
        kw_only=True,
        metadata=_help("How Flax's inputs lie if `inputs` are as torch takes them, such as 'NCHW -> NHWC'."),
    )

    def check(self) -> None:
        """UsageError where a value is not one of its choices."""
        for name, kind in field_types(PlanOptions).items():
            value: Any = getattr(self, name)
            words, parts = choices(kind), get_args(kind)
            if not words or (value is None and NoneType in parts):
                continue
            given: list[Any] = [value]
            if isinstance(value, Mapping) and any(get_origin(part) is Mapping for part in parts):
                given = list(cast("Mapping[str, Any]", value).values())
            for word in given:
                if not isinstance(word, str) or word not in words:
                    raise UsageError(f"{name}={escape(word)!r} is not one of {', '.join(words)}")


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanOptions` as keywords."""

    rules: Any
    missing: Missing
    unused: Unused
    dtype: Dtype | Mapping[str, Dtype] | None
    source_side: Side | None
    to: Side | None
    overflow: Overflow
    inputs: Any
    source_model: Any
    layout: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How the result of a plan is written. The help of a field that is True by default says what False does."""

    format: str | None = field(
        default=None, metadata=_help("The format to write, instead of the one that the ending of `out` picks.")
    )
    max_memory: Size = field(
        default="512MiB",
        metadata=_help(
            "Use at most this much memory while writing .safetensors, .pt, .msgpack and .npz, however large a tensor "
            "is; Orbax needs each tensor whole."
        ),
    )
    shard_size: Size | None = field(default=None, metadata=_help("The size of a shard, such as 5GB; needs a folder."))
    resume: bool = field(
        default=False,
        metadata=_help(
            "Keep what was made if the run is stopped, and go on from what a stopped run with the same arguments left. "
            "All formats but Orbax, which starts anew. The source must be in files."
        ),
    )
    clobber: bool = field(default=True, metadata=_help("Refuse an `out` that exists."))


class WriteKeywords(TypedDict, total=False):
    """The fields of `WriteOptions` as keywords."""

    format: str | None
    max_memory: Size
    shard_size: Size | None
    resume: bool
    clobber: bool


class PlanAndWriteKeywords(PlanKeywords, WriteKeywords, total=False):
    """All of them."""


# ---------------------------------------------------------------- what a field says of itself


def field_types(kind: type) -> dict[str, Any]:
    """name -> type of the fields of PlanOptions or WriteOptions."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def choices(kind: Any) -> tuple[str, ...]:
    """The words of the Literal in a type; none where any value will do."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((words for part in get_args(kind) if (words := choices(part))), ())


# ---------------------------------------------------------------- functions that take options

Function = TypeVar("Function", bound=Callable[..., Any])
Options = TypeVar("Options")


def takes(*kinds: type) -> Callable[[Function], Function]:
    """For a function of `*positional, **options`: its signature, its annotations and its docstring name the fields of
    `kinds`. The function itself reads them with `options_of`."""

    def named(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        types = {name: kind for options in kinds for name, kind in field_types(options).items()}
        added = [
            p.replace(annotation=types[p.name]) for kind in kinds for p in inspect.signature(kind).parameters.values()
        ]
        parameters = sorted((*own, *added), key=lambda parameter: parameter.kind)
        function.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
        function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
        if function.__doc__ is not None:  # python -OO has none
            function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{_help_lines(kinds)}"
        return function

    return named


def _help_lines(kinds: Sequence[type]) -> str:
    """name  help, for each option."""
    rows: dict[str, str] = {}
    for kind in kinds:
        types = field_types(kind)
        for f in fields(kind):
            words = ", ".join(f'"{word}"' for word in choices(types[f.name]))
            rows[f"{f.name}=False" if f.default is True else f.name] = f.metadata["help"] + f" {words}." * bool(words)
    width = max(map(len, rows)) + 2
    return "\n".join(
        textwrap.fill(text, 116, initial_indent=name.ljust(width), subsequent_indent=" " * width)
        for name, text in rows.items()
    )


def options_of(
    function: Callable[..., Any], kind: type[Options], positional: Sequence[Any], keywords: Mapping[str, Any]
) -> Options:
    """The options of one `kind` among what `function`, which `takes` them, was called with. TypeError as Python raises
    it: a keyword that the function does not have, a value given twice, too many of them."""
    known = inspect.signature(function).parameters
    for name in keywords:
        if name not in known:
            near = nearest(name, known, 1)
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument {name!r}"
                + (f". Did you mean {near!r}?" if near else "")
            )
    own = {f.name: keywords[f.name] for f in fields(kind) if f.name in keywords}  # pyright: ignore[reportArgumentType]
    most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in known.values())
    by_position = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(kind).parameters.values())
    if len(positional) > by_position:
        given = most - by_position + len(positional)
        raise TypeError(f"{function.__name__}() takes at most {most} positional arguments but {given} were given")
    try:
        inspect.signature(kind).bind(*positional, **own)
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None
    return kind(*positional, **own)
