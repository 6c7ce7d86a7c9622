#!/usr/bin/env python3
"""Keep what graftax plans and names today; after a change, say what it plans and names otherwise.

    python scripts/gates.py keep BEFORE.json.gz [--zoo FOLDER ...] [--pairs FOLDER] [--mutations 1000]
                                                [--tests WORDS] [--faults PER_KIND] [--cost]
    python scripts/gates.py compare BEFORE.json.gz AFTER.json.gz [-v]

Kept are sources, ops and targets of every plan, its questions with the rule lines that they offer, and what does not
fit: not the words of the evidence. --zoo: folders of cases (torch, like, like_torch, truth .safetensors), planned both
ways. --pairs: a folder of model pairs (p*.py with torch_model and flax_model), planned from a state_dict and live, both
ways. --mutations: of the cases of the first zoo (scripts/mutate_names.py). --tests: what the matching tests infer whose
names fit a pytest -k expression. --faults: the confusion table of scripts/fault_injection.py. --cost: seconds of
planning.

compare exits 1 where a plan or a count of the table differs; cost is printed, not judged.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
_SHOWN = 12  # differences of a plan that are printed

Plans = dict[str, dict[str, Any]]


# ---------------------------------------------------------------- what is kept of a plan


def kept(plan: Any) -> dict[str, Any]:
    """Of a Plan or a Proposal: entries, questions and misfits, in an order of their own."""
    from graftax.ops import chain_text

    entries = [f"{', '.join(e.sources)} -> {', '.join(e.targets)}: {chain_text(e.ops)}" for e in plan.entries]
    questions = [
        f"{', '.join(q.targets)} <- {', '.join(q.sources)}: " + " | ".join(c.rule for c in q.candidates)
        for q in plan.questions
    ]
    return {"entries": sorted(entries), "questions": sorted(questions), "misfits": sorted(f.key for f in plan.failures)}


def planned(make: Callable[[], Any]) -> dict[str, Any]:
    """What is kept of the plan that `make` gives; the kind of error where it raises one."""
    from graftax.errors import GraftaxError

    try:
        return kept(make())
    except GraftaxError as error:
        return {"error": type(error).__name__}


# ---------------------------------------------------------------- where plans come from


def of_zoo(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import graftax as gx

    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        for way, source, like in (("", "torch", "like"), (" back", "truth", "like_torch")):
            ends = [str(case / f"{name}.safetensors") for name in (source, like)]
            yield f"{folder.parent.name}/{case.name}{way}", planned(lambda ends=ends: gx.plan(*ends))


def of_pairs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import jax
    from flax import nnx

    import graftax as gx

    sys.path.insert(0, str(folder))
    for path in sorted(folder.glob("p[0-9]*.py")):
        module = importlib.import_module(path.stem)
        net = module.torch_model()
        model, example = module.flax_model()
        if isinstance(model, nnx.Module):
            live, abstract = model, nnx.eval_shape(lambda module=module: module.flax_model()[0])
        else:
            live, abstract = gx.linen(model, *example), jax.eval_shape(model.init, jax.random.key(0), *example)
        for name, source, like in (
            ("file", net.state_dict(), abstract),
            ("half live", net.state_dict(), live),
            ("live", net, live),
            ("file back", abstract, net.state_dict()),
            ("live back", live, net),
        ):
            yield f"{path.stem} {name}", planned(lambda source=source, like=like: gx.plan(source, like))


def of_mutations(folder: Path | None, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    from mutate_names import KINDS, load_cases, mutations
    from mutations.judging import solve

    for number, (kind, case) in enumerate(mutations(load_cases(folder), list(KINDS), count, seed=0)):
        yield f"{number:05} {kind} {case.name}", planned(lambda case=case: solve(case))


class _Recorder:
    """A pytest plugin: what every test infers."""

    def __init__(self) -> None:
        self.plans: Plans = {}
        self._test = ""
        self._infer: Any = None

    def pytest_configure(self) -> None:
        import graftax.api  # everything that plans
        import graftax.match

        self._infer = graftax.match.infer
        for name, module in list(sys.modules.items()):
            if name.startswith("graftax") and getattr(module, "infer", None) is self._infer:
                module.infer = self._recorded  # pyright: ignore[reportAttributeAccessIssue]

    def _recorded(self, *args: Any, **options: Any) -> Any:
        found = self._infer(*args, **options)
        number = sum(name.startswith(f"{self._test} ") for name in self.plans)
        self.plans[f"{self._test} {number}"] = kept(found)
        return found

    def pytest_runtest_setup(self, item: Any) -> None:
        self._test = item.nodeid.partition("::")[2]  # a file may be renamed


def of_tests(words: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pytest

    recorder = _Recorder()
    pytest.main(["-q", "--no-header", str(ROOT / "tests" / "match"), "-k", words], plugins=[recorder])
    yield from recorder.plans.items()


def of_faults(per_kind: int) -> dict[str, Any]:
    """The confusion table: kind -> what was named -> how often."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "faults.json"
        script = ROOT / "scripts" / "fault_injection.py"
        subprocess.run([sys.executable, script, "--per-kind", str(per_kind), "--json", out], check=True)
        verdicts = json.loads(out.read_text("utf-8"))
    table: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        layer = "layer" if verdict["layer"] else "no layer"
        table.setdefault(verdict["kind"], Counter())[f"{verdict['named']}, {layer}"] += 1
    return table


def of_cost() -> dict[str, Any]:
    """Seconds of the processor for a plan, by the number of tensors; the least of three runs."""
    from benchmarks.matching import _planned  # pyright: ignore[reportPrivateUsage]
    from benchmarks.models import SIZES

    return {name: min(_planned(*size, 3)["seconds"]) for name, size in SIZES.items()}


# ---------------------------------------------------------------- keeping and comparing


def keep(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(ROOT / "scripts"))
    plans: Plans = {}
    for zoo in args.zoo:
        plans.update(of_zoo(zoo))
    if args.pairs is not None:
        plans.update(of_pairs(args.pairs))
    if args.mutations:
        plans.update(of_mutations(args.zoo[0] if args.zoo else None, args.mutations))
    if args.tests:
        plans.update(of_tests(args.tests))
    found = {
        "plans": plans,
        "faults": of_faults(args.faults) if args.faults else {},
        "cost": of_cost() if args.cost else {},
    }
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        json.dump(found, file)
    print(f"{len(plans)} plans kept in {args.out}")


def compare(args: argparse.Namespace) -> int:
    before, after = (json.loads(gzip.decompress(path.read_bytes())) for path in (args.before, args.after))
    changed = list(differences(before["plans"], after["plans"], _SHOWN if args.verbose else 3))
    for name, lines in changed:
        print("\n  ".join([name, *lines]))
    tables = [data["faults"] for data in (before, after)]
    if tables[0] != tables[1]:
        print("the confusion table differs")
        for name in sorted({*tables[0], *tables[1]}):
            ends = [table.get(name) for table in tables]
            if ends[0] != ends[1]:
                print(f"  {name}: {json.dumps(ends[0])[:300]} -> {json.dumps(ends[1])[:300]}")
    for name, seconds in before["cost"].items():
        now = after["cost"].get(name)
        print(f"planning {name}: {seconds:.3f} s -> " + ("not measured" if now is None else f"{now:.3f} s"))
    print(f"{len(changed)} of {len(before['plans'])} plans differ")
    return int(bool(changed) or tables[0] != tables[1])


def differences(before: Plans, after: Plans, shown: int) -> Iterator[tuple[str, Sequence[str]]]:
    """(name of a plan, the lines that only one of the two has)."""
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            yield name, ["is gone" if new is None else "is new"]
            continue
        lines: list[str] = []
        for part in dict.fromkeys((*old, *new)):
            was, now = (set(_lines(plan.get(part))) for plan in (old, new))
            lines += [f"- {line[:240]}" for line in sorted(was - now)] + [
                f"+ {line[:240]}" for line in sorted(now - was)
            ]
        rest = len(lines) - shown
        yield name, lines[:shown] + ([f"... and {rest} more"] if rest > 0 else [])


def _lines(value: Any) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [str(value)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep")
    keeping.add_argument("out", type=Path)
    keeping.add_argument("--zoo", type=Path, nargs="*", default=[])
    keeping.add_argument("--pairs", type=Path)
    keeping.add_argument("--mutations", type=int, default=0)
    keeping.add_argument("--tests", default="", help="matching tests whose name holds this, as pytest -k takes it")
    keeping.add_argument("--faults", type=int, default=0, help="faults of each kind, model and API")
    keeping.add_argument("--cost", action="store_true")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args)
    keep(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
