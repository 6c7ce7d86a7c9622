"""Faults put into correct ports one at a time: the layer that graftax names first, and the cause. A sample runs with
the fast tests; the whole catalogue, and every correct port with three seeds, are slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from .faults.base import Fault
from .faults.catalogue import HELD_OUT, LEAST, all_faults, catalogue, kinds
from .faults.runner import Verdict, check, check_correct, correct_ports, judge, score, summary
from .zoo import KINDS, port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fault_injection.py"
LAYER, CAUSE, WRONG = 0.99, 0.95, 0.01
"""What must hold of the whole catalogue: right layer first, right cause, and (less than) a wrong one named."""


# ---------------------------------------------------------------- the catalogue


def test_the_catalogue_is_large_enough() -> None:
    chosen = catalogue(0)
    assert len(chosen) >= 300
    assert {kind: count for kind, count in kinds(chosen).items() if count < LEAST} == {}


def test_no_fault_is_counted_twice() -> None:
    for faults in (all_faults(), catalogue(0), catalogue(1)):
        names = Counter((f.kind, f.model, f.api, f.text) for f in faults)
        assert [name for name, count in names.items() if count > 1] == []


def test_a_catalogue_is_made_by_its_seed() -> None:
    assert [str(f) for f in catalogue(3)] == [str(f) for f in catalogue(3)]
    assert [str(f) for f in catalogue(3)] != [str(f) for f in catalogue(4)]


# ---------------------------------------------------------------- a sample


def sample() -> list[Fault]:
    """One fault of every third kind, of a model that was developed on, where one has the kind: APIs in turn."""
    picked: dict[str, Fault] = {}
    used: Counter[tuple[str, str]] = Counter()
    pool = catalogue(0)
    for kind in list(kinds(pool))[::3]:
        mine = [f for f in pool if f.kind == kind]
        mine = [f for f in mine if (f.model, f.api) not in HELD_OUT] or mine
        picked[kind] = min(mine, key=lambda f: (used[f.model, f.api], str(f)))
        used[picked[kind].model, picked[kind].api] += 1
    return sorted(picked.values(), key=lambda f: (f.model, f.api))


@pytest.mark.parametrize("fault", sample(), ids=str)
def test_a_fault_is_found_where_it_is(fault: Fault) -> None:
    verdict = judge(fault)
    assert verdict.layer, str(verdict)
    assert not verdict.wrong_cause, str(verdict)


@pytest.mark.parametrize("which", [(name, ("linen", "nnx")[i % 2], 0) for i, name in enumerate(KINDS)], ids=str)
def test_a_correct_port_raises_no_alarm(which: tuple[str, str, int]) -> None:
    assert check_correct(which, seed=0) is None


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_one_ulp_of_one_value_is_found(api: str) -> None:
    """No forward run can show it: the audit of the weights does."""

    def edit(arrays: dict[str, np.ndarray], torch: object) -> dict[str, np.ndarray]:
        path = next(path for path in arrays if path.endswith("kernel"))
        changed = arrays[path].copy()
        changed[0, 0] = np.nextafter(changed[0, 0], np.float32(np.inf))
        return {**arrays, path: changed}

    report = check(port(KINDS["mlp"], KINDS["mlp"].settings, api, seed=0, edit=edit))
    assert not report.ok
    assert [(row.differing, row.largest_ulp) for row in report.weights] == [(1, 1.0)]


# ---------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_whole_catalogue(tmp_path: Path) -> None:
    verdicts = run_script(tmp_path / "verdicts.json", "--seed", "0")
    print(summary(verdicts))
    counts = score(verdicts)
    assert counts.total >= 300
    assert counts.layer >= LAYER * counts.total, str(counts)
    assert counts.cause >= CAUSE * counts.total, str(counts)
    assert counts.wrong < WRONG * counts.total, str(counts)


@pytest.mark.slow
def test_no_false_alarm_on_any_correct_port() -> None:
    assert len(correct_ports()) >= 100
    done = subprocess.run([sys.executable, SCRIPT, "--correct", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert ": 0 false alarms" in done.stdout


def run_script(out: Path, *options: str) -> list[Verdict]:
    """The script in processes of its own, as a user runs it."""
    done = subprocess.run([sys.executable, SCRIPT, "--json", out, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Verdict(**row) for row in json.loads(out.read_text(encoding="utf-8"))]
