#!/usr/bin/env python3
"""Attack the matcher with pairs made by seed, so that a guess gives a wrong plan.

    python scripts/attack_plans.py [--count 1000] [--live 100] [--seed 0] [--kinds flat,ties] [-v]
    python scripts/attack_plans.py --show KIND:SEED [--smallest]

An attack is a torch state_dict and a Flax tree of other names, or two live models, with a known true map; nothing is
told. Verdicts: attacks/judging.py. Exit status 1 if a plan is WRONG, holds a wrong entry, or is wrong after true
answers.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from attacks import crossings, folded, layouts, parts
from attacks.judging import FAULTS, WORDS, Verdict, live_verdict, verdict
from attacks.pairs import Attack, Maker

__all__ = ["FILES", "Tally", "attack", "live_kinds", "main", "run", "show", "smallest"]

FILES = {kind.__name__: kind for group in (layouts, crossings, parts, folded) for kind in group.KINDS}
"""name -> what makes an attack from files."""


def live_kinds() -> dict[str, Any]:
    """name -> what makes an attack with live models."""
    groups = (importlib.import_module(f"attacks.{name}") for name in ("live_maps", "live_layers"))
    return {f"live_{kind.__name__}": kind for group in groups for kind in group.KINDS}


@dataclass(slots=True)
class Tally:
    """Verdicts by kind, and what first candidates lead to."""

    kinds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    firsts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list[str])

    def add(self, kind: str, name: str, found: Verdict) -> None:
        self.kinds[kind][found.word] += 1
        if found.first:
            self.firsts[kind][found.first] += 1
        if found.word in FAULTS:
            self.faults.append(f"{found.word}: {name}: {len(found.wrong)} leaves: {found.wrong[0]}")

    @property
    def total(self) -> Counter[str]:
        return sum(self.kinds.values(), Counter())


def attack(kind: str, seed: int) -> Any:
    """The attack of a kind that this seed gives, the same one each time: an Attack, or a Live one."""
    made = FILES.get(kind) or live_kinds()[kind]
    for again in range(100):
        maker = Maker(f"{kind}:{seed}:{again}")
        maker.top = "params/" if kind not in FILES else maker.top
        try:
            return made(maker)
        except AssertionError:  # two of its names met
            continue
    raise AssertionError(f"{kind}:{seed} gives no attack")


def judged(one: Any, answering: bool = True) -> Verdict:
    return verdict(one, answering) if isinstance(one, Attack) else live_verdict(one, answering)


def run(count: int, live: int, seed: int, kinds: str = "", answering: bool = True, verbose: bool = False) -> Tally:
    """The verdicts on `count` attacks from files and `live` attacks with live models, the kinds in turn."""
    tally = Tally()
    for known, number in ((FILES, count), (live_kinds() if live else {}, live)):
        names = [name for name in known if re.search(kinds, name)]
        for i in range(number if names else 0):
            kind = names[i % len(names)]
            tally.add(kind, f"{kind}:{seed + i}", judged(attack(kind, seed + i), answering))
            if verbose and tally.faults[-1:] and f"{kind}:{seed + i}:" in tally.faults[-1]:
                print(tally.faults[-1], flush=True)
    return tally


def smallest(one: Attack) -> Attack:
    """The attack from files without the leaves around it that its fault does not need."""
    found = verdict(one, answering=False).word
    again = True
    while again:
        again = False
        for names in _spare(one):
            less = replace(
                one,
                torch={name: array for name, array in one.torch.items() if name not in names},
                flax={name: array for name, array in one.flax.items() if name not in names},
            )
            if less.torch and less.flax and verdict(less, answering=False).word == found:
                one, again = less, True
                break
    return one


def _spare(one: Attack) -> Iterator[set[str]]:
    """The leaves around what is attacked, each with its values on both sides."""
    for name in (name for name in one.torch if name in one.spare):
        mine = sorted(one.torch[name].ravel().tolist())
        yield {name, *(path for path, leaf in one.flax.items() if sorted(leaf.ravel().tolist()) == mine)}


def show(one: Any) -> None:
    found = judged(one)
    files = one if isinstance(one, Attack) else one.attack
    way = "Flax to torch" if files.back else "torch to Flax"
    print(f"{files.kind}, {way}, options {files.options}: {found.word}, first candidates {found.first or '-'}")
    for side in (files.torch, files.flax):
        for name, array in side.items():
            print(f"    {name:60} {array.shape}{'   (nothing fills it)' if name in files.gone else ''}")
    for line in found.wrong:
        print("  wrong:", line)
    print(found.text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="attacks from files")
    parser.add_argument("--live", type=int, default=100, help="attacks with live models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="kinds whose name matches")
    parser.add_argument("--no-answers", action="store_true", help="do not answer the questions")
    parser.add_argument("--show", help="KIND:SEED: print one attack and its plan")
    parser.add_argument("--smallest", action="store_true", help="leave out what the fault does not need")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    if args.show:
        kind, _, number = args.show.partition(":")
        one = attack(kind, int(number))
        show(smallest(one) if args.smallest and isinstance(one, Attack) else one)
        return 0
    start = time.perf_counter()
    tally = run(args.count, args.live, args.seed, args.kinds, not args.no_answers, args.verbose)
    for kind, row in tally.kinds.items():
        shown = ", ".join(f"{word} {row[word]}" for word in WORDS if row[word])
        firsts = ", ".join(f"{word} {count}" for word, count in sorted(tally.firsts[kind].items()))
        print(f"{kind:24} {row.total():4}: {shown}{f'   (first candidates: {firsts})' if firsts else ''}")
    print(", ".join(f"{word} {tally.total[word]}" for word in WORDS), f"in {time.perf_counter() - start:.0f} s")
    print("first candidates:", dict(sum(tally.firsts.values(), Counter())))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
