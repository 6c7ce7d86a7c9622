"""Benchmarks: one module a command of scripts/bench.py, each with `add_arguments(parser)` and `run(args) -> dict`."""
