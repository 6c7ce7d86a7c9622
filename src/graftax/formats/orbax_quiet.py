"""Orbax run so that it ends when it fails: nothing of it still writes, or speaks, once its error has been raised.

Orbax writes each group of arrays in a thread of its own with an event loop of its own, and leaves both at the first
error: what it had begun goes on writing into a folder that is being removed, and tells a closed loop of it. So its
loops finish what they have begun before they close, and its threads are waited for.
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
    """Runs what calls Orbax, in a thread of its own: where the caller's has a running event loop (a notebook), Orbax
    cannot save. Raises what `action` raises, once all that Orbax began has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # handed on below
            raised.append(error)

    with _quiet(), _loops_that_finish():
        others = set(threading.enumerate())
        thread = threading.Thread(target=run, name="graftax-orbax")
        thread.start()
        try:
            thread.join()
        finally:  # also where Ctrl-C comes meanwhile
            thread.join()
            for other in set(threading.enumerate()) - others:
                if type(other).__module__.partition(".")[0] == "orbax":
                    threading.Thread.join(other)  # Orbax's own would raise
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
    """Orbax asks asyncio for its loops; only the policy can choose which it gets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of policies, from Python 3.14 on
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_Policy())
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that Orbax logs of its own settings; errors are raised, and are told by their exception."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
