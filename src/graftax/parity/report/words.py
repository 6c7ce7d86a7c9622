"""The words that the text and the HTML page share: numbers, sentences, the choice of rows to show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftax.errors import escape
from graftax.plans import text
from graftax.plans.names import fold_names

if TYPE_CHECKING:
    from graftax.parity.records import Site
    from graftax.parity.report.model import Cause, LayerRow, OutputRow, ParityReport, SettingRow

METRICS = {
    "max_abs": "max |a-b| {:.2g}",
    "top1": "top-1 agreement {:.2%}",
    "kl": "KL {:.2g}",
    "cosine": "cosine {:.7g}",
    "outside": "{:,.0f} values outside",
    "atol": "atol {:g}",
    "rtol": "rtol {:g}",
}
"""A metric's name in OutputRow -> its text in the report."""
SEVERITIES = ("error", "warning", "note")
_NUMBER = re.compile(r"[0-9]+")


# ---------------------------------------------------------------- numbers


def times(ratio: float | None) -> str:
    """A multiple of float32's own error: '1.3', '5,200', '8e+06', '∞'; '–' where nothing was compared."""
    if ratio is None:
        return "–"
    if math.isnan(ratio) or math.isinf(ratio):
        return "∞"
    if ratio < 9.95:
        return f"{ratio:.1f}" if ratio else "0"
    return f"{ratio:,.0f}" if ratio < 1e5 else f"{ratio:.0e}".replace("e+0", "e").replace("e+", "e")


def small(error: float | None) -> str:
    """A relative error: '3.1e-04', '0', 'NaN'; '–' where nothing was compared."""
    if error is None:
        return "–"
    if math.isnan(error):
        return "NaN"
    if math.isinf(error):
        return "∞"
    return "0" if error == 0 else f"{error:.1e}"


def count(number: int, what: str, many: str = "") -> str:
    """'1 layer', '1,204 layers'."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def metric_text(row: OutputRow) -> str:
    """'max |a-b| 4.2e-07, top-1 agreement 100%, KL 3.1e-14'; the row's own text if it could not be measured."""
    shown = [_metric(label, row.metrics[name]) for name, label in METRICS.items() if name in row.metrics]
    shown += [f"{escape(name)} {value:.4g}" for name, value in row.metrics.items() if name not in METRICS]
    return ", ".join([escape(row.text, 400)] * bool(row.text) + shown)


def _metric(label: str, value: float) -> str:
    if "%" in label and math.isfinite(value):
        value = math.floor(value * 1e4) / 1e4  # less than all is never 100%
    return re.sub(r"\.?0+%", "%", label.format(value))


def ulp_text(largest: float | None) -> str:
    """'3 ulp' for a small distance; '' for a large one, which says nothing: unrelated values are any distance apart."""
    return f"{largest:g} ulp" if largest is not None and largest <= 4096 else ""


# ---------------------------------------------------------------- names


def site_name(site: Site) -> str:
    """The module's path and, from the second on, which call of it; safe to print."""
    return escape(site, 400)


def shortened(path: str, room: int, separator: str) -> str:
    """The end of a path that is too long, cut at a separator if enough remains: '…layer.3.attention.output'."""
    if len(path) <= room:
        return path
    tail = path[-(room - 1) :]
    cut = tail.find(separator)
    numbered = any(char.isdigit() for char in tail[:cut])  # only its number tells a layer from its siblings
    return "…" + (tail[cut + 1 :] if 0 <= cut < room // 3 and not numbered else tail)


def output_name(path: str) -> str:
    """The place of an array in the output, safe to print."""
    return escape(path) if path else "(the output)"


def shape_text(shape: Sequence[int]) -> str:
    """'2×5×5', 'scalar'."""
    return "×".join(map(str, shape)) or "scalar"


def kind_text(row: LayerRow) -> str:
    return escape(row.kind or " / ".join(row.pair.kinds))


# ---------------------------------------------------------------- sentences


def worst_ratio(rows: Iterable[LayerRow]) -> float | None:
    """The largest ratio in or out of these rows; None where nothing was compared."""
    found = [ratio for row in rows for ratio in (row.in_ratio, row.out_ratio) if ratio is not None]
    return max(found, default=None)


def row_ratio(row: LayerRow) -> float:
    """The worst ratio of a row; -1 if it was not compared."""
    worst = worst_ratio([row])
    return -1.0 if worst is None else worst


def headline(report: ParityReport) -> str:
    """The verdict in a line."""
    torch, flax = escape(report.torch_name), escape(report.flax_name)
    if report.ok:
        return f"Parity holds: {torch} ({report.side}) and {flax} (Flax) agree."
    return f"Parity fails: {torch} ({report.side}) and {flax} (Flax) {_why(report)}."


def _misfit(row: OutputRow) -> bool:
    """An output that could not be compared: another shape, or missing on one side."""
    return bool(row.text) and not row.ok and not row.metrics and not math.isfinite(row.error)


def one_line(report: ParityReport) -> str:
    """The answer in a few words: 'parity fails at embeddings/LayerNorm (epsilon)'."""
    if report.ok:
        return "parity holds"
    if report.first is None:
        return f"parity fails: {summary(report)}"
    cause = f" ({escape(report.causes[0].name)})" if report.causes else ""
    before = "the code before " if report.where == "in" else ""
    return f"parity fails at {before}{site_name(report.first.site_flax)}{cause}"


def _why(report: ParityReport) -> str:
    if report.first is not None:
        return "diverge"
    if any(map(_misfit, report.outputs)):
        return "do not give the same outputs"
    if any(not row.ok for row in report.outputs):
        return "differ in their outputs"
    if report.weights:
        return "do not hold the same weights"
    return "do not agree in their settings" if report.settings else "differ"


def summary(report: ParityReport) -> str:
    """What was compared, and how it came out: the line under the verdict."""
    compared = [row for row in report.layers if row.status != "not compared"]
    bad = sum(row.status == "diverges" for row in compared)
    outside = sum(not row.ok for row in report.outputs)
    parts: list[str] = []
    if compared:
        parts.append(
            f"{bad} of {count(len(compared), 'layer call')} diverge{'s' * (bad == 1)}" if bad else _within(compared)
        )
    if report.outputs:
        parts.append(_of_outputs(outside, len(report.outputs)))
    if report.weights:
        leaves = count(len(report.weights), "leaf", "leaves")
        parts.append(f"{leaves} of weights differ{'s' * (len(report.weights) == 1)} in bits")
    return f"{'; '.join(parts) or 'Nothing was compared'} (alarm above {report.threshold:g}x)."


def _of_outputs(outside: int, number: int) -> str:
    if number == 1:
        return "the output differs" if outside else "the output agrees"
    return f"{outside} of {number} outputs differ{'s' * (outside == 1)}" if outside else f"{number} outputs agree"


def _within(compared: Sequence[LayerRow]) -> str:
    return f"{count(len(compared), 'layer call')} within {times(worst_ratio(compared))}x of float32's own error"


def where_text(report: ParityReport) -> str:
    """A sentence that explains where the first layer diverges ('in' or 'out'), with the numbers."""
    row = report.first
    assert row is not None
    if report.where == "in":
        what = f"the code before it: the layers before give {report.whose} outputs, and the input that arrives here"
        error, ratio = row.in_error, row.in_ratio
    else:
        what = f"the module itself: it gets {report.whose} input, and its output"
        error, ratio = row.out_error, row.out_ratio
    if error is None or not math.isfinite(error):
        return f"{what} is {'not finite' if error is None or math.isinf(error) else 'NaN'}"
    return f"{what} is off by {small(error)}, {times(ratio)}x float32's own error ({report.threshold:g}x is allowed)"


def unknown_text(report: ParityReport) -> str:
    """The next step if no cause was found."""
    if report.reference == "flax":
        start = "Compare the code of both."
        if report.weights or report.settings:
            start = f"Start with the {'weights' if report.weights else 'settings'} below that differ."
        return f"not looked for: causes are explained against torch. {start}"
    tried = "unknown: no explanation that was tried makes the layer agree."
    if report.where == "in":
        return f"{tried} Compare what both models compute between the layer before and this one."
    if any(row.severity == "error" for row in report.settings):
        return f"{tried} Start with the settings below that differ."
    return f"{tried} Compare this layer's weights, settings and arguments."


def kind_and_count(report: ParityReport) -> str:
    """'LayerNorm / LayerNorm, the first of 25 calls that diverge'."""
    row = report.first
    assert row is not None
    bad = sum(one.status == "diverges" for one in report.layers)
    return f"{kind_text(row)}, {f'the first of {bad} calls that diverge' if bad > 1 else 'the only call that diverges'}"


def cause_detail(cause: Cause) -> str:
    """The cause's detail without a leading repetition of its name."""
    return escape(cause.detail.removeprefix(f"{cause.name}: "), 400)


def suspect_text(report: ParityReport) -> str:
    """The suspect of running both models, where the first divergence is in it or before it, or where there is none; ''
    otherwise."""
    if report.ok or not report.suspect:
        return ""
    first = report.first
    if first is not None and not _beside(report, first.site_flax.path):
        return ""
    return f"run on redrawn weights, both models part before {escape(report.suspect, 400)}"


def _beside(report: ParityReport, path: str) -> bool:
    """True if a layer is the suspect, holds it, lies in it, or is called right before it."""
    ends = path, report.suspect
    if any(not one or one == other or other.startswith(f"{one}/") for one, other in (ends, ends[::-1])):
        return True
    called = list(dict.fromkeys(row.site_flax.path for row in report.layers))
    return {path, report.suspect} <= set(called) and called.index(report.suspect) - called.index(path) == 1


def no_layer_text(report: ParityReport) -> str:
    """The text of a failing report without a diverging layer."""
    if any(map(_misfit, report.outputs)):
        return "An output has no counterpart of its shape. Pick the outputs with gx.Inputs(torch_call=, flax_call=)."
    if any(not row.ok for row in report.outputs):
        if not report.layers:
            return "The layers were not compared (layers=False)."
        return (
            f"Every compared layer agrees when it gets {report.whose} input: the fault lies behind the last one, or in "
            "code outside every layer."
        )
    if report.weights:
        weights = f"those that the plan makes from {report.whose}"
        return f"The outputs agree on these inputs, but some weights are not {weights}."
    return "The outputs agree on these inputs, but the models declare different settings."


# ---------------------------------------------------------------- rows that matter


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the layer table: one row, several rows whose paths differ only in numbers, or a gap (rows not shown).

    hidden   how many rows a gap hides: `bad` of them diverge, `worst` is the largest ratio among them
    """

    rows: tuple[LayerRow, ...] = ()
    hidden: int = 0
    bad: int = 0
    worst: float | None = None
    first: bool = False

    @property
    def gap(self) -> str:
        """The text of a gap: '… 23 more, none above 1.4'."""
        if self.bad:
            return f"… {self.hidden:,} more, {self.bad:,} of them diverge, by up to {times(self.worst)}"
        return f"… {self.hidden:,} more" + ("" if self.worst is None else f", none above {times(self.worst)}")

    @property
    def torch(self) -> str:
        return _folded([row.site_torch for row in self.rows])

    @property
    def flax(self) -> str:
        return _folded([row.site_flax for row in self.rows])


def _folded(sites: Sequence[Site]) -> str:
    if len(sites) == 1:
        return site_name(sites[0])
    names = fold_names(dict.fromkeys(site.path for site in sites))
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def layer_lines(report: ParityReport, limit: int = 14) -> list[Line]:
    """The lines to show. A short trace shows all rows. A longer one shows the rows around the first divergence and the
    groups of similar rows that diverge (the worst, `limit` lines in all), with gaps between. One that passes shows its
    three worst rows."""
    rows = report.layers
    at = next((i for i, row in enumerate(rows) if row is report.first), None)
    if len(rows) <= limit:
        return [Line((row,), first=i == at) for i, row in enumerate(rows)]
    chosen: dict[int, tuple[int, ...]] = {}
    if at is not None:
        chosen = {i: (i,) for i in range(max(0, at - 2), min(len(rows), at + 3))}
    columns: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        if row.status == "diverges" and i not in chosen:
            key = (_NUMBER.sub("#", row.site_torch.path), _NUMBER.sub("#", row.site_flax.path))
            columns.setdefault(key, []).append(i)
    worst = sorted(columns.values(), key=lambda group: -max(row_ratio(rows[i]) for i in group))
    chosen |= {group[0]: tuple(group) for group in worst[: limit - len(chosen)]}
    if not chosen:
        worst_three = sorted(range(len(rows)), key=lambda i: -row_ratio(rows[i]))[:3]
        return [Line((rows[i],)) for i in worst_three]
    return _with_gaps(rows, chosen, at)


def _with_gaps(rows: Sequence[LayerRow], chosen: Mapping[int, tuple[int, ...]], at: int | None) -> list[Line]:
    shown = {i for group in chosen.values() for i in group}
    out: list[Line] = []
    gap: list[LayerRow] = []
    for i, row in enumerate(rows):
        if i in chosen:
            if gap:
                out.append(_gap(gap))
                gap = []
            out.append(Line(tuple(rows[k] for k in chosen[i]), first=i == at))
        elif i not in shown:
            gap.append(row)
    if gap:
        out.append(_gap(gap))
    return out


def _gap(rows: Sequence[LayerRow]) -> Line:
    return Line(hidden=len(rows), bad=sum(row.status == "diverges" for row in rows), worst=worst_ratio(rows))


def folded_settings(settings: Iterable[SettingRow]) -> list[tuple[SettingRow, list[SettingRow]]]:
    """Group equal settings of modules whose paths differ only in numbers: (first row, all rows), errors first."""
    groups: dict[tuple[str, ...], list[SettingRow]] = {}
    for row in settings:
        key = (row.severity, row.setting, str(row.want), str(row.have), _NUMBER.sub("#", row.flax))
        groups.setdefault(key, []).append(row)
    found = sorted(groups.values(), key=lambda group: SEVERITIES.index(group[0].severity))
    return [(group[0], group) for group in found]


def by_reason(names: Mapping[str, str], shown: int = 3) -> list[str]:
    """Modules that were not traced, one line per reason: 'never called (40): flax:encoder/{0..39}/dropout'."""
    return [f"{escape(reason, 200)} ({count}): {folded}" for reason, count, folded in text.by_reason(names, shown)]


def seconds_text(seconds: Mapping[str, float]) -> str:
    """'7.2 s (torch 0.8, Flax 3.9 including 1.9 compiling)'."""
    if not seconds:
        return ""
    total = seconds.get("total", sum(seconds.values()))
    inside = {"total", "flax", "flax forced", "flax compile"}  # parts of the lap named Flax
    compiling = seconds.get("flax compile", 0.0)
    parts: list[str] = []
    for name, value in seconds.items():
        if name in inside or value < 0.05:
            continue
        more = f" including {compiling:.1f} compiling" if name == "Flax" and compiling >= 0.05 else ""
        parts.append(f"{escape(name)} {value:.1f}{more}")
    return f"{total:.1f} s" + (f" ({', '.join(parts)})" if parts else "")
