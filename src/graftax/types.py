"""The public classes: what functions take and return."""

from graftax.execute.receipt import Measured, Receipt
from graftax.ops import Op
from graftax.parity.report.model import Cause, LayerRow, OutputRow, ParityReport, SettingRow, WeightRow
from graftax.plans import Assumption, Candidate, End, Entry, Plan, Question
from graftax.report.comparing import Diff, DifferenceRow
from graftax.report.inspecting import Inspection, LeafRow
from graftax.studies.study import Study, StudyRow
from graftax.tree import Checkpoint, Module, Side, TensorSpec

__all__ = [
    "Assumption",
    "Candidate",
    "Cause",
    "Checkpoint",
    "Diff",
    "DifferenceRow",
    "End",
    "Entry",
    "Inspection",
    "LayerRow",
    "LeafRow",
    "Measured",
    "Module",
    "Op",
    "OutputRow",
    "ParityReport",
    "Plan",
    "Question",
    "Receipt",
    "SettingRow",
    "Side",
    "Study",
    "StudyRow",
    "TensorSpec",
    "WeightRow",
]
