"""The public classes: what functions take and return."""

from graftax.execute.eager import Measured, Receipt
from graftax.ops import Op
from graftax.plans import Assumption, Candidate, End, Entry, Plan, Question
from graftax.tree import Checkpoint, Module, Side, TensorSpec

__all__ = [
    "Assumption",
    "Candidate",
    "Checkpoint",
    "End",
    "Entry",
    "Measured",
    "Module",
    "Op",
    "Plan",
    "Question",
    "Receipt",
    "Side",
    "TensorSpec",
]
