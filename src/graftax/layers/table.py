"""LAYERS: the one table of layer types. A new type is a row here (in the file of its topic) and one parity case."""

from __future__ import annotations

from graftax.layers.attention import ATTENTION_ROWS
from graftax.layers.bare import BARE_ROWS
from graftax.layers.base import Layer
from graftax.layers.conv import CONV_ROWS
from graftax.layers.dense import DENSE_ROWS
from graftax.layers.norms import NORM_ROWS
from graftax.layers.recurrent import RECURRENT_ROWS
from graftax.layers.reparam import REPARAM_ROWS

LAYERS: tuple[Layer, ...] = (
    *DENSE_ROWS,
    *CONV_ROWS,
    *NORM_ROWS,
    *ATTENTION_ROWS,
    *RECURRENT_ROWS,
    *REPARAM_ROWS,
    *BARE_ROWS,
)
"""Connections of equal strength are offered in this order."""
