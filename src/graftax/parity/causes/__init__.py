"""Find out why a layer diverges: try explanations on it, and name only those that make it agree."""

from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.search import find_causes, weight_causes

__all__ = ["CAUSES", "find_causes", "weight_causes"]
