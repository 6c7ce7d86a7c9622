"""Pairs without names: every module and parameter has a word that tells nothing, and running decides all the same."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .pairs import BY_NAME, PAIRS, Pair

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "blank_names.py"


@pytest.fixture(scope="module")
def blank(script: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/blank_names.py as a module."""
    return script("blank_names")


def settled(made: Any) -> None:
    plan = made.plan()
    assert plan.proof is not None, str(plan)[:1500]
    assert made.verdict(plan) == "exact", str(plan)[:1500]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_running_decides_without_names(blank: ModuleType, pair: Pair) -> None:
    settled(blank.BlankPair(pair, seed=1, buffers=False))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_names_of_buffers_are_not_read_either(blank: ModuleType, name: str) -> None:
    """A variance and a batch counter are known by their module, not by what they are called."""
    settled(blank.BlankPair(BY_NAME[name], seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("seed", range(2, 7))
def test_which_words_it_is_does_not_matter(blank: ModuleType, pair: Pair, seed: int) -> None:
    made = blank.BlankPair(pair, seed, buffers=False)
    assert made.verdict(made.plan()) == "exact"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_renamer_leaves_no_name_and_changes_no_value(blank: ModuleType, pair: Pair) -> None:
    made = blank.BlankPair(pair, seed=3)
    module = pair.torch_model()
    arrays = pair.inputs()
    np.testing.assert_array_equal(pair.torch_out(made.torch, arrays), pair.torch_out(module, arrays))
    old = {part for key in module.state_dict() for part in key.split(".")}
    assert not old & {part for key in made.torch.state_dict() for part in key.split(".")}
    assert not old & {part for key, _ in made.torch.named_modules() for part in key.split(".")}
    want = pair.true_map(pair.state(module))
    assert set(made.paths.values()) == set(want)
    words = {part for path in made.paths for part in path.split("/")} - {"params", "batch_stats"}
    assert not words & {part for path in want for part in path.split("/")}
    live = copy.deepcopy(made.torch).double()
    given = [torch.from_numpy(a).double() if a.dtype.kind == "f" else torch.from_numpy(a) for a in arrays]
    with torch.no_grad():
        assert live(*given).dtype == torch.float64


def test_a_verdict_can_be_wrong(blank: ModuleType) -> None:
    """The judge tells a crossed plan from a right one."""
    from dataclasses import replace

    made = blank.BlankPair(BY_NAME["block"], seed=1)
    plan = made.plan()
    new = {old: word for word, old in made.paths.items()}
    one, other = new["params/up/kernel"], new["params/down/kernel"]
    swap = {one: other, other: one}
    wrong = replace(
        plan, entries=tuple(replace(e, targets=tuple(swap.get(t, t) for t in e.targets)) for e in plan.entries)
    )
    assert made.verdict(plan) == "exact"
    assert made.verdict(wrong) == "WRONG"


def test_containers_are_reached_by_their_old_names(blank: ModuleType) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.named = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
            self.steps = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
            self.each = nn.ParameterList([torch.ones(2), torch.zeros(2)])
            self.register_buffer("late", torch.ones(2), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert len(self.rows) == 3
            assert list(self.named) == ["a", "b"]
            assert "a" in self.named
            for row in self.rows[1:]:
                x = row(x)
            for name, layer in self.named.items():
                x = layer(x) + len(name)
            return self.steps[:2](self.rows[-1](x)) + self.steps[-1](x) * self.late + self.each[0]

    module = Holder()
    made, keys = blank.blank_torch(module)
    x = torch.ones(1, 2)
    assert torch.equal(made(x), module(x))
    assert list(keys.values()) == list(module.state_dict())
    assert "late" not in {*keys, *(name for name, _ in made.named_buffers())}


def test_the_script_counts(tmp_path: Path) -> None:
    (tmp_path / "p01_small.py").write_text(
        "import numpy as np, torch, flax.linen as fn\n"
        "def torch_model():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)).eval()\n"
        "def flax_model():\n"
        "    return fn.Sequential([fn.Dense(4), fn.relu, fn.Dense(4)]), (np.zeros((1, 4), 'f4'),)\n"
        "def inputs(): return (np.random.default_rng(0).standard_normal((3, 4)).astype('f4'),)\n"
        "def true_map(sd):\n"
        "    rows = (('0', 'layers_0'), ('2', 'layers_2'))\n"
        "    both = (('weight', 'kernel'), ('bias', 'bias'))\n"
        "    return {f'params/{f}/{l}': sd[f'{t}.{k}'].T for t, f in rows for k, l in both}\n"
    )
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 settled exactly with blank names" in done.stdout
