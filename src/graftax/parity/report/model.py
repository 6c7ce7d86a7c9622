"""The result of a parity check as data: the report, its rows, the causes. No framework and no NumPy is imported here.

The modules beside this one make the text and the HTML page; this module only holds the data that they show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from graftax.parity.pairing import ModulePair
from graftax.parity.records import THRESHOLD, UNIT, Site

Where = Literal["in", "out"]
Status = Literal["ok", "diverges", "not compared"]
Severity = Literal["error", "warning", "note"]
ReferenceKind = Literal["torch", "flax"]


def ratio_of(error: float | None, floor: float) -> float | None:
    """How many times float32's own error this is: error / max(floor, 2^-24). NaN counts as infinite; None stays."""
    if error is None:
        return None
    return math.inf if math.isnan(error) else error / max(floor, UNIT)


@dataclass(frozen=True, slots=True)
class Cause:
    """One explanation that was tried on the first diverging layer and makes it agree.

    name          a word of `causes.names.CAUSES`
    layer         the Flax path of the module at fault, '' for the model itself
    detail        what was found: 'torch has eps=1e-12, Flax has epsilon=1e-6'
    fix           what to change: 'nn.LayerNorm(epsilon=1e-12)'
    error_before, error_after   relative L2 of the layer as it is, and with the fix
    """

    name: str
    layer: str
    detail: str
    fix: str
    error_before: float
    error_after: float

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layer": self.layer,
            "detail": self.detail,
            "fix": self.fix,
            "error_before": number(self.error_before),
            "error_after": number(self.error_after),
        }


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One call of one module pair. All errors are relative L2 against the float64 reference.

    kind        the two class names, 'Linear / Dense'
    in_error    of the input that arrives at the Flax module when every layer before it got the reference input and
                passed on the reference output: the error of the functional code between the layers. None: not compared
    out_error   of the Flax module's output for the reference input: the error that this layer adds
    free_error  of its output in an ordinary run. None: not compared
    *_floor     the same error of torch float32: the best that float32 can do here
    status      'ok', 'diverges' (in or out above the threshold), or 'not compared'
    text        why it was not compared
    """

    pair: ModulePair
    site_torch: Site
    site_flax: Site
    kind: str
    in_error: float | None
    in_floor: float
    out_error: float | None
    out_floor: float
    free_error: float | None
    free_floor: float
    status: Status = "ok"
    text: str = ""

    @property
    def in_ratio(self) -> float | None:
        return ratio_of(self.in_error, self.in_floor)

    @property
    def out_ratio(self) -> float | None:
        return ratio_of(self.out_error, self.out_floor)

    @property
    def free_ratio(self) -> float | None:
        return ratio_of(self.free_error, self.free_floor)

    @property
    def added(self) -> float | None:
        """The error that this layer adds to a correct input."""
        return self.out_error

    def as_json(self) -> dict[str, Any]:
        return {
            "torch": self.site_torch.path,
            "torch_call": self.site_torch.call,
            "flax": self.site_flax.path,
            "flax_call": self.site_flax.call,
            "kind": self.kind,
            "leaf": self.pair.leaf,
            "in_error": number(self.in_error),
            "in_floor": number(self.in_floor),
            "in_ratio": number(self.in_ratio),
            "out_error": number(self.out_error),
            "out_floor": number(self.out_floor),
            "out_ratio": number(self.out_ratio),
            "free_error": number(self.free_error),
            "free_floor": number(self.free_floor),
            "free_ratio": number(self.free_ratio),
            "status": self.status,
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One array of the model's output. `path` is its place in the nest ('' for a lone array, 'logits', '0/hidden').

    error, floor  relative L2 of Flax and of torch float32 against float64
    metrics       other measures: 'max_abs' always; 'top1' and 'kl' for logits, 'cosine' for embeddings; 'atol', 'rtol'
                  and 'outside' (how many values) if tolerances were given
    text          a misfit that is not a number: a shape mismatch, an output missing on one side
    """

    path: str
    shape: tuple[int, ...]
    error: float
    floor: float
    ratio: float
    ok: bool
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.shape),
            "error": number(self.error),
            "floor": number(self.floor),
            "ratio": number(self.ratio),
            "ok": self.ok,
            "metrics": {name: number(value) for name, value in self.metrics.items()},
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class WeightRow:
    """A Flax leaf whose bits differ from the leaf that the plan makes from the torch weights.

    path         the Flax leaf; differing, total: how many of its values
    largest_ulp  the largest distance in units of the last place; None if it has no meaning (another dtype, NaN)
    text         what was compared, and the torch keys it comes from
    """

    path: str
    differing: int
    total: int
    largest_ulp: float | None
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "differing": self.differing,
            "total": self.total,
            "largest_ulp": number(self.largest_ulp),
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class SettingRow:
    """A setting that differs within a module pair. torch, flax: module paths; `want`: the Flax value that torch's
    settings require; `have`: the value that Flax has."""

    torch: str
    flax: str
    setting: str
    want: Any
    have: Any
    severity: Severity
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "torch": self.torch,
            "flax": self.flax,
            "setting": self.setting,
            "want": plain(self.want),
            "have": plain(self.have),
            "severity": self.severity,
            "text": self.text,
        }


@dataclass(frozen=True, slots=True, repr=False)
class ParityReport:
    """The answer of `gx.check_parity`: truthy when the port is proved, text that names the first layer and the cause.

    outputs     one row per array of the output; layers: one per call of a module pair, in torch's call order
    first       the first layer that diverges; `where`: 'out' the module itself, 'in' the code before it
    causes      explanations that were tried on it and make it agree, the best first; empty: unknown
    weights     Flax leaves whose bits differ from those that the plan makes from the torch weights
    settings    settings that differ, as the two models declare them
    not_traced  module path ('torch:encoder', 'flax:encoder') -> why it has no row
    suspect     the module before which the models part on redrawn weights, as planning with inputs found; '' if unknown
    paired      (module pairs seen in the run, parametrised modules that have one, parametrised modules in all)
    seconds     where the time went: 'torch', 'flax', 'compile', 'causes', 'audit', 'total'
    reference   what the Flax model was checked against: a torch module, or another Flax model. All that is said of
                torch here (`torch_name`, `site_torch`, float32's error) is then said of that one
    """

    ok: bool
    outputs: tuple[OutputRow, ...]
    layers: tuple[LayerRow, ...] = ()
    first: LayerRow | None = None
    where: Where | None = None
    causes: tuple[Cause, ...] = ()
    weights: tuple[WeightRow, ...] = ()
    settings: tuple[SettingRow, ...] = ()
    not_traced: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    threshold: float = THRESHOLD
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    paired: tuple[int, int, int] = (0, 0, 0)
    torch_name: str = "torch"
    flax_name: str = "Flax"
    suspect: str = ""
    reference: ReferenceKind = "torch"

    @property
    def side(self) -> str:
        """What the reference is called: 'torch', or 'reference' if it is a Flax model."""
        return "torch" if self.reference == "torch" else "reference"

    @property
    def whose(self) -> str:
        """'torch's', 'the reference's'."""
        return "torch's" if self.reference == "torch" else "the reference's"

    @property
    def dot(self) -> str:
        """What separates the parts of the reference's paths."""
        return "." if self.reference == "torch" else "/"

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        from graftax.parity.report.text import parity_text

        return parity_text(self)

    def __repr__(self) -> str:
        """One line, which pytest shows for `assert gx.check_parity(...)`."""
        from graftax.parity.report.words import one_line

        return f"<ParityReport: {one_line(self)}>"

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one self-contained HTML page. StorageError if writing fails."""
        from graftax.parity.report.html import save_parity_html

        save_parity_html(self, path)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "threshold": self.threshold,
            "torch": self.torch_name,
            "flax": self.flax_name,
            "reference": self.reference,
            "first": None if self.first is None else {**self.first.as_json(), "where": self.where},
            "suspect": self.suspect or None,
            "causes": [cause.as_json() for cause in self.causes],
            "outputs": [row.as_json() for row in self.outputs],
            "layers": [row.as_json() for row in self.layers],
            "weights": [row.as_json() for row in self.weights],
            "settings": [row.as_json() for row in self.settings],
            "not_traced": dict(self.not_traced),
            "paired": {"pairs": self.paired[0], "parametrised": self.paired[1], "of": self.paired[2]},
            "notes": list(self.notes),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def number(value: float | None) -> float | str | None:
    """A number for JSON: infinities and NaN, which JSON lacks, become text."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def plain(value: Any) -> Any:
    """A setting as JSON data: numbers, text, lists; any other value as its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return str(value)
