"""Plans: what goes where, and how. A plan is data made from names, shapes and dtypes, separate from its execution."""

from graftax.plans.entries import End, Entry, with_ops
from graftax.plans.plan import Plan
from graftax.plans.questions import PARITY, Assumption, Candidate, Proposal, Question

__all__ = ["PARITY", "Assumption", "Candidate", "End", "Entry", "Plan", "Proposal", "Question", "with_ops"]
