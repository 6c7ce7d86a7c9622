"""What was measured, as a table, as JSON and (plot.py) as a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Group, Row

PACKAGES = ("graftax", "numpy", "safetensors", "jax", "flax", "torch")


def seconds_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def bytes_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def ratio_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def show(groups: Sequence[Group]) -> None:
    """A table for each group, fastest first, and below it what did not run."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for group in groups:
        table = Table(title=group.title, title_justify="left", box=None, pad_edge=False)
        memory = any(row.median("anonymous") is not None for row in group.rows)
        table.add_column("", no_wrap=True)
        for name in ("median", "least", "ratio", "of least", *(("anonymous", "at start") if memory else ())):
            table.add_column(name, justify="right", no_wrap=True)
        for row in ordered(group):
            if not row.samples:
                continue
            cells = [seconds_text(row.median()), seconds_text(row.minimum())]
            cells += [ratio_text(group.ratio(row)), ratio_text(group.ratio(row, "minimum"))]
            if memory:
                cells += [bytes_text(row.maximum("anonymous")), bytes_text(row.maximum("before"))]
            name = f"{row.name} (baseline)" if row.name == group.baseline else row.name
            table.add_row(name, *cells, style="bold" if row.required else None)
        console.print(table)
        for row in ordered(group):
            if row.wrong or row.not_run:
                console.print(f"{row.name}: {state(row)}", markup=False, highlight=False)
        console.print()


def ordered(group: Group) -> list[Row]:
    return sorted(group.rows, key=lambda row: (row.median() is None, row.median() or 0.0))


def state(row: Row) -> str:
    """Why there are no figures; nothing where there are."""
    return f"WRONG: {row.wrong}" if row.wrong else f"not run: {row.not_run}" if row.not_run else ""


def about(load: Sequence[Any]) -> dict[str, Any]:
    """The machine, the versions, and how busy it was before and after each group."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "load": list(load),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_json(group: Group) -> dict[str, Any]:
    """A group with every run of every contender."""
    return {
        "title": group.title,
        "baseline": group.baseline,
        "bytes": group.nbytes,
        "facts": group.facts,
        "rows": [
            {
                "name": row.name,
                "ok": row.ok,
                "median": row.median(),
                "minimum": row.minimum(),
                "ratio": group.ratio(row),
                "ratio_of_minima": group.ratio(row, "minimum"),
                "not_run": row.not_run,
                "wrong": row.wrong,
                "runs": [asdict(sample) for sample in row.samples],
            }
            for row in ordered(group)
        ],
    }
