"""The closed set of ops: one step from a tuple of tensors to a tuple of tensors.

Index ops move values and are always exact. Value ops change values; their inverse is a pseudo-inverse, and their
exactness is measured while data streams by. Every op knows its output specs, so a plan is proved to fit before data
moves.

    infer(specs) -> specs      shapes and dtypes out; LayoutError if the input does not fit
    inverse                    the op back; the inverse of the inverse is the op itself
    apply(arrays) -> arrays    NumPy in, NumPy out; views if possible

An op that takes one tensor is mapped over all tensors of the tuple. `bind_chain` records every size that an inverse
needs: a plan holds only bound ops.
"""

from graftax.ops.base import Array, Arrays, Op, Specs
from graftax.ops.chains import (
    CONDITIONS,
    OPS,
    apply_chain,
    bind_chain,
    chain_text,
    infer_chain,
    invert_chain,
    op_from_json,
    op_to_json,
)
from graftax.ops.checked_ops import Copy, Crop, Pad, Repeat, RequireZero, Same, Unrepeat
from graftax.ops.edge_ops import Drop, Fill, Keep
from graftax.ops.floats import widens
from graftax.ops.index_ops import Concat, Flip, Reorder, Split, Stack, Unstack
from graftax.ops.norm_ops import FoldWeightNorm, SpectralSigma, SpectralVector, UnfoldWeightNorm
from graftax.ops.rearrange import Rearrange, axis_groups, groups_text, parse_pattern, transpose
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.replace_op import LeafValue, Misfit, Replace, misfit_of
from graftax.ops.value_ops import Cast, Offset, Scale, Sum, Unsum
from graftax.tree.dtypes import same_bits

__all__ = [
    "CONDITIONS",
    "OPS",
    "Array",
    "Arrays",
    "Cast",
    "Concat",
    "Copy",
    "Crop",
    "Drop",
    "Fill",
    "Flip",
    "FoldWeightNorm",
    "Keep",
    "LeafValue",
    "Misfit",
    "Offset",
    "Op",
    "Pad",
    "Rearrange",
    "RearrangeEach",
    "Reorder",
    "Repeat",
    "Replace",
    "RequireZero",
    "Same",
    "Scale",
    "Specs",
    "SpectralSigma",
    "SpectralVector",
    "Split",
    "Stack",
    "Sum",
    "UnfoldWeightNorm",
    "Unrepeat",
    "Unstack",
    "Unsum",
    "apply_chain",
    "axis_groups",
    "bind_chain",
    "chain_text",
    "groups_text",
    "infer_chain",
    "invert_chain",
    "misfit_of",
    "op_from_json",
    "op_to_json",
    "parse_pattern",
    "same_bits",
    "transpose",
    "widens",
]
