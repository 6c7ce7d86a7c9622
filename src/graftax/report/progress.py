"""A progress bar on stderr, where stderr is a terminal; else nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from graftax.plans import Plan


def with_progress(tensors: Iterator[tuple[str, Any]], plan: Plan) -> Iterator[tuple[str, Any]]:
    """The same tensors; a bar counts their bytes."""
    if not sys.stderr.isatty():
        yield from tensors
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(spec.nbytes for spec in plan.like.specs.values())
    columns = (TextColumn("porting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("porting", total=total)
        for name, array in tensors:
            yield name, array
            progress.advance(task, array.nbytes)
