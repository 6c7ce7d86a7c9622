"""The values of surgery as options of a command, said once for `replace` (one value) and `ablate` (several).

A row of VALUES is a flag that says what to put into a leaf; a row of DETAILS goes with some of them. A new value is one
row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from graftax.errors import UsageError, escape, flag


@dataclass(frozen=True, slots=True)
class Detail:
    """An option that goes with some values, such as `--seed`: it is an argument of what makes them.

    name  the parameter of the command
    kind  how its word is read; bool: it takes no word
    help  its line of help
    read  the word -> the argument
    """

    name: str
    kind: type
    help: str
    read: Callable[[Any], Any] = lambda word: word

    @property
    def flag(self) -> str:
        return flag(self.name.rstrip("_"))


@dataclass(frozen=True, slots=True)
class ValueFlag(Detail):
    """A flag such as `--quantized BITS`.

    details  the names of the details that it takes
    needs    those of them without which it is refused, with the reason
    maker    the function of `surgery.values` that takes the word and the details; "": the one of the flag's name
    """

    details: tuple[str, ...] = ()
    needs: Mapping[str, str] | None = None
    maker: str = ""

    def make(self, word: Any, given: Mapping[str, Any]) -> Any:
        """The value of a word, and of the details among the words `given` to the command."""
        from graftax.surgery import values

        words = () if self.kind is bool else (self.read(word),)
        details = {
            row.name: row.read(given[row.name])
            for row in DETAILS
            if row.name in self.details and _words(given.get(row.name))
        }
        return getattr(values, self.maker or self.name)(*words, **details)


def _axes(text: str) -> tuple[int, ...]:
    """`-1` or `0,2`; `()` for none. UsageError for anything else."""
    try:
        return () if text == "()" else tuple(int(axis) for axis in text.split(","))
    except ValueError:
        raise UsageError(
            f"--axis {escape(text)!r} is no axis: write -1, several as 0,2, or '()' for one scale in all"
        ) from None


def _number(text: str) -> int | float:
    """An integer where the text is one (int64 beyond 2^53 keeps its value), else a float. UsageError for neither."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"--constant {escape(text)!r} is not a number")


_DRAWN = {"seed": "so that the draw can be repeated"}

VALUES: tuple[ValueFlag, ...] = (
    ValueFlag("constant", str, "Every value becomes this.", _number),
    ValueFlag("zeros", bool, "Every value becomes zero."),
    ValueFlag(
        "normal",
        float,
        "Every value is drawn from a normal distribution of this standard deviation (needs --seed).",
        details=("seed",),
        needs=_DRAWN,
    ),
    ValueFlag(
        "add_normal",
        float,
        "Normal noise of this standard deviation is added to every value (needs --seed).",
        details=("seed", "relative"),
        needs=_DRAWN,
    ),
    ValueFlag("scaled", float, "Every value is multiplied by this."),
    ValueFlag("mean", bool, "Every value becomes the mean of its leaf."),
    ValueFlag(
        "rounded",
        str,
        "Every value is rounded to this narrower dtype and back, such as float8_e4m3fn.",
    ),
    ValueFlag(
        "quantized",
        int,
        "Every value is rounded to this many bits, symmetric, with a scale for each output channel; the dtype stays.",
        details=("axis", "group"),
    ),
    ValueFlag(
        "from_",
        str,
        "Another checkpoint to take the values from.",
        details=("key", "layout", "cast"),
        maker="from_checkpoint",
    ),
)

DETAILS: tuple[Detail, ...] = (
    Detail("seed", int, "The seed of the draws; each leaf draws from (seed, path)."),
    Detail("relative", bool, "Times the standard deviation of the leaf."),
    Detail(
        "axis",
        str,
        "The axes that keep a scale of their own in --quantized, such as -1 or 0,2 (default: output channels, as the "
        "model or a name that leaves no doubt tells).",
        _axes,
    ),
    Detail("group", int, "So many input channels share a scale in --quantized (default: all)."),
    Detail("key", str, "The name of the tensor in that checkpoint."),
    Detail(
        "layout",
        str,
        "How the donor is stored, if its shape does not tell: linear, conv, identity, or a layout that the error "
        "message offers.",
    ),
    Detail("cast", bool, "Round a floating tensor of that checkpoint to the dtype of the leaf."),
)


def value_parameters(several: bool = False) -> list[inspect.Parameter]:
    """The parameters of a command that takes values. several: each flag may be given more than once."""
    made = [_parameter(row, row.kind is not bool and several) for row in VALUES]
    return made + [_parameter(row, False) for row in DETAILS]


def _parameter(row: Detail, several: bool) -> inspect.Parameter:
    about = Parameter(name=row.flag, negative="", help=row.help)
    if row.kind is bool:
        default, kind = False, bool
    else:
        default, kind = None, (list[row.kind] if several else row.kind) | None
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about]
    )


def values_given(given: Mapping[str, Any], several: bool = False) -> list[Any]:
    """The values that a command was given, in the order of VALUES: exactly one, or one at least where it takes
    `several`. UsageError if none was given, if a detail goes with none of them, or if one lacks a detail."""
    rows = [(row, word) for row in VALUES for word in _words(given.get(row.name))]
    names = [row.flag for row, _ in rows]
    if not rows or (len(rows) > 1 and not several):
        known = ", ".join(row.flag for row in VALUES)
        count = "at least" if several else "exactly"
        raise UsageError(f"say what to put there: {count} one of {known}; got {', '.join(names) or 'none'}")
    for detail in DETAILS:
        takers = [row.flag for row in VALUES if detail.name in row.details]
        word = given.get(detail.name)
        if word is not None and word is not False and not set(takers) & set(names):
            raise UsageError(f"{detail.flag} goes with {' or '.join(takers)}, not with {', '.join(names)}")
    for row, _ in rows:
        for name, why in (row.needs or {}).items():
            if given.get(name) is None:
                raise UsageError(f"{row.flag} needs {flag(name)}, {why}")
    return [row.make(word, given) for row, word in rows]


def _words(word: Any) -> Iterable[Any]:
    """Each word that a flag was given."""
    if word is None or word is False:
        return ()
    return word if isinstance(word, list) else (word,)
