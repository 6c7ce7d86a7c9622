"""Forward parity of every row of the layer table, torch against Linen and NNX, and back again."""

from __future__ import annotations

import numpy as np
import pytest

from graftax.layers import LAYERS, settled
from graftax.ops import same_bits

from .cases import CASES
from .harness import Run, carry, carry_back, disturbed, error_back, error_of, part, start, ways

SIDED = [
    pytest.param(case, api, id=f"{case.name} [{api}]")
    for case in CASES
    for api in ("linen", "nnx")
    if getattr(case, api) is not None
]


@pytest.mark.parametrize(("case", "api"), SIDED)
def test_parity(case, api):
    run = start(case, api)
    assert [c.variant for c in run.connections][:1] == [case.variant or run.connections[0].variant]
    connection = run.connection
    assert settled(run.connections) is connection, [(c.variant, c.by) for c in run.connections]
    assert connection.by in ("modules", case.by)
    flax = carry(connection, run.arrays)
    assert {path: leaf.shape for path, leaf in run.side.shapes.items()} == {p: a.shape for p, a in flax.items()}
    assert error_of(run, flax) <= case.alarm
    check_every_leaf_counts(run, flax)
    check_back(run, flax)
    check_from_files(run)


def check_every_leaf_counts(run: Run, flax: dict[str, np.ndarray]) -> None:
    """A leaf whose values sit in other places is noticed: parity above is worth something for each of them."""
    for path, array in flax.items():
        if not path.endswith(run.case.blind or ("\0",)):
            assert error_of(run, {**flax, path: disturbed(array)}) > 1000, path


def check_back(run: Run, flax: dict[str, np.ndarray]) -> None:
    back = carry_back(run.connection, flax)
    assert set(back) == set(run.arrays)
    if run.case.exact:
        dropped = {name for e in run.connection.entries if e.dropped for name in e.sources}
        for name in set(back) - dropped:
            assert same_bits(back[name], run.arrays[name]), name
    assert error_back(run, back) <= run.case.alarm


def check_from_files(run: Run) -> None:
    """Names and shapes alone: the same connection, or one among several, or nothing, as the case says."""
    if run.case.layout:
        return
    names = {name: name for name in run.arrays}
    torch_part = part("torch", run.arrays, names)
    flax_part = part("flax", {p: np.empty(s.shape, s.dtype) for p, s in run.side.shapes.items()}, run.side.roles())
    found = ways(run.case, torch_part, flax_part)
    live = [(e.sources, e.targets) for e in run.connection.entries]
    effects = [carry(c, run.arrays) for c in found if [(e.sources, e.targets) for e in c.entries] == live]
    want = carry(run.connection, run.arrays)
    same = [all(np.array_equal(effect[path], want[path]) for path in want) for effect in effects]
    if run.case.file == "first":
        assert same[:1] == [True]
    elif run.case.file == "among":
        assert True in same
        assert len(same) > 1
    else:
        assert True not in same


def test_every_row_has_a_case():
    covered = {case.layer for case in CASES if not case.rule}
    elsewhere = {"Bare parameter"}  # it has no module of its own
    assert {layer.name for layer in LAYERS} == covered | elsewhere
