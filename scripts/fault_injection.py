#!/usr/bin/env python3
"""Put faults into correct ports, one at a time, and count how many graftax names rightly.

    python scripts/fault_injection.py [--models mlp,cnn] [--apis linen] [--kinds epsilon,padding] [--seed 0]
                                      [--per-kind 2] [--jobs 2] [--correct SEEDS] [--json out.json] [-v]

Prints the confusion table (kinds x what was named), the totals, and the models kept out of development apart.
--correct 3: instead, every correct port with three seeds; a false alarm is printed. Exit status 1 if one is raised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Group = tuple[str, str]
"""Model and API: what one process works through, since its faults share compiled operations."""


def chosen(options: argparse.Namespace) -> list[Any]:
    from tests.parity.faults.catalogue import catalogue

    def asked(text: str | None, name: str) -> bool:
        return text is None or name in text.split(",")

    return [
        fault
        for fault in catalogue(options.seed, options.per_kind)
        if asked(options.models, fault.model) and asked(options.apis, fault.api) and asked(options.kinds, fault.kind)
    ]


def work(options: argparse.Namespace, group: Group) -> list[Any]:
    """All faults of one model and API."""
    from tests.parity.faults.runner import judge_all

    def say(verdict: Any) -> None:
        if options.verbose or not (verdict.layer and verdict.right_cause):
            print(f"  {verdict}", file=sys.stderr, flush=True)

    return judge_all([fault for fault in chosen(options) if (fault.model, fault.api) == group], say)


def work_correct(options: argparse.Namespace, group: Group) -> list[Any]:
    """The false alarms of one model and API."""
    from tests.parity.faults.runner import check_correct, correct_ports

    mine = [which for which in correct_ports() if which[:2] == group]
    alarms: list[Any] = []
    for seed in range(options.correct):
        for which in mine:
            alarm = check_correct(which, seed)
            if alarm is not None:
                print(f"  {alarm}", file=sys.stderr, flush=True)
                alarms.append(alarm)
    return [(options.correct * len(mine), alarms)]


def over_groups(options: argparse.Namespace, groups: list[Group], task: Any) -> Iterator[Any]:
    if options.jobs <= 1:
        for group in groups:
            yield from task(options, group)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(task, options, group) for group in groups]):
            yield from done.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models")
    parser.add_argument("--apis")
    parser.add_argument("--kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-kind", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--correct", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    from tests.parity.faults.runner import correct_ports, summary

    start = time.perf_counter()
    if options.correct:
        ports = [which for which in correct_ports() if options.models is None or which[0] in options.models.split(",")]
        ports = [which for which in ports if options.apis is None or which[1] in options.apis.split(",")]
        if not ports:
            parser.error("no port is chosen")
        counts = list(over_groups(options, list(dict.fromkeys(which[:2] for which in ports)), work_correct))
        alarms = [alarm for _, some in counts for alarm in some]
        for alarm in alarms:
            print(alarm)
        checked = sum(count for count, _ in counts)
        print(f"{len(ports)} correct ports x {options.correct} seeds = {checked} checks: {len(alarms)} false alarms")
        print(f"{time.perf_counter() - start:.0f} s")
        return 1 if alarms else 0
    faults = chosen(options)
    if not faults:
        parser.error("no fault is chosen")
    groups = list(dict.fromkeys((fault.model, fault.api) for fault in faults))
    verdicts = list(over_groups(options, groups, work))
    print(summary(verdicts))
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([verdict.as_json() for verdict in verdicts], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
