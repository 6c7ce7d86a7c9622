"""Small models, each in torch, Linen and NNX, written as users write them: what parity is tried on.

KINDS maps a model's name to its Kind. A model's settings are one frozen dataclass for all three frameworks: a fault is
the Flax model built with other settings than the torch model has, or ported weights that were changed.
"""

from __future__ import annotations

from .base import APIS, Kind, Port, Settings, port
from .cnn import CNN
from .decoder import DECODER
from .encoder import ENCODER
from .mlp import MLP
from .tagger import TAGGER
from .vit import VIT

KINDS: dict[str, Kind] = {kind.name: kind for kind in (MLP, CNN, ENCODER, VIT, DECODER, TAGGER)}

__all__ = ["APIS", "KINDS", "Kind", "Port", "Settings", "port"]
