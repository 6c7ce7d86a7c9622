"""Why a layer diverges: hypotheses tried on that layer alone. Only those that make it agree are named."""

from graftax.parity.causes.finding import find_causes, weight_causes
from graftax.parity.causes.names import CAUSES

__all__ = ["CAUSES", "find_causes", "weight_causes"]
