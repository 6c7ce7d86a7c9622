"""Find the training state in a tree of paths: what a TrainState, an nnx.Optimizer or an optax chain puts beside the
parameters.

A name alone is not enough, because a model may have a submodule `optimizer` or a parameter `step`. The structure must
confirm it: an optimizer's moments mirror the weights beside it, path by path, and the rest of its state are single
numbers. A part with the name of an optimizer's state but another structure is `doubtful`, and graftax asks about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftax.tree import TensorSpec
from graftax.tree.training_containers import (
    Node,
    Parts,
    StateSearch,
    add_runs,
    copies_in,
    is_copy,
    is_small,
    leaves_in,
    prefix_of,
)
from graftax.tree.training_state import MOMENTS_OF_ADAM, family, is_count, is_usual, words_of

_NUMBER = re.compile("[0-9]+")
_DEPTH = 4
"""Levels of containers that may surround a training state (`{"model": {"state": {"params": ...}}}`)."""
_MOMENTS = frozenset(
    {"mu", "nu", "mu_hat", "nu_hat", "trace", "momentum", "momentum_buffer", "velocity", "sum_of_squares", "acc_grads"}
    | {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "v_row", "v_col", "grad_ema", "grad_sq_ema", "param_states"}
    | {"inner_state", "inner_states", "inner_opt_state", "opt_state", "hyperparams", "hyperparams_states"}
    | {"mini_step", "gradient_step", "notfinite_count", "ns_coeffs"}
    | {"diff_params_memory", "diff_updates_memory", "weights_memory"}
)
"""Fields of the states of optax, flax.optim and torch. Alone they prove nothing: a VAE has a layer `mu`."""
_COEFFICIENTS = frozenset({"ns_coeffs", "weights_memory"})
"""Fields that hold a few numbers of the optimizer itself: Muon's polynomial, L-BFGS's weights."""
_OPTIMIZER = frozenset({"opt", "optax", "tx", "state", "states", "dict", "dicts"})
_OF_STATES = frozenset({"state", "ema"})
"""Usual container names that are also fields of an optimizer's state."""
_STREAMS = frozenset({"rng", "rngs", "prng", "key", "keys", "dropout", "random", "noise", "seed"})
_RANDOM = _STREAMS | {
    "default",
    "sample",
    "params",
    "state",
    "stream",
    "jax",
    "train",
    "eval",
    "init",
    "data",
    "count",
    "counts",
}
_SCALES = frozenset({"loss", "grad", "dynamic", "scale", "scaler", "scaling", "amp"})
_SMALL = frozenset({"scheduler", "scaler", "loops"})


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The parts of a tree that are not weights.

    prefix    path of the container that holds all of the weights; "" if there is none
    left      path of a part -> what it is
    copies    paths of containers that each hold weights: copies of a network, or several networks; one must be named
    doubtful  path of a part with the name of an optimizer's state -> its leaves that do not fit an optimizer; no leaves
              if the part is just one copy of the weights
    """

    prefix: str = ""
    left: Mapping[str, str] = field(default_factory=dict[str, str])
    copies: tuple[str, ...] = ()
    doubtful: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])

    def leaves_out(self, path: str) -> bool:
        """True if this leaf, or a container around it, is left out."""
        at = -1
        while (at := path.find("/", at + 1)) >= 0:
            if path[:at] in self.left:
                return True
        return path in self.left


def may_hold_state(paths: Iterable[str]) -> bool:
    """True if some name could be training state, so that `find_training_state` is worth calling."""
    parts = {part for path in paths for part in path.split("/")}
    parts = {_NUMBER.sub("", part) for part in parts}  # layers_0 to layers_9999 count as one name
    return any(
        part in _MOMENTS
        or part in ("m", "v")
        or is_optimizer_name(part)
        or _is_count(part)
        or is_copy(part)
        or words_of(part) & _STREAMS
        for part in parts
    )


def find_training_state(specs: Mapping[str, TensorSpec]) -> TrainingState:
    """The parts of a tree with '/'-joined paths that are not weights. The result is empty for weights alone, and for a
    tree of only training state (the user named it)."""
    if not may_hold_state(specs):
        return TrainingState()
    root: Node = {}
    for path, spec in specs.items():
        node = root
        *above, last = path.split("/")
        for part in above:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                return TrainingState()  # a flat dict whose names are not paths
            node = child
        if isinstance(node.get(last), dict):
            return TrainingState()
        node[last] = spec
    found = StateSearch()
    _search(root, (), found)
    if not (found.left or found.copies or found.doubtful):
        return TrainingState()
    return TrainingState(
        "/".join(prefix_of(root, found)),
        {"/".join(path): what for path, what in found.left.items()},
        tuple("/".join(path) for path in found.copies),
        {"/".join(path): tuple("/".join(leaf) for leaf in odd) for path, odd in found.doubtful.items()},
    )


def own_parts(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """path -> the number of its leading parts that belong to the optimizer (3 of opt_state/0/mu/Dense_0/kernel), for
    each leaf that `find_training_state` leaves out. The rest is the path of the weight that the leaf mirrors."""
    found = find_training_state(specs)
    aside = [path for path in specs if found.leaves_out(path)] if found.left else []
    weights = {path for path in specs if not found.leaves_out(path)}
    above = max((path.count("/") for path in found.left), default=0)  # containers around a run
    tails = {path[at:] for path in weights for at in _starts(path)[: above + 3]}
    out: dict[str, int] = {}
    for path in aside:
        starts = _starts(path)[1:]
        out[path] = next((i for i, at in enumerate(starts, 1) if path[at:] in tails), len(starts) + 1)
    return out


def _starts(path: str) -> list[int]:
    """The positions at which the parts of a path begin."""
    return [0, *(i + 1 for i, char in enumerate(path) if char == "/")]


def _search(node: Node, at: Parts, found: StateSearch) -> None:
    sure = _own_moments(node)
    named = [name for name, value in node.items() if isinstance(value, dict) and is_optimizer_name(name)]
    others = {name: value for name, value in node.items() if name not in named}
    for name, state in node.items():
        if (
            name in sure
            or not isinstance(state, dict)
            or name == "params"
            or not (name in named or _has_moments(state))
        ):
            continue
        if _is_run(state, name in named):
            continue
        weights = {key: value for key, value in others.items() if key != name and key not in sure}
        if not any(isinstance(value, dict) for value in weights.values()):
            continue
        mirror = _Mirror.of(weights)
        odd = _none_of_an_optimizer(state, mirror)
        shown = any(part in _MOMENTS or _is_count(part) for leaf, _ in leaves_in(state) for part in leaf)
        if name in named and not odd and mirror.is_twin():
            continue  # two networks of one architecture
        copies = 0 if shown or odd or name not in named else _copies_in(state, weights)
        if copies == 1 and "params" not in weights and not any(is_small(spec) for _, spec in leaves_in(state)):
            found.doubtful[*at, name] = []
            continue
        shown = shown or copies > 0
        if not odd and shown and (name in named or (_is_counted(state) and (mirror.inner or mirror.rooted))):
            sure[name] = f"an optimizer's state, {_count(state)}"
            if mirror.rooted and not mirror.inner:
                found.rooted.add(at)
        elif odd and name in named and (shown or len(words_of(name)) > 1):
            found.doubtful[*at, name] = [(*at, name, *leaf) for leaf in odd]
    sure |= _other_state(node, sure)
    if len(sure) < len(node):
        found.left |= {(*at, name): what for name, what in sure.items()}
    kept = {name: value for name, value in node.items() if name not in sure and (*at, name) not in found.doubtful}
    found.copies += [(*at, name) for name in copies_in(kept, bool(sure))]
    if len(at) < _DEPTH:
        for name, value in kept.items():
            if isinstance(value, dict) and name != "params":  # `params` is the model itself
                _search(value, (*at, name), found)
    add_runs(kept, at, found)
    if not sure and any(path[: len(at)] == at for path in found.left):  # the counters stand around the run
        found.left |= {(*at, name): what for name, what in _other_state(node, {"": ""}).items()}


# ---------------------------------------------------------------- an optimizer


def is_optimizer_name(name: str) -> bool:
    words = words_of(name)
    return family(name) == "optimizer" or bool(words & {"opt", "optax", "tx"} and words <= _OPTIMIZER)


def _is_run(node: Node, named: bool) -> bool:
    """True for weights with an optimizer's state of their own, or a node that holds such. This is not an optimizer's
    state, even if all of it mirrors another network in training. named: it has the name of an optimizer's state."""
    own = {name for name in node if is_optimizer_name(name)}
    parts = {k: v for k, v in node.items() if isinstance(v, dict) and v and (k in own or k not in _MOMENTS)}
    for name, child in parts.items():
        if (is_usual(name) and name not in _OF_STATES and not _has_moments(child)) or (name == "params" and not named):
            return True
    if named:  # optax's own states nest too: SAM's has `opt_state` beside `cache`
        return False
    weights = [child for name, child in parts.items() if name not in own]
    return 0 < len(weights) < len(parts) or any(_is_run(child, False) for child in weights)


def _copies_in(state: Node, weights: Node) -> int:
    """The number of whole copies of the weights in a state, each below a field of the state, compared by paths and
    shapes."""
    sets = [dict(leaves_in(weights))]
    for part in weights.values():
        if isinstance(part, dict):
            sets.append(dict(leaves_in(part)))
            if isinstance(inner := part.get("params"), dict):
                sets.append(dict(leaves_in(inner)))
    wanted = [{(path, spec.shape) for path, spec in paths.items()} for paths in sets if paths]

    def within(node: Node) -> int:
        if {(path, spec.shape) for path, spec in leaves_in(node)} in wanted:
            return 1
        return sum(within(child) for child in node.values() if isinstance(child, dict))

    return sum(within(child) for child in state.values() if isinstance(child, dict))


def _own_moments(node: Node) -> dict[str, str]:
    """The two moments that stand beside the weights themselves, and not in an optimizer's state: each repeats every
    weight of a container with a usual name, and a counter stands beside them."""
    counters = any(not isinstance(child, dict) and is_small(child) and _is_count(name) for name, child in node.items())
    weights = [_shapes(child) for name, child in node.items() if isinstance(child, dict) and is_usual(name)]
    out: dict[str, str] = {}
    for pair in MOMENTS_OF_ADAM if counters else ():
        moments = [node.get(name) for name in pair]
        if all(isinstance(moment, dict) and _shapes(moment) in weights for moment in moments):
            out |= {name: f"an optimizer's moment, {_count(node[name])}" for name in pair}
    return out


def _shapes(node: Node) -> dict[Parts, tuple[int, ...]]:
    return {path: spec.shape for path, spec in leaves_in(node)}


def _has_moments(node: Node) -> bool:
    if _is_twin_state(node):
        return True
    return any(name in _MOMENTS or (isinstance(child, dict) and _has_moments(child)) for name, child in node.items())


def _is_twin_state(node: Node) -> bool:
    """True for a counter beside two moments of one structure."""
    return any(
        all(isinstance(node.get(name), dict) for name in pair) and _shapes(node[pair[0]]) == _shapes(node[pair[1]])
        for pair in MOMENTS_OF_ADAM
    ) and _is_counted(node)


def _is_counted(node: Node) -> bool:
    """True if it holds a counter, as most optimizer states do. A model's copy (`momentum/encoder`) has none."""
    return any(is_small(spec) and spec.kind in "iu" and _is_count(leaf[-1]) for leaf, spec in leaves_in(node))


@dataclass(slots=True)
class _Mirror:
    """The weights that a state may mirror: their paths with the container names (`full`) or below them (`below`)."""

    full: dict[Parts, set[tuple[int, ...]]]
    below: dict[Parts, set[tuple[int, ...]]]
    totals: set[int]
    rooted: int = 0  # leaves found by their full paths
    inner: int = 0
    same: int = 0  # leaves whose whole path is a weight's, without an optimizer field before or after it

    @classmethod
    def of(cls, containers: Node) -> _Mirror:
        full: dict[Parts, set[tuple[int, ...]]] = {}
        below: dict[Parts, set[tuple[int, ...]]] = {}
        parts = [value for value in containers.values() if isinstance(value, dict)]
        sizes = [sum(spec.size for _, spec in leaves_in(part)) for part in parts]
        for path, spec in leaves_in(containers):
            full.setdefault(path, set()).add(spec.shape)
            for start in (1, 2):  # {"params": ...}, and {"model": {"params": ...}}
                if len(path) > start:
                    below.setdefault(path[start:], set()).add(spec.shape)
        return cls(full, below, {sum(sizes), *sizes})

    def holds(self, leaf: Parts, spec: TensorSpec) -> bool:
        """True if the leaf of a state mirrors a weight: its name and shape match. The name alone is enough if an
        optimizer field stands before it (factored and stacked moments have other shapes) or after it."""
        for stop in (len(leaf), len(leaf) - 1):
            for start in range(stop):
                tail = leaf[start:stop]
                for known, kind in ((self.full, "rooted"), (self.below, "inner")):
                    if tail not in known:
                        continue
                    if stop < len(leaf) or spec.shape in known[tail] or not _MOMENTS.isdisjoint(leaf[:start]):
                        setattr(self, kind, getattr(self, kind) + 1)
                        self.same += tail == leaf
                        return True
        # optax.flatten: all weights as one vector
        return len(spec.shape) == 1 and not _MOMENTS.isdisjoint(leaf) and spec.size in self.totals

    def is_twin(self) -> bool:
        return 0 < self.same == self.rooted + self.inner


def _none_of_an_optimizer(state: Node, mirror: _Mirror) -> list[Parts]:
    """The leaves of a state that do not fit an optimizer: they are not numbers, not random keys, and do not mirror a
    weight."""
    mirror.rooted = mirror.inner = mirror.same = 0
    return [
        leaf
        for leaf, spec in leaves_in(state)
        if not mirror.holds(leaf, spec)
        and not is_small(spec)
        and not _is_key(leaf[-1], spec)
        and not (leaf[-1] in _COEFFICIENTS and spec.size <= 64)
    ]


# ---------------------------------------------------------------- other training state


def _other_state(node: Node, optimizers: Mapping[str, str]) -> dict[str, str]:
    """Counters, random keys, loss scales and the like beside weights. They are recognised beside an optimizer's state.
    Beside `params`, where Linen keeps collections and not single arrays, whole numbers and random keys are recognised
    too."""
    variables = isinstance(node.get("params"), dict)
    if not variables and not optimizers:
        return {}
    out: dict[str, str] = {}
    for name, value in node.items():
        if name in optimizers or name == "params":
            continue
        every = [value] if not isinstance(value, dict) else [spec for _, spec in leaves_in(value)]
        if _is_random(name, value):
            out[name] = f"random state, {_count(value)}"
        elif not all(map(is_small, every)) or not every:
            continue
        elif not isinstance(value, dict) and _is_count(name) and (optimizers or value.kind in "iu"):
            out[name] = f"a number of the run, {value}"
        elif optimizers and (family(name) in _SMALL or _is_scale(name) or name in ("metrics", "metric")):
            out[name] = f"numbers of the run, {_count(value)}"
    return out


def _is_count(name: str) -> bool:
    return is_count(name) or name in ("count", "version")


def _is_scale(name: str) -> bool:
    words = words_of(name)
    return len(words) > 1 and words <= _SCALES


def _is_random(name: str, value: Any) -> bool:
    words = words_of(name)
    if not words & _STREAMS or not words <= _RANDOM:
        return False
    if not isinstance(value, dict):
        return _is_key(name, value)
    leaves = list(leaves_in(value))
    keys = [leaf for leaf, spec in leaves if spec.kind == "u" and not is_small(spec)]
    return bool(keys) and all(
        _is_key(leaf[-1], spec) or (is_small(spec) and spec.kind in "iu") for leaf, spec in leaves
    )


def _is_key(name: str, spec: TensorSpec) -> bool:
    """True for the data of a jax random key: uint32[2] or [4], or an array of them."""
    return spec.dtype == "uint32" and bool(spec.shape) and spec.shape[-1] in (2, 4) and words_of(name) <= _RANDOM


def _count(value: Any) -> str:
    count = sum(1 for _ in leaves_in(value)) if isinstance(value, dict) else 1
    return f"{count} leaves" if count != 1 else "1 leaf"
