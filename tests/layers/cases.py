"""CASES: the parity cases, one row a layer and variant; a new one goes into the file of its topic."""

from __future__ import annotations

from .cases_attention import ATTENTION, FUSED
from .cases_conv import CONV
from .cases_dense import DENSE
from .cases_norms import NORMS
from .cases_recurrent import RECURRENT
from .cases_reparam import REPARAM

CASES = [*DENSE, *CONV, *NORMS, *ATTENTION, *FUSED, *RECURRENT, *REPARAM]
