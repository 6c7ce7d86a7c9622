"""Runs of a stream that are stopped, or whose tiles are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftax.execute.streamed import Stream


class Stopped(Exception):
    """What stands for a kill: nothing catches it."""


def stop_after(tiles: int) -> Callable[..., Iterator[Any]]:
    """`Stream.tiles` that is stopped before the tile of that number."""
    inner, left = Stream.tiles, [tiles]

    def stopped(self: Stream, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for tile in inner(self, *args, **kwargs):
            if not left[0]:
                raise Stopped
            left[0] -= 1
            yield tile

    return stopped


def counting(made: list[int]) -> Callable[..., Iterator[Any]]:
    """`Stream.tiles` that adds to `made` for each tile."""
    inner = Stream.tiles

    def counted(self: Stream, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for tile in inner(self, *args, **kwargs):
            made.append(1)
            yield tile

    return counted


def tiles_handed_out(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> int:
    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "tiles", counting(made))
        run()
    return len(made)


def content(path: Path) -> dict[str, str]:
    """The hash of a file, or of every file in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
