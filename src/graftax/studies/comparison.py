"""The result of `gx.compare` as data. The modules beside this one make the text and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NoReturn

from graftax.parity.records import Site
from graftax.parity.report.model import number


@dataclass(frozen=True, slots=True)
class Shift:
    """How far values of b are from those of a.

    error   relative L2, |b - a| / |a|; |b| if a is all zeros; infinite for a NaN or an infinity on one side only, and
            for other shapes. Of several arrays, the largest
    cosine  of the values as vectors; NaN where the error is infinite. Of several arrays, the smallest
    """

    error: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One call of one module. The iterations of a scan are calls.

    path      the module's path, '' for the model itself; `call`: which call of it, from 0; `kind`: its class name
    depth     how many module calls are around this one
    itself    the output with b's weights on the input that the module has in a's run, against its output there: what
              the edit does in this module and those inside it. None: not compared
    free      its output in b's run against that in a's run. None: not compared
    edited    the leaves that differ and belong to this module and to no module inside it
    text      why it was not compared
    """

    path: str
    call: int
    kind: str
    depth: int
    itself: Shift | None
    free: Shift | None
    edited: tuple[str, ...] = ()
    text: str = ""

    @property
    def name(self) -> str:
        """'layers/fc (call 3)', '(the model)'."""
        return str(Site(self.path, self.call))

    @property
    def own_error(self) -> float:
        """The error of `itself`; 0.0 if it was not compared."""
        return 0.0 if self.itself is None else self.itself.error

    def as_json(self) -> dict[str, Any]:
        return {
            "module": self.path,
            "call": self.call,
            "kind": self.kind,
            "depth": self.depth,
            "itself": _error(self.itself),
            "itself_cosine": _cosine(self.itself),
            "free": _error(self.free),
            "free_cosine": _cosine(self.free),
            "edited": list(self.edited),
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class OutputShift:
    """One array of the model's output in b's run against a's run. `path` is its place in the nest ('' for a lone
    array); max_abs: the largest |b - a|, NaN counts as infinite; text: why nothing was compared."""

    path: str
    shape: tuple[int, ...]
    shift: Shift
    max_abs: float
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.shape),
            "error": number(self.shift.error),
            "cosine": number(self.shift.cosine),
            "max_abs": number(self.max_abs),
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class LogitsShift:
    """The logits of b's run against those of a's run. Classes lie on the last axis; every other index is a position.

    path       their place in the output; 'logits=' if a function picked them
    kl         KL(a | b) of the softmax in nats, the mean over positions; kl_most: the largest
    flips      at how many of the `positions` the largest logit is another class
    """

    path: str
    shape: tuple[int, ...]
    kl: float
    kl_most: float
    flips: int
    positions: int

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.shape),
            "kl": number(self.kl),
            "kl_most": number(self.kl_most),
            "flips": self.flips,
            "positions": self.positions,
        }


@dataclass(frozen=True, slots=True)
class LeafRow:
    """A leaf whose bits differ: how many of its values, and how far b's are from a's. dtypes: of a and of b."""

    path: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    differing: int
    total: int
    shift: Shift

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.shape),
            "dtypes": list(self.dtypes),
            "differing": self.differing,
            "total": self.total,
            "error": number(self.shift.error),
            "cosine": number(self.shift.cosine),
        }


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """The answer of `gx.compare`. Printed, it is a table. It has no truth value: ask `.equal`.

    rows        one for each module call, in the order in which the calls began in a's run; the model itself comes first
    outputs     one for each array of the model's output; logits: of the logits, if they were asked for
    leaves      those that differ; `total`: how many leaves there are
    not_traced  module path -> why it has no row
    seconds     where the time went
    """

    model: str
    rows: tuple[ModuleRow, ...]
    outputs: tuple[OutputShift, ...]
    logits: LogitsShift | None = None
    leaves: tuple[LeafRow, ...] = ()
    total: int = 0
    not_traced: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def equal(self) -> bool:
        """True if both runs give the same values: in every module call and every output."""
        shifts = [shift for row in self.rows for shift in (row.itself, row.free) if shift is not None]
        return all(shift.error == 0 for shift in (*shifts, *(row.shift for row in self.outputs)))

    def __bool__(self) -> NoReturn:
        raise TypeError("a comparison has no truth value: ask .equal (the runs), or look at .rows and .leaves")

    def __str__(self) -> str:
        from graftax.studies.comparison_text import comparison_text

        return comparison_text(self)

    def __repr__(self) -> str:
        from graftax.studies.comparison_text import headline

        return f"<Comparison: {headline(self)}>"

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the comparison as one self-contained HTML page. StorageError if writing fails."""
        from graftax.studies.comparison_page import save_comparison_html

        save_comparison_html(self, path)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "equal": self.equal,
            "rows": [row.as_json() for row in self.rows],
            "outputs": [row.as_json() for row in self.outputs],
            "logits": None if self.logits is None else self.logits.as_json(),
            "leaves": {"differ": [row.as_json() for row in self.leaves], "of": self.total},
            "not_traced": dict(self.not_traced),
            "notes": list(self.notes),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def _error(shift: Shift | None) -> float | str | None:
    return None if shift is None else number(shift.error)


def _cosine(shift: Shift | None) -> float | str | None:
    return None if shift is None else number(shift.cosine)
