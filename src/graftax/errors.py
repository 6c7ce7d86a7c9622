"""Errors: one base class, an exit code on each, every failure listed, text that is safe to print.

A message says which key, what was expected, what was found and what to do next. All failures of one operation are
collected in `.failures` and raised once; the printed message shows the first few and where the rest is.
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

MESSAGE_LIMIT = 2000  # bytes of a printed message
_SHOWN = 5  # failures shown in a message
_NAME_LIMIT = 160  # characters of one name in a message


def escape(text: object, limit: int = _NAME_LIMIT) -> str:
    """A name from a file, safe for a terminal: control, bidirectional and surrogate characters as `\\x..`, long text
    cut in the middle."""
    out: list[str] = []
    try:
        raw = str(text)
    except RecursionError:  # a value nested too deeply to be shown
        raw = type(text).__name__
    if len(raw) > limit:
        raw = f"{raw[: limit // 2]}...{raw[-(limit // 2 - 3) :]}"
    if raw.isprintable():  # no character of the categories below: a hundred times faster
        return raw
    for char in raw:
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}:
            code = ord(char)
            out.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
        else:
            out.append(char)
    return "".join(out)


# ---------------------------------------------------------------- the caller's words

_command_line: ContextVar[bool] = ContextVar("graftax_command_line", default=False)


@contextmanager
def command_line_words() -> Generator[None]:
    """Inside this context messages name the options of the command line; outside it, those of the library."""
    token = _command_line.set(True)
    try:
        yield
    finally:
        _command_line.reset(token)


def worded(command: str, library: str) -> str:
    """`command` inside `command_line_words`, else `library`: the text in the caller's own words."""
    return command if _command_line.get() else library


def option(name: str, value: str = "") -> str:
    """An option as the caller writes it: `--max-memory 64MiB`, or `max_memory="64MiB"`; without a value `--rules`, or
    `rules=`. `name` is the option's name in the library."""
    given = f" {shlex.quote(value)}" if value else ""
    return worded(f"{flag(name)}{given}", f'{name}="{value}"' if value else f"{name}=")


def flag(name: str) -> str:
    """The command line's name of an option of the library."""
    return "--from" if name == "source_side" else f"--{name.replace('_', '-')}"


def counted(number: int, noun: str) -> str:
    """`1 misfit`, `3 misfits`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def some(things: Sequence[object], shown: int = 3) -> str:
    """The first of these things as text: `a, b, c and 4 more`."""
    more = f" and {len(things) - shown} more" if len(things) > shown else ""
    return ", ".join(map(str, things[:shown])) + more


def with_article(word: str) -> str:
    """`word` with its article: 'a float', 'an int', 'an nnx module'."""
    spoken = word.lower()
    return f"{'an' if spoken.startswith((*'aeio', 'un', 'nnx', 'nd')) else 'a'} {word}"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure: what is wrong, where (file, key), what was expected, what was found, and the next step."""

    what: str
    file: str = ""
    key: str = ""
    expected: str = ""
    found: str = ""
    next: str = ""

    def __str__(self) -> str:
        head = escape(self.key) if self.key else ""
        text = f"{head}: {self.what}" if head else self.what
        if self.expected or self.found:
            ends = (("expected", self.expected), ("found", self.found))
            text += f" ({', '.join(f'{word} {end}' for word, end in ends if end)})"
        return f"{text}\n    {self.next}" if self.next else text

    def as_json(self) -> dict[str, str]:
        return {
            "what": self.what,
            "file": self.file,
            "key": self.key,
            "expected": self.expected,
            "found": self.found,
            "next": self.next,
        }


def clip(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """`text` cut to `limit` bytes of UTF-8, at the end of a line if possible, with a mark where it was cut."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    mark = "\n  ... (cut)"
    cut = raw[: limit - len(mark)].decode("utf-8", "ignore")
    head, newline, _ = cut.rpartition("\n")
    return (head if newline and len(head) > limit // 2 else cut) + mark


class GraftaxError(Exception):
    """Base of every error graftax raises on purpose. `exit_code` is what the command line returns for it.

    `failures` holds one `Failure` each; `questions` the open questions of a plan, if that is what stopped it.
    """

    exit_code: ClassVar[int] = 70
    failures: tuple[Failure, ...]
    questions: tuple[Any, ...]

    def __init__(
        self,
        message: str,
        failures: Iterable[Failure] = (),
        questions: Sequence[Any] = (),
        next: str = "",
    ) -> None:
        self.failures = tuple(failures)
        self.questions = tuple(questions)
        lines = [message]
        lines += [f"  {failure}" for failure in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            rest = len(self.failures) - _SHOWN
            lines.append(f"  ... and {rest} more (all of them: {worded('--json', '.failures of the exception')})")
        if next:
            lines.append(next)
        super().__init__(clip("\n".join(lines)))


class PlanError(GraftaxError):
    """A plan is incomplete, ambiguous or does not fit; or a selector or `expect` does not match the tree."""

    exit_code = 1


class MissingKeyError(PlanError, KeyError):
    """A checkpoint has no tensor of that name. It is a KeyError too, because a checkpoint is a mapping."""

    __str__ = Exception.__str__  # a KeyError shows its message quoted


class DifferenceError(PlanError):
    """Two checkpoints differ."""


class LayoutError(PlanError):
    """An op or a layer cannot turn these shapes or settings into those."""


class ParityError(GraftaxError, AssertionError):
    """Flax output and torch output differ by more than float32 explains. `report` is the whole ParityReport; the
    message shows its beginning."""

    exit_code = 1
    report: Any = None


class ModelError(GraftaxError):
    """The user's own model failed: an exception inside forward, an input it cannot take, a layer left in train mode.
    The message names the code that failed: framework, module path, file and line. Exit code 70."""


class ReplayError(GraftaxError):
    """One module of a model cannot be run alone."""


class UsageError(GraftaxError):
    """The call itself is wrong: an option, a selector's syntax, a factory that cannot be imported."""

    exit_code = 2


class RulesError(UsageError):
    """A rules file or a plan file is not well formed; the message names the line."""


class FormatError(GraftaxError):
    """Bad input: malformed, truncated, inconsistent, of an unknown format or dtype."""

    exit_code = 3


class UnsafeInputError(GraftaxError):
    """Input that would run code, leaves its folder, or passes a limit."""

    exit_code = 4


class StorageError(GraftaxError):
    """Missing, unreadable, changed while read, disk full, or a destination that is refused."""

    exit_code = 5


SEVERITY = (4, 3, 5)  # of several exit codes the first one here wins, then the largest
"""Order in which exit codes of several failures are reported (4 > 3 > 5)."""
