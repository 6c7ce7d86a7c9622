"""Compare two checkpoints leaf by leaf: leaves that only one has, other shapes and dtypes, and how far values
differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from graftax.api import host_arrays, make_plan, open_both
from graftax.errors import UsageError, escape, option
from graftax.execute.opening import open_all, open_weights
from graftax.ops import same_bits
from graftax.ops.base import count_same_bits
from graftax.plans import Plan, PlanOptions
from graftax.report.inspecting import aligned
from graftax.tree import Checkpoint, Side, TensorSpec, dtypes

Reader = Callable[[str], Any]
_SHOWN = 12
"""How many names of what is not compared the text shows."""


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """One leaf that differs.

    what      "values", "spec" (shape or dtype), "only_in_a" or "only_in_b"
    a, b      the specs where they differ
    count, of how many of its values differ (by bits, or beyond the tolerance), and how many there are
    max_abs   the largest |a - b|; None for packed leaves and where it is not finite
    relative  the norm of a - b by that of b; None where there is none
    """

    path: str
    what: str
    a: str | None = None
    b: str | None = None
    count: int | None = None
    of: int | None = None
    max_abs: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Diff:
    """The differences of two checkpoints or live trees. It prints as `graftax diff` does. It has no truth value: say
    `.equal`.

    labels  what A and B are called
    hint    the next step where A and B are of different sides
    """

    data: Mapping[str, Any]
    labels: tuple[str, str]
    hint: str = ""

    @property
    def equal(self) -> bool:
        """Both have the same leaves, equal in shape, dtype and every bit, or within the tolerance. What the text lists
        as not compared does not count."""
        return self.data["equal"]

    @property
    def rows(self) -> tuple[DifferenceRow, ...]:
        """The leaves that differ, then those that only A has, then those that only B has."""
        alone = [DifferenceRow(path, what) for what in ("only_in_a", "only_in_b") for path in self.data[what]]
        return (*(DifferenceRow(**row) for row in self.data["differ"]), *alone)

    def as_json(self) -> dict[str, Any]:
        """The result of `graftax diff --json`."""
        return dict(self.data)

    def __bool__(self) -> NoReturn:
        raise TypeError("a Diff has no truth value, as it might mean either: say diff.equal, or not diff.equal")

    def __str__(self) -> str:
        return "\n".join([comparison_text(self.data), *([self.hint] if self.hint else [])])

    __repr__ = __str__


def diff(
    a: Any,
    b: Any,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    like: Any = None,
    source_side: Side | None = None,
    to: Side | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> Diff:
    """Compare two checkpoints or live trees leaf by leaf, as `graftax diff` does.

    a, b         whatever `inspect` takes; b is the one that differences are relative to
    plan, like   a plan (or its file), or the tree, that the weights of `a` are ported by to b's side first; the weights
                 of `b` are then compared
    source_side  whether `a` is torch or Flax, if it does not say so itself; `to`: `like` and `b`
    atol, rtol   with either, values agree where |a - b| <= atol + rtol |b|; without, every bit counts

    Raises PlanError where the plan is incomplete, UsageError for a tree without values, the errors of reading.
    """
    if plan is not None and like is not None:
        raise UsageError(f"give {option('plan')} or {option('like')}, not both")
    ported = plan is not None or like is not None
    made = plan if plan is None or isinstance(plan, Plan) else Plan.load(Path(plan))
    if made is not None:
        source_side, to = made.source.side, made.like.side
    first, second = open_both(a, b, source_side, to, open_weights if ported else open_all)
    assert second is not None
    for checkpoint in (first, second):
        if not checkpoint.has_values:
            raise UsageError(f"{escape(checkpoint.label)} has no values to compare")
    specs, read = first.specs, first.read
    if ported:
        target = None if like is None else open_weights(like, side=to)
        made = made or make_plan(first, target, PlanOptions(source_side=source_side, to=to))
        made.require_complete(_rules_for_diff(a, b, like))
        arrays, _ = host_arrays(made, first, target)
        specs, read = made.like.specs, arrays.__getitem__
    data = comparison(specs, read, second.specs, second.read, atol, rtol)
    data["not_compared"] = list(dict.fromkeys([*_left_out(first), *_left_out(second)]))
    mixed = not ported and not data["equal"] and {first.side, second.side} == {"torch", "flax"}
    how = f"give {option('like', b if isinstance(b, str) else '')} or {option('plan')}"
    hint = f"A is {first.side} and B is {second.side}: {how}." if mixed else ""
    return Diff(data, (first.label, second.label), hint)


def _left_out(checkpoint: Checkpoint) -> list[str]:
    """What stands beside the leaves that are compared: an optimizer's state, run metadata."""
    beside = lambda name: not any(path == name or path.startswith(f"{name}/") for path in checkpoint.specs)  # noqa: E731
    return [name for name in checkpoint.left if beside(name)]


def _rules_for_diff(a: Any, b: Any, like: Any) -> str:
    """The next step if diff's own plan is incomplete: diff takes no rules."""
    if like is None:
        return ""
    if not all(isinstance(end, str) for end in (a, b, like)):
        return "diff takes no rules: plan = gx.plan(a, like, rules=...), then gx.diff(a, b, plan=plan)."
    steps = f"graftax plan {a} --like {like} --rules R.toml -o plan.json, then graftax diff {a} {b} --plan plan.json"
    return f"diff takes no rules: {escape(steps, 600)} (plan --suggest R.toml writes what is open as rules)."


def comparison(
    a: Mapping[str, TensorSpec],
    read_a: Reader,
    b: Mapping[str, TensorSpec],
    read_b: Reader,
    atol: float | None = None,
    rtol: float | None = None,
) -> dict[str, Any]:
    """The differences as JSON data. Without atol and rtol every bit counts; with either, |a - b| <= atol + rtol |b|."""
    rows: list[dict[str, Any]] = []
    for path in b:
        if path not in a:
            continue
        if a[path] != b[path]:
            rows.append({"path": path, "what": "spec", "a": str(a[path]), "b": str(b[path])})
            continue
        row = _values(path, read_a(path), read_b(path), a[path], atol, rtol)
        if row is not None:
            rows.append(row)
    only_a, only_b = [p for p in a if p not in b], [p for p in b if p not in a]
    return {
        "equal": not rows and not only_a and not only_b,
        "compared": sum(path in a for path in b),
        "differ": rows,
        "only_in_a": only_a,
        "only_in_b": only_b,
    }


def _values(
    path: str, x: Any, y: Any, spec: TensorSpec, atol: float | None, rtol: float | None
) -> dict[str, Any] | None:
    if same_bits(x, y):
        return None
    import numpy as np

    row: dict[str, Any] = {"path": path, "what": "values", "of": spec.size}
    if spec.packed:
        apart = dtypes.unpack(x, spec).view(np.uint8) != dtypes.unpack(y, spec).view(np.uint8)
        return row | {"count": int(np.count_nonzero(apart)), "max_abs": None, "relative": None}
    wide = np.complex128 if spec.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        p, q = np.asarray(x).astype(wide), np.asarray(y).astype(wide)
        same = (p == q) | (np.isnan(p) & np.isnan(q))
        gap = np.where(same, 0.0, np.abs(p - q))
        if atol is not None or rtol is not None:
            within = same | (gap <= (atol or 0.0) + (rtol or 0.0) * np.abs(q))
            if within.all():
                return None
            same = within
        norm = float(np.linalg.norm(q.reshape(-1)))
        worst, total = float(gap.max(initial=0.0)), float(np.linalg.norm(gap.reshape(-1)))
    count = int(np.count_nonzero(~same)) or int(spec.size - count_same_bits(x, y))
    return row | {
        "count": count,
        "max_abs": worst if np.isfinite(worst) else None,
        "relative": total / norm if norm and np.isfinite(total / norm) else None,
    }


def comparison_text(data: Mapping[str, Any]) -> str:
    """The same as text: one row per difference, then the counts."""
    rows: list[tuple[str, ...]] = []
    for row in data["differ"]:
        if row["what"] == "spec":
            rows.append((escape(row["path"]), row["a"], row["b"]))
        else:
            worst = "-" if row["max_abs"] is None else f"max |a-b| {row['max_abs']:.3g}"
            share = "" if row["relative"] is None else f"relative {row['relative']:.3g}"
            rows.append((escape(row["path"]), f"{row['count']} of {row['of']} values differ", worst, share))
    lines = aligned(rows)
    lines += [f"  {escape(path)}  only in A" for path in data["only_in_a"]]
    lines += [f"  {escape(path)}  only in B" for path in data["only_in_b"]]
    same = data["compared"] - len(data["differ"])
    counts = f"{same} leaves equal, {len(data['differ'])} differ"
    if data["only_in_a"] or data["only_in_b"]:
        counts += f", {len(data['only_in_a'])} only in A, {len(data['only_in_b'])} only in B"
    left = data.get("not_compared", [])
    more = f" and {len(left) - _SHOWN} more (--json)" if len(left) > _SHOWN else ""
    return "\n".join(
        [*lines, counts, *([f"not compared: {', '.join(map(escape, left[:_SHOWN]))}{more}"] if left else [])]
    )
