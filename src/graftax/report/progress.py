"""A progress bar on stderr, where stderr is a terminal; else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graftax.plans import Plan


@contextmanager
def progress_bar(plan: Plan) -> Iterator[Callable[[int], None]]:
    """What to call with the bytes that were written; a bar shows their sum, the rate and what time is left."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(spec.nbytes for spec in plan.like.specs.values())
    columns = (TextColumn("porting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("porting", total=total)
        yield lambda count: progress.advance(task, count)
