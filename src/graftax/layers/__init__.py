"""The layer table: which torch layer is which Flax layer, what happens to each leaf, and what is refused.

LAYERS is one table. `connect` finds every way in which it connects two modules, `leaf_connections` does so for one
leaf.
"""

from graftax.layers.base import Connection, Part
from graftax.layers.connect import (
    connect,
    known_kind,
    layouts,
    leaf_connections,
    overriding,
    own_layout,
    settings_differ,
    settled,
)
from graftax.layers.conv import block_diagonal_ops
from graftax.layers.fused import fused_ways
from graftax.layers.roles import LeafRole, role_of
from graftax.layers.table import LAYERS
from graftax.layers.text import layer_rows, layers_text

__all__ = [
    "LAYERS",
    "Connection",
    "LeafRole",
    "Part",
    "block_diagonal_ops",
    "connect",
    "fused_ways",
    "known_kind",
    "layer_rows",
    "layers_text",
    "layouts",
    "leaf_connections",
    "overriding",
    "own_layout",
    "role_of",
    "settings_differ",
    "settled",
]
