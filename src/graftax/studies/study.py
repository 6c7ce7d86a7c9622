"""The result of an ablation: rows with their numbers, as objects, JSON, a ranked table and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from graftax.parity.report.model import number

if TYPE_CHECKING:
    from graftax.studies.effects import Effect
    from graftax.studies.targets import Target


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One run: one value in one leaf, module or head. The first row of a study is the baseline, without a value.

    path     the leaf or the module; '' for the baseline
    value    what it became: 'zeros()', 'quantized(4, axis=-1)'
    head     the number of the head, where one head was changed
    leaves   what was changed, as `gx.replace` takes it
    numbers  name -> number; without a metric 'relative_l2' and 'cosine' against the baseline's outputs, the worst of
             all arrays
    change   name -> number minus the baseline's, where a metric or a function gave the numbers
    not_finite  how many values of the outputs are NaN or infinite
    size     how large the effect is, which ranks the rows: relative L2, or the size of the first number's change
    """

    path: str
    value: str
    head: int | None
    leaves: tuple[str, ...]
    numbers: Mapping[str, float]
    change: Mapping[str, float]
    not_finite: int
    size: float

    @property
    def label(self) -> str:
        """What was changed, in one phrase: a path, with the number of a head."""
        return self.path if self.head is None else f"{self.path} head {self.head}"

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "head": self.head,
            "value": self.value,
            "leaves": list(self.leaves),
            "numbers": {name: number(value) for name, value in self.numbers.items()},
            "change": {name: number(value) for name, value in self.change.items()},
            "not_finite": self.not_finite,
        }


def row_of(target: Target | None, value: str, effect: Effect) -> StudyRow:
    """The row of a target, or of the baseline (None)."""
    where = ("", None, ()) if target is None else (target.path, target.head, target.leaves)
    path, head, leaves = where
    return StudyRow(path, value, head, leaves, effect.numbers, effect.change, effect.not_finite, effect.size)


@dataclass(frozen=True, slots=True, repr=False)
class Study:
    """The answer of `gx.ablate`: an iterable of rows; text is a table with the largest effect first.

    rows           the baseline, then one row for each leaf, module or head and each value, in the tree's order
    each           'leaf', 'module' or 'head'
    name           the model or the function
    deterministic  False if two runs of the unchanged weights differ. The baseline's row then has, as its change or its
                   distances, how much: smaller effects mean nothing
    """

    rows: tuple[StudyRow, ...]
    each: str
    name: str
    deterministic: bool = True

    @property
    def baseline(self) -> StudyRow:
        return self.rows[0]

    @property
    def ranked(self) -> tuple[StudyRow, ...]:
        """The rows without the baseline, the largest effect first; equal ones in the tree's order."""
        return tuple(sorted(self.rows[1:], key=lambda row: -row.size))

    def __iter__(self) -> Iterator[StudyRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        from graftax.studies.study_text import study_text

        return study_text(self)

    def __repr__(self) -> str:
        return f"<Study of {self.name}: {len(self.rows) - 1} rows and the baseline>"

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the study as one self-contained HTML page. StorageError if writing fails."""
        from graftax.studies.study_html import save_study_html

        save_study_html(self, path)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "each": self.each,
            "deterministic": self.deterministic,
            "rows": [row.as_json() for row in self.rows],
        }
