"""Inject faults one at a time, ask gx.check_parity, and count: right layer first, right cause, unknown, wrong."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import graftax as gx

from ..zoo import KINDS, Port, port
from .base import Fault
from .catalogue import HELD_OUT

UNKNOWN = "unknown"
SHOWN = 12
"""Faults that are nearest to the threshold are listed: what a looser floor would lose first."""
NO_MORE = "weights differ"
"""Said where weights were changed and no transform explains how: true, and no more than the audit says."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What graftax made of one fault. named: the cause that it puts first, 'unknown' where it names none; ratio: the
    error of the layer that it puts first, over float32's own."""

    kind: str
    model: str
    api: str
    text: str
    seed: int
    found: bool
    layer: bool
    first: str
    where: str
    named: str
    right_cause: bool
    seconds: float
    error: str = ""
    ratio: float = 0.0

    @property
    def wrong_cause(self) -> bool:
        return not self.right_cause and self.named != UNKNOWN

    @property
    def held_out(self) -> bool:
        return (self.model, self.api) in HELD_OUT

    def __str__(self) -> str:
        marks = "layer right" if self.layer else f"layer WRONG ({self.first or 'none'} {self.where})"
        cause = "cause right" if self.right_cause else f"cause {self.named}"
        fault = f"{self.kind}: {self.model} {self.api}, {self.text}, seed {self.seed}"
        return f"{fault}: {marks}, {cause} {self.error}".rstrip()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(made: Port, **options: Any) -> Any:
    """gx.check_parity of a port, called as its users call it."""
    inputs = gx.Inputs(torch=(made.batch.torch, {}), flax=(made.batch.flax, {}))
    return gx.check_parity(made.torch, made.like, inputs, made.weights, rules=made.rules, **options)


def judge(fault: Fault) -> Verdict:
    """One fault injected, checked, and compared with what is known of it. No exception escapes: it is a miss."""
    start = time.perf_counter()
    blank = Verdict(
        fault.kind, fault.model, fault.api, fault.text, fault.seed, False, False, "", "", UNKNOWN, False, 0.0
    )
    try:
        made = port(KINDS[fault.model], fault.right, fault.api, fault.seed, fault.wrong, fault.edit, fault.loud)
        verdict = read(fault, check(made), blank)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        verdict = _but(blank, error=f"{type(error).__name__} at {where}: {str(error)[:300]}")
    return _but(verdict, seconds=round(time.perf_counter() - start, 3))


def read(fault: Fault, report: Any, blank: Verdict) -> Verdict:
    """A report against a fault. What no forward run on these inputs shows has to stand in the settings check."""
    wrong = [row for row in report.settings if fault.by == "settings" or row.severity == "error"]
    if fault.by == "settings" or (report.first is None and report.ok and wrong):
        mine = [row for row in wrong if fault.by != "settings" or row.setting == fault.kind]
        named = mine[0].setting if mine else UNKNOWN
        first = mine[0].flax if mine else ""
        return _but(
            blank,
            found=bool(mine),
            layer=bool(mine) and fault.is_layer(first),
            first=first,
            where="settings",
            named=named,
            right_cause=named in fault.names,
        )
    named = report.causes[0].name if report.causes else UNKNOWN
    if named == NO_MORE and fault.edit is not None and fault.kind != NO_MORE:
        named = UNKNOWN
    path = "(none)" if report.first is None else report.first.site_flax.path
    if report.first is None and not report.ok:
        path = "(output)"
    return _but(
        blank,
        found=not report.ok,
        layer=fault.is_layer(path, report.where or ""),
        first=path or "(the model)",
        where=report.where or "",
        named=named,
        right_cause=named in fault.names,
        ratio=margin(report),
    )


def margin(report: Any) -> float:
    """How far the first layer that diverges, or else the worst output, is above float32's own error."""
    if report.first is None:
        return max((row.ratio for row in report.outputs), default=0.0)
    return (report.first.in_ratio if report.where == "in" else report.first.out_ratio) or 0.0


def _but(verdict: Verdict, **changes: Any) -> Verdict:
    return Verdict(**{**asdict(verdict), **changes})


def judge_all(faults: Iterable[Fault], seen: Callable[[Verdict], None] = lambda verdict: None) -> list[Verdict]:
    out: list[Verdict] = []
    for fault in faults:
        out.append(judge(fault))
        seen(out[-1])
    return out


# ---------------------------------------------------------------- correct ports


@dataclass(frozen=True, slots=True)
class Alarm:
    """A correct port that was not passed."""

    model: str
    api: str
    variant: int
    seed: int
    text: str


def correct_ports() -> list[tuple[str, str, int]]:
    """(model, API, place of the variant) of every correct port."""
    return [
        (name, api, place)
        for name, kind in KINDS.items()
        for api in ("linen", "nnx")
        for place in range(len(kind.variants()))
    ]


def check_correct(which: tuple[str, str, int], seed: int) -> Alarm | None:
    """None, or the false alarm: the port is not passed, a layer diverges, weights differ, or settings are an error."""
    name, api, place = which
    try:
        report = check(port(KINDS[name], KINDS[name].variants()[place], api, seed))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}: {str(error)[:300]}"
        return Alarm(name, api, place, seed, text)
    bad = [str(row.site_flax) for row in report.layers if row.status == "diverges"]
    lint = [f"{row.flax} {row.setting}" for row in report.settings if row.severity == "error"]
    if report.ok and report.first is None and not bad and not report.weights and not lint:
        return None
    said = {"layers": bad[:3], "weights": [row.path for row in report.weights[:3]], "settings": lint[:3]}
    return Alarm(name, api, place, seed, f"ok={report.ok} {said}")


# ---------------------------------------------------------------- counting


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over some verdicts."""

    total: int
    layer: int
    cause: int
    unknown: int
    wrong: int

    def __str__(self) -> str:
        def part(count: int) -> str:
            return f"{count} ({100 * count / max(self.total, 1):.1f} %)"

        return (
            f"{self.total} faults: right layer first {part(self.layer)}, right cause {part(self.cause)}, "
            f"unknown {part(self.unknown)}, wrong {part(self.wrong)}"
        )


def score(verdicts: Sequence[Verdict]) -> Score:
    return Score(
        len(verdicts),
        sum(v.layer for v in verdicts),
        sum(v.right_cause for v in verdicts),
        sum(not v.right_cause and v.named == UNKNOWN for v in verdicts),
        sum(v.wrong_cause for v in verdicts),
    )


def confusion(verdicts: Sequence[Verdict]) -> str:
    """One line a kind: how many, layers right, causes right, unknown, and every other name that was given."""
    width = max((len(v.kind) for v in verdicts), default=4)
    lines = [f"{'kind':{width}}  faults  layer  cause  unknown  named otherwise"]
    for kind in dict.fromkeys(v.kind for v in verdicts):
        mine = [v for v in verdicts if v.kind == kind]
        counts = score(mine)
        other = Counter(v.named for v in mine if v.wrong_cause)
        text = ", ".join(f"{name} {count}" for name, count in other.most_common())
        lines.append(
            f"{kind:{width}}  {counts.total:6}  {counts.layer:5}  {counts.cause:5}  {counts.unknown:7}  {text}".rstrip()
        )
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The confusion table, the totals, and the held-out models apart."""
    seen, held = [v for v in verdicts if not v.held_out], [v for v in verdicts if v.held_out]
    parts = [confusion(verdicts), f"all            {score(verdicts)}"]
    if seen and held:
        parts += [f"developed on   {score(seen)}", f"held out       {score(held)}"]
    weakest = sorted((v for v in verdicts if v.found and v.where in ("in", "out")), key=lambda v: v.ratio)[:SHOWN]
    parts += [f"the weakest of {len(verdicts)} (error over float32's own; alarm above 5):"] * bool(weakest)
    parts += [f"  {v.ratio:8.1f}  {v.kind}: {v.model} {v.api}, {v.text}, seed {v.seed}" for v in weakest]
    return "\n".join(parts)
