"""Moved: import from graftax.dtypes."""

from graftax.dtypes import *  # noqa: F403
from graftax.dtypes import NUMPY_OWN  # noqa: F401
