"""Planning grows about linearly with the number of tensors; the bounds leave room for a busy machine."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest

from graftax.match.planning import make_plan
from graftax.plans import PlanOptions
from graftax.tree import Checkpoint


def _plan(source: Checkpoint, like: Checkpoint) -> float:
    start = time.process_time()
    found = make_plan(source, like, PlanOptions())
    seconds = time.process_time() - start
    assert found.complete
    return seconds


def test_a_thousand_tensors_in_a_blink(bench: ModuleType) -> None:
    ends = bench.decoder(110)
    assert min(_plan(*ends) for _ in range(3)) < 0.25


def test_cost_grows_about_linearly(bench: ModuleType) -> None:
    small, large = bench.decoder(110), bench.decoder(1110)
    one = min(_plan(*small) for _ in range(3))
    ten = min(_plan(*large) for _ in range(2))
    assert ten < 30 * one


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts"), [(11110, 0), (130, 256)], ids=["deep", "experts"])
def test_a_hundred_thousand_tensors(bench: ModuleType, layers: int, experts: int) -> None:
    assert _plan(*bench.decoder(layers, experts)) < 15


def test_the_benchmark_of_a_size(bench: ModuleType, tmp_path: Path) -> None:
    from argparse import ArgumentParser

    from benchmarks.settings import Settings

    parser = ArgumentParser()
    bench.add_arguments(parser)
    [group] = bench.run(parser.parse_args(["--size", "deep 1,000"]), Settings(tmp_path, repeats=2, quiet=True))
    [row] = group.rows
    assert "1,002 tensors" in group.title
    assert row.ok
    assert len(row.samples) == 2
