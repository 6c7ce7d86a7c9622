"""Known buffers: index tables, masks and rotary tables that a model computes again, told by the whole words of their
names, by dtypes that nothing trains, and by values where a mask is stored as floats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftax.match.words import BUFFERS
from graftax.tree import Checkpoint, TensorSpec, split_path, split_words, whole_words

_INDEX = frozenset(("index", "indices", "idx", "id", "ids", "bucket", "buckets"))
_OF_PLACES = frozenset(("relative", "rel", "position", "positions", "positional", "pos", "relpos", "rp"))
_MASK = frozenset(("mask", "masks", "tril", "triu"))
_OF_ATTENTION = frozenset(("attn", "attention", "self", "causal", "local", "future", "window", "subsequent", "ahead"))
_SAYS_NOTHING = frozenset(("buffer", "table", "cached", "cache", "bias", "of", "the", "look"))
_ROTATION = frozenset(("cos", "sin", "cis"))
_OF_ROTATION = frozenset(("rope", "rotary", "freq", "freqs", "cached", "cache"))
_MOST = 1 << 24  # elements of a mask whose values are read


def known_buffers(end: Checkpoint, paths: Iterable[str], reads: list[str] | None) -> dict[str, str]:
    """path -> why it needs no place, for the torch tensors among `paths` that certainly are no parameters.

    reads: what was read to tell (values of floats that may be a mask); None: the values are no evidence, and the name
    and the shape are believed."""
    out: dict[str, str] = {}
    for path in paths:
        live = path.rpartition(".")[0] in end.modules  # hooks may save it under a name that no module has
        if live and path not in end.buffers:
            continue
        reason = buffer_name(path, end.specs[path]) or _mask(path, end, live, reads)
        if reason:
            out[path] = reason
    return out


def buffer_name(path: str, spec: TensorSpec) -> str:
    """Why a leaf of this name, of either side, and dtype is no parameter; '' where they do not say so."""
    *above, last = split_path(path, "flax" if "/" in path else "torch")
    known = BUFFERS.get(last)
    if known is not None:
        return known
    words = frozenset(word for word in split_words(last) if not word.isdigit())
    if words & _ROTATION and words <= _ROTATION | _OF_ROTATION | _SAYS_NOTHING | {"emb", "pos"}:
        around = words.union(*map(whole_words, above[-1:]))
        return BUFFERS["cos_cached"] if around & _OF_ROTATION else ""
    if spec.kind not in "iub":
        return ""
    if words & _INDEX and words & _OF_PLACES and words <= _INDEX | _OF_PLACES | _SAYS_NOTHING:
        return BUFFERS["relative_position_index"]
    if words & _MASK and words <= _MASK | _OF_ATTENTION | _SAYS_NOTHING:
        around = words.union(*map(whole_words, above[-2:]))
        return BUFFERS["attn_mask"] if around & _OF_ATTENTION else ""
    if last == "bias" and len(spec.shape) > 1 and spec.shape[-1] == spec.shape[-2]:
        return BUFFERS["causal_mask"]
    return ""


def _mask(path: str, end: Checkpoint, live: bool, reads: list[str] | None) -> str:
    """A causal mask that is kept as floats: one value up to the diagonal and another one above it."""
    shape, last = end.specs[path].shape, path.rpartition(".")[2]
    square = len(shape) > 1 and shape[-1] == shape[-2] > 1 and end.specs[path].size == shape[-1] ** 2
    if not square or not ((last == "bias" and len(shape) == 4) or set(split_words(last)) & _MASK):
        return ""
    if reads is None or (live and last == "bias"):
        return BUFFERS["causal_mask"] if last == "bias" else ""
    if not end.has_values or end.specs[path].size > _MOST or end.specs[path].packed:
        return ""
    reads.append(f"{path}, to tell a causal mask")
    return BUFFERS["causal_mask"] if _is_causal(end.read(path)) else ""


def _is_causal(array: Any) -> bool:
    import numpy as np

    square = np.asarray(array).reshape(array.shape[-2:])
    seen, hidden = square[0, 0], square[0, -1]
    if seen == hidden:
        return False
    lower = np.tri(len(square), dtype=bool)
    return bool((square[lower] == seen).all() and (square[~lower] == hidden).all())
