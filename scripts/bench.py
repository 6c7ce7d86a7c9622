#!/usr/bin/env python3
"""Benchmarks: python scripts/bench.py COMMAND [--smoke] [--json OUT] [--svg OUT] [--repeats N]

    matching    what planning costs, by the number of tensors
    file        file to file, against cp
    load        into jax, against the naive script
    small       thousands of small tensors
    kernels     transposes, against memcpy
    sharded     shards, in one process and in several
    all         every one of them

Contenders run side by side, in an order drawn anew for every round; medians and minima, ratios to the baseline of the
same run; the values that each makes are compared with the truth. Exit status 1 where graftax or a baseline fails, or
any contender's values are wrong.

A command is a module of scripts/benchmarks: add_arguments(parser) for options of its own, and
run(args, settings) -> Groups, one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
COMMANDS = ("matching", "file", "load", "small", "kernels", "sharded")


def modules() -> dict[str, ModuleType]:
    """The commands that are there."""
    there = [name for name in COMMANDS if importlib.util.find_spec(f"benchmarks.{name}")]
    return {name: importlib.import_module(f"benchmarks.{name}") for name in there}


def main() -> int:
    from benchmarks import showing

    args, chosen = _arguments()
    groups: dict[str, list[Any]] = {}
    load: list[tuple[float, ...]] = [os.getloadavg()]
    with tempfile.TemporaryDirectory(prefix="graftax-bench-") as scratch:
        settings = _settings(args, Path(scratch))
        for name, module in chosen.items():
            groups[name] = []
            for group in module.run(args, settings):
                groups[name].append(group)
                load.append(os.getloadavg())
                showing.show([group])
                _write(args, groups, load)  # a run that is stopped has told what it found
    print(f"load {load[0][0]:.1f} before, {load[-1][0]:.1f} after, {os.cpu_count()} cores")
    every = [group for made in groups.values() for group in made]
    return 0 if all(row.ok for group in every for row in group.rows) else 1


def _write(args: argparse.Namespace, groups: dict[str, list[Any]], load: list[tuple[float, ...]]) -> None:
    """The files that --json and --svg ask for."""
    from benchmarks import plot, showing

    if args.json:
        found = {name: [showing.as_json(group) for group in made] for name, made in groups.items()}
        about = {"schema": 1, "smoke": args.smoke, "seed": args.seed, **showing.about(load)}
        args.json.write_text(json.dumps({**about, "commands": found}, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        args.svg.write_text(plot.svg([group for made in groups.values() for group in made]), encoding="utf-8")


def _arguments() -> tuple[argparse.Namespace, dict[str, ModuleType]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known = modules()
    for name, members in {**{name: [module] for name, module in known.items()}, "all": list(known.values())}.items():
        text = (members[0].__doc__ or "").partition("\n")[0] if name != "all" else "Every command."
        sub = commands.add_parser(name, help=text, conflict_handler="resolve")
        _add_common(sub)
        for module in members:
            module.add_arguments(sub)
    args = parser.parse_args()
    return args, known if args.command == "all" else {args.command: known[args.command]}


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round: does everything work?")
    parser.add_argument("--repeats", type=int, help="rounds (default: 5; 1 with --smoke)")
    parser.add_argument("--json", type=Path, help="write the figures of every run here")
    parser.add_argument("--svg", type=Path, help="write a picture here")
    parser.add_argument("--seed", type=int, default=0, help="of the values and of the order")
    parser.add_argument("--scale", type=float, default=1.0, help="how large, against the full size")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are, and stay (default: a temporary one)")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _settings(args: argparse.Namespace, scratch: Path) -> Any:
    from benchmarks.settings import Settings

    folder = (args.folder or scratch).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    repeats = args.repeats or (1 if args.smoke else 5)
    return Settings(folder, args.smoke, repeats, args.seed, args.scale, args.quiet)


if __name__ == "__main__":
    sys.exit(main())
