"""The values that surgery puts into a leaf: constant, zeros, normal, add_normal, scaled, mean, mix, rounded, quantized,
from_checkpoint. A value is data; see `ops.LeafValue`."""

from graftax.surgery.values.base import require_floating
from graftax.surgery.values.computed import AddNormal, Mean, Mix, Rounded, Scaled
from graftax.surgery.values.fills import Constant, Normal, Zeros, random_key
from graftax.surgery.values.make import (
    add_normal,
    constant,
    from_checkpoint,
    mean,
    mix,
    normal,
    quantized,
    rounded,
    scaled,
    zeros,
)
from graftax.surgery.values.quantize import Quantized

__all__ = [
    "AddNormal",
    "Constant",
    "Mean",
    "Mix",
    "Normal",
    "Quantized",
    "Rounded",
    "Scaled",
    "Zeros",
    "add_normal",
    "constant",
    "from_checkpoint",
    "mean",
    "mix",
    "normal",
    "quantized",
    "random_key",
    "require_floating",
    "rounded",
    "scaled",
    "zeros",
]
