"""Run Orbax so that it stops when it fails: after its error is raised, none of its threads still writes or logs.

Orbax writes each group of arrays in its own thread with its own event loop, and leaves both at the first error. The
work it had started would continue to write into a folder that is being removed, and would report to a closed loop. So
here its loops finish their work before they close, and its threads are joined.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def finished(action: Callable[[], None]) -> None:
    """Run code that calls Orbax in a thread of its own: Orbax cannot save in a thread with a running event loop (a
    notebook). Raises what `action` raises, after everything that Orbax started has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # raised again below
            raised.append(error)

    with _quiet(), _loops_that_finish():
        others = set(threading.enumerate())
        thread = threading.Thread(target=run, name="graftax-orbax")
        thread.start()
        try:
            thread.join()
        finally:  # even if Ctrl-C arrives meanwhile
            thread.join()
            for other in set(threading.enumerate()) - others:
                if type(other).__module__.partition(".")[0] == "orbax":
                    threading.Thread.join(other)  # Orbax's own join would raise
    if raised:
        raise raised[0]


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes."""

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            while left := asyncio.all_tasks(self):
                self.run_until_complete(_all(left))
            self.run_until_complete(self.shutdown_default_executor())
        super().close()


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()


@contextmanager
def _loops_that_finish() -> Iterator[None]:
    """Make asyncio give Orbax loops that finish: only the policy can choose the loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # policies are deprecated from Python 3.14 on
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_Policy())
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings that Orbax logs about its own settings. Errors are raised and reported by their
    exception."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
