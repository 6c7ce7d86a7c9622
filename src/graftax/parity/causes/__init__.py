"""Why a layer diverges: hypotheses tried on that layer alone. Only those that make it agree are named."""

from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.search import find_causes, weight_causes

__all__ = ["CAUSES", "find_causes", "weight_causes"]
