"""What the matching tests share: pairs built from a few lines, the zoo where it is at hand, and a judge."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from graftax.match import infer
from graftax.match.bare_rules import merged
from graftax.ops import Rearrange, apply_chain, same_bits
from graftax.plans import Proposal
from graftax.rules import RuleOutcome, apply_rules, load_rules
from graftax.tree import Checkpoint, Storage, TensorSpec

ROOT = Path(__file__).resolve().parents[2]
Line = tuple[Any, ...]


@pytest.fixture(scope="session")
def mutate(script: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/mutate_names.py as a module."""
    return script("mutate_names")


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    """scripts/benchmarks/matching.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("benchmarks.matching")


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of model pairs beside the repository; the test is skipped where it is not there."""
    folder = ROOT.parent / "shared" / "zoo" / "cases"
    if not folder.is_dir():
        pytest.skip("the zoo of model pairs is not beside the repository (shared/zoo)")
    return folder


class Pairing:
    """A pair made from lines (torch key, Flax key, torch shape, pattern): distinct random values, the Flax side made by
    the pattern ('' is identity). `{a..b}` in keys counts. A list on either side is made by a function of arrays."""

    def __init__(self, lines: Iterable[Line], seed: int = 0) -> None:
        self.torch: dict[str, np.ndarray[Any, Any]] = {}
        self.flax: dict[str, np.ndarray[Any, Any]] = {}
        rng = np.random.default_rng(seed)
        for line in lines:
            for keys in _counted(line):
                self._add(keys, line[2], line[3] if len(line) > 3 else "", rng)

    def _add(self, keys: tuple[Any, Any], shape: Any, how: Any, rng: np.random.Generator) -> None:
        sources = [keys[0]] if isinstance(keys[0], str) else list(keys[0] or ())
        targets = [keys[1]] if isinstance(keys[1], str) else list(keys[1] or ())
        shapes = shape if isinstance(shape, list) else [shape] * len(sources)
        arrays = tuple(rng.standard_normal(s).astype("f4") for s in shapes)
        self.torch |= dict(zip(sources, arrays, strict=True))
        if callable(how):
            found = how(*arrays)
        else:
            name, _, sizes = how.partition("|")
            known = tuple(sorted((p.split("=")[0], int(p.split("=")[1])) for p in sizes.split()))
            found = Rearrange(name, known).apply(arrays) if name else arrays
        if targets:
            self.flax |= {k: np.ascontiguousarray(a).reshape(a.shape) for k, a in zip(targets, found, strict=True)}

    def ends(self, reverse: bool = False, config: dict[str, Any] | None = None) -> tuple[Checkpoint, Checkpoint]:
        torch, flax = _checkpoint(self.torch, "torch", config), _checkpoint(self.flax, "flax", None)
        return (flax, torch) if reverse else (torch, flax)

    def infer(
        self, rules: Any = None, reverse: bool = False, config: dict[str, Any] | None = None, **kw: Any
    ) -> Proposal:
        """The proposal, the rules' entries included."""
        source, like = self.ends(reverse, config)
        ruled = RuleOutcome(Proposal())
        if rules:
            ruled = apply_rules(load_rules(rules), source, like, source.side, like.side)
            assert not ruled.proposal.failures, ruled.proposal.failures
        found = infer(source, like, source.side, like.side, ruled.proposal, named=ruled.named, **kw)
        return merged(ruled.proposal, found, ruled.named)

    def judge(self, found: Proposal, reverse: bool = False) -> tuple[str, list[str]]:
        """('exact' | 'asks' | 'WRONG', the leaves that differ): asks where a leaf of like is open."""
        source, like = (self.flax, self.torch) if reverse else (self.torch, self.flax)
        filled: set[str] = set()
        wrong: list[str] = []
        for entry in found.entries:
            out = apply_chain(entry.ops, tuple(source[name] for name in entry.sources))
            for name, array in zip(entry.targets, out, strict=True):
                assert name not in filled, f"{name} is filled twice"
                filled.add(name)
                if not same_bits(np.ascontiguousarray(array).reshape(array.shape), like[name]):
                    wrong.append(f"{entry.sources} -> {name}: {entry.evidence}")
        if wrong:
            return "WRONG", wrong
        if len(filled) == len(like) and not found.questions:
            return "exact", []
        asked = {name for question in found.questions for name in question.targets}
        return "asks", sorted(set(like) - filled - asked)

    def settle(
        self, reverse: bool = False, config: dict[str, Any] | None = None, limit: int = 12
    ) -> tuple[str, int, int]:
        """Answer by suggested rules that are right, one at a time: (verdict, answers, questions first asked)."""
        rules: list[str] = []
        first = 0
        for turn in range(limit + 1):
            found = self.infer(_rules(rules), reverse, config)
            verdict, _ = self.judge(found, reverse)
            first = len(found.questions) if turn == 0 else first
            if verdict != "asks":
                return verdict, turn, first
            answer = self._right_answer(found, rules, reverse, config)
            if answer is None:
                return "no right answer", turn, first
            rules.append(answer)
        return "asks", limit, first

    def _right_answer(self, found: Proposal, rules: list[str], reverse: bool, config: Any) -> str | None:
        source, like = self.ends(reverse, config)
        for question in found.questions:
            for candidate in question.candidates:
                outcome = apply_rules(load_rules(_rules([candidate.rule])), source, like, source.side, like.side)
                ruled = outcome.proposal
                if not ruled.entries or ruled.failures:
                    continue
                bare = {item.entry for item in outcome.named if item.rule.bare}  # these do not say how
                said = Proposal(tuple(entry for entry in ruled.entries if entry not in bare))
                if self.judge(said, reverse)[0] != "WRONG" and self._same_values(ruled, reverse):
                    return candidate.rule
        return None

    def _same_values(self, ruled: Proposal, reverse: bool) -> bool:
        """The leaves that the rule pairs hold the same values, in whatever order."""
        source, like = (self.flax, self.torch) if reverse else (self.torch, self.flax)
        return all(
            np.array_equal(_sorted(source, entry.sources), _sorted(like, entry.targets)) for entry in ruled.entries
        )


def _sorted(end: dict[str, Any], names: Iterable[str]) -> Any:
    return np.sort(np.concatenate([end[name].ravel() for name in names]))


def _rules(lines: list[str]) -> str:
    return "rules = [\n" + "".join(f"{line},\n" for line in lines) + "]\n"


def _counted(line: Line) -> list[tuple[Any, Any]]:
    """The keys of a line for every number of its ranges `{0..3}`; a list of keys stays a list."""
    text = repr(line[:2])
    ranges = list(dict.fromkeys(re.findall(r"\{(\w+):(\d+)\.\.(\d+)\}", text)))
    out = [line[:2]]
    for name, first, last in ranges:
        grown: list[tuple[Any, Any]] = []
        for keys in out:
            for n in range(int(first), int(last) + 1):
                grown.append(_put(keys, f"{{{name}:{first}..{last}}}", f"{{{name}}}", n))
        out = grown
    return out


def _put(keys: Any, mark: str, short: str, n: int) -> Any:
    if isinstance(keys, str):
        text = keys.replace(mark, str(n)).replace(short, str(n))
        return re.sub(re.escape(short[:-1]) + r"\+(\d+)\}", lambda m: str(n + int(m[1])), text)
    return keys if keys is None else type(keys)(_put(k, mark, short, n) for k in keys)


def _checkpoint(arrays: dict[str, np.ndarray[Any, Any]], side: Any, config: dict[str, Any] | None) -> Checkpoint:
    specs = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in arrays.items()}
    return Checkpoint(side, side, specs, Storage(arrays.__getitem__), config=config)


@pytest.fixture(scope="session")
def pairing() -> Callable[..., Pairing]:
    return Pairing
