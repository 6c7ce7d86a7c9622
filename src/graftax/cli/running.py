"""Run a command: print its Outcome, turn errors into exit codes, never show a traceback. Results go to stdout, messages
to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, UnusedCliTokensError

from graftax.cli.common import Outcome
from graftax.errors import GraftaxError, StorageError, UsageError, clip, escape

OK, INTERNAL, INTERRUPTED = 0, 70, 130


@dataclass(slots=True)
class _Answer:
    """What is printed in the end."""

    command: str
    exit: int = OK
    outcome: Outcome = field(default_factory=Outcome)
    message: str = ""
    errors: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def run(app: App, argv: Sequence[str]) -> int:
    """Run one command of `app`; prints the result and the message, gives the exit code."""
    as_json = "--json" in argv
    answer = _Answer(next((word for word in argv if not word.startswith("-")), ""))
    try:
        result = app(list(argv), exit_on_error=False, print_error=False)
        if not isinstance(result, Outcome):
            return OK  # help or version, printed already
        answer.outcome = result
        if result.error is not None:
            _take(answer, result.error)
    except CycloptsError as error:
        text = _too_many(error, answer.command) if isinstance(error, UnusedCliTokensError) else str(error)
        answer.exit, answer.message = UsageError.exit_code, f"{text}\nTry: graftax {_known(app, answer.command)}--help"
        answer.errors = [{"what": text}]
    except GraftaxError as error:
        _take(answer, error)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # raised by rich when the reader of help went away
            raise
        return OK
    except KeyboardInterrupt:
        answer.exit, answer.message = INTERRUPTED, "interrupted"
    except OSError as error:
        answer.exit, answer.message = 5, f"{escape(error.filename or '')}: {error.strerror or error}".lstrip(": ")
        answer.errors = [{"what": answer.message}]
    except Exception as error:
        where = _where(error)
        answer.exit = INTERNAL
        answer.message = (
            f"{type(error).__name__}: {escape(error, 600)}\n  in {where}\nThis is a bug in the code named above."
        )
        answer.errors = [{"what": answer.message}]
    try:
        _print(answer, as_json)
    except OSError as error:  # a full disk behind stdout
        answer.exit = answer.exit or StorageError.exit_code
        _write(sys.stderr, f"cannot print the result: {error.strerror or error}")
    return answer.exit


def _too_many(error: UnusedCliTokensError, command: str) -> str:
    """The message for arguments that the command does not take."""
    words = " ".join(escape(word) for word in error.unused_tokens or ())
    hint = (
        "; one SELECT is taken, and a glob such as '**/kernel' picks several leaves"
        if command in ("replace", "ablate")
        else ""
    )
    return f"{command} takes no more arguments: {words}{hint}"


def _known(app: App, command: str) -> str:
    """The command's name and a blank; '' if there is no such command."""
    return f"{command} " if command in app else ""


def _take(answer: _Answer, error: GraftaxError) -> None:
    answer.exit, answer.message = error.exit_code, f"{type(error).__name__}: {error}"
    answer.errors = [failure.as_json() for failure in error.failures] or [{"what": str(error)}]


def _where(error: BaseException) -> str:
    """Whose code failed: the innermost frame."""
    trace, name = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        name = f"{trace.tb_frame.f_globals.get('__name__', Path(code.co_filename).name)}.{code.co_name}"
        trace = trace.tb_next
    return escape(name)


def _print(answer: _Answer, as_json: bool) -> None:
    if as_json:
        document = {
            "schema": 1,
            "command": answer.command,
            "ok": answer.exit == OK,
            "exit": answer.exit,
            "result": answer.outcome.data,
            "errors": answer.errors,
        }
        _write(sys.stdout, json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif answer.outcome.text:
        _write(sys.stdout, answer.outcome.text)
    if answer.message:
        _write(sys.stderr, clip(answer.message))


def _write(stream: Any, text: str) -> None:
    """Write one line; characters that the stream's encoding lacks are escaped. Write nothing if the caller closed the
    stream. If the reader stops early (graftax diff ... | head), drop the rest: the exit code stays the same."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
