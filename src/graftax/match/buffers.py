"""Known buffers: index tables, masks and rotary tables that a model computes again. They are recognised by whole words
of their names and by dtypes that nothing trains. If floats of such a name may have been learned, their values are read
too."""

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


COUNTER = "num_batches_tracked"
"""The batch counter of a torch BatchNorm. It affects only the average with momentum=None."""


def known_buffers(end: Checkpoint, paths: Iterable[str], reads: list[str] | None) -> dict[str, str]:
    """path -> why it needs no target, for those torch tensors among `paths` that are certainly no parameters.

    reads: collects what was read to decide (values of floats that may be a mask). None: no values are read, and the
    name and the shape decide.
    """
    out: dict[str, str] = {}
    for path in paths:
        live = path.rpartition(".")[0] in end.live.modules  # hooks may save it under a name that no module has
        if live and path not in end.live.buffers:
            continue
        reason = buffer_name(path, end.specs[path])
        if reason and not live and reads is not None and not _holds(path, end, reason, reads):
            continue
        reason = reason or _mask(path, end, live, reads)
        if reason:
            out[path] = reason
    return out


def last_part(path: str) -> str:
    return path.replace("/", ".").rpartition(".")[2]


def buffer_name(path: str, spec: TensorSpec) -> str:
    """Why a leaf of this name and dtype (of either side) is no parameter; '' if the name and the dtype do not show
    it."""
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


def _holds(path: str, end: Checkpoint, reason: str, reads: list[str]) -> bool:
    """True if the values are what the name says. Floats of any name may have been learned; integers have not."""
    kind, check = end.specs[path].kind, _VALUES.get(reason)
    if check is None or kind not in "fc" or not end.has_values or end.specs[path].packed:
        return True
    if end.specs[path].size > _MOST:
        return False
    import numpy as np

    reads.append(f"{path}, to recognise a buffer")
    array = np.asarray(end.read(path)).astype("c16" if kind == "c" else "f8")
    return check(array) if array.size else True


def _masks(array: Any) -> bool:
    """0 and 1, or 0 and a value that no weight has: minus infinity, or a large negative number."""
    import numpy as np

    values = np.unique(array)
    others = values[values != 0]
    return len(others) == 0 or (len(others) == 1 and bool(others[0] == 1 or others[0] <= _HIDES))


def _frequencies(array: Any) -> bool:
    flat = array.reshape(-1)
    return bool((flat > 0).all() and (flat[1:] < flat[:-1]).all())


def _turns(array: Any) -> bool:
    """Cosines (1 at position 0), sines (0 at position 0), or both in one table (also as complex numbers); or the
    angles."""
    size = abs(array)
    circle = size.max() <= _ROUNDED[1] and (size.max() >= _ROUNDED[0] or size.min() == 0)
    return bool(circle or (array.dtype.kind == "f" and array.min() == 0))


def _whole(array: Any) -> bool:
    return bool((array == array.round()).all())


_HIDES = -10.0  # a mask adds this or less to scores: -100, -1e4, -inf
_ROUNDED = (0.99, 1.01)  # 1, also in bfloat16
_VALUES = {
    BUFFERS["attn_mask"]: _masks,
    BUFFERS["masked_bias"]: _masks,
    BUFFERS["inv_freq"]: _frequencies,
    BUFFERS["cos_cached"]: _turns,
    BUFFERS["relative_position_index"]: _whole,
    BUFFERS["position_ids"]: _whole,
    BUFFERS["token_type_ids"]: _whole,
}
"""Why a leaf is a buffer -> the check of its values."""


def _mask(path: str, end: Checkpoint, live: bool, reads: list[str] | None) -> str:
    """A causal mask that is stored as floats: one value up to the diagonal and another above it."""
    shape, last = end.specs[path].shape, path.rpartition(".")[2]
    square = len(shape) > 1 and shape[-1] == shape[-2] > 1 and end.specs[path].size == shape[-1] ** 2
    if not square or not ((last == "bias" and len(shape) == 4) or set(split_words(last)) & _MASK):
        return ""
    if reads is None or (live and last == "bias"):
        return BUFFERS["causal_mask"] if last == "bias" else ""
    if not end.has_values or end.specs[path].size > _MOST or end.specs[path].packed:
        return ""
    reads.append(f"{path}, to recognise a causal mask")
    return BUFFERS["causal_mask"] if _is_causal(end.read(path)) else ""


def _is_causal(array: Any) -> bool:
    import numpy as np

    square = np.asarray(array).reshape(array.shape[-2:])
    seen, hidden = square[0, 0], square[0, -1]
    if seen == hidden:
        return False
    lower = np.tri(len(square), dtype=bool)
    return bool((square[lower] == seen).all() and (square[~lower] == hidden).all())
