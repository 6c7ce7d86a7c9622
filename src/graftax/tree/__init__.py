"""Trees of named arrays: paths, specs, checkpoints, selectors. Pure Python: no framework, no NumPy."""

from graftax.tree.checkpoint import Checkpoint
from graftax.tree.leaf_index import LeafIndex
from graftax.tree.live import Axes, Live, Module, Trace
from graftax.tree.paths import (
    escape_part,
    flatten,
    join_path,
    natural_key,
    nest,
    split_path,
    split_words,
    unescape_part,
    whole_words,
)
from graftax.tree.selectors import glob_pattern, is_glob, match_paths, nearest, subtree
from graftax.tree.specs import DTYPES, Key, Side, SideBy, TensorSpec
from graftax.tree.storage import Storage

__all__ = [
    "DTYPES",
    "Axes",
    "Checkpoint",
    "Key",
    "LeafIndex",
    "Live",
    "Module",
    "Side",
    "SideBy",
    "Storage",
    "TensorSpec",
    "Trace",
    "escape_part",
    "flatten",
    "glob_pattern",
    "is_glob",
    "join_path",
    "match_paths",
    "natural_key",
    "nearest",
    "nest",
    "split_path",
    "split_words",
    "subtree",
    "unescape_part",
    "whole_words",
]
