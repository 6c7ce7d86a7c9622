"""Compare two checkpoints leaf by leaf: leaves that only one has, other shapes and dtypes, and how far values
differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftax.errors import escape
from graftax.ops import same_bits
from graftax.ops.base import count_same_bits
from graftax.report.inspecting import aligned
from graftax.tree import TensorSpec

Reader = Callable[[str], Any]


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
        return row | {"count": int(np.count_nonzero(x != y)), "max_abs": None, "relative": None}
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
    return "\n".join([*lines, counts])
