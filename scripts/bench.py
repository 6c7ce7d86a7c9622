#!/usr/bin/env python3
"""Benchmarks, one command each: python scripts/bench.py COMMAND [--json OUT.json]

    matching    what planning costs, by the number of tensors

A command is a module of scripts/benchmarks with add_arguments, run and show.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("matching",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: import_module(f"benchmarks.{name}") for name in COMMANDS}
    for name, module in modules.items():
        sub = commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0])
        sub.add_argument("--json", type=Path, help="write the numbers here, too")
        module.add_arguments(sub)
    args = parser.parse_args()
    result = modules[args.command].run(args)
    modules[args.command].show(result)
    if args.json:
        about = {"command": args.command, "python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({**about, **result}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
