"""Take the names away from model pairs, on both sides, and count how many plans running alone decides.

    python scripts/blank_names.py FOLDER [PAIR ...] [--seed N] [--keep-buffers] [--json OUT]

FOLDER holds pairs as Python modules p*.py: torch_model() -> torch module, flax_model() -> (Linen module, example
arguments) or an nnx.Module, inputs() -> torch's arguments in NumPy, fx(*inputs) -> Flax's (optional), true_map(state)
-> {Flax path: array}; ty and fy (optional) pick outputs. Every module and parameter name becomes a random word that
tells nothing; the trees keep their form. On the Flax side no layer is to be seen either: one call of the whole program.

Exact: no question is left, and on other weights every leaf is the true map's, or the outputs agree. WRONG: complete and
neither. Exit 1 for any WRONG.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from flax.traverse_util import unflatten_dict
from torch import nn

import graftax as gx

TOLERANCE = 2e-4
LETTERS = "bcdfghjkmnpqrstvwxz"
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def words(seed: int) -> Iterator[str]:
    """Random words, each once; their order says nothing."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while True:
        word = "".join(draw.choices(LETTERS, k=6))
        if word not in seen:
            seen.add(word)
            yield word


# ---------------------------------------------------------------- torch


def blank_torch(module: nn.Module, seed: int = 0, buffers: bool = True) -> tuple[nn.Module, dict[str, str]]:
    """A copy whose children, parameters and (if asked) buffers have random names, which its own code reaches by the old
    ones; and new key -> old key of the state_dict."""
    made = copy.deepcopy(module)
    old = list(made.state_dict())
    draw = words(seed)
    for each in list(made.modules()):
        _blank_module(each, draw, buffers)
    return made, dict(zip(made.state_dict(), old, strict=True))


def _blank_module(module: nn.Module, draw: Iterator[str], buffers: bool) -> None:
    names: dict[str, str] = {}
    tables = (module._parameters, module._modules, *([module._buffers] if buffers else []))
    for table in tables:
        items = [(name, next(draw), value) for name, value in table.items()]
        names |= {name: word for name, word, _ in items}
        table.clear()
        table.update((word, value) for _, word, value in items)
    module._non_persistent_buffers_set = {names.get(name, name) for name in module._non_persistent_buffers_set}
    if type(module) in RECURRENT:  # known by their class: plain attributes, which copies and casts keep
        module.__dict__.update((name, module._parameters[word]) for name, word in names.items())
    elif names:
        module.__class__ = _class_of(type(module), names)


def _class_of(base: type, names: Mapping[str, str]) -> type:
    """A class like `base` in which every name of `names` stands for another."""
    own: dict[str, Any] = {
        "__module__": base.__module__,
        "__getattr__": lambda self, name: base.__getattr__(self, names.get(name, name)),  # pyright: ignore
    }
    if issubclass(base, nn.ModuleList):
        own["__getitem__"] = _item_of_list
    elif issubclass(base, nn.ModuleDict):
        own |= {
            "__getitem__": lambda self, key: self._modules[names[key]],
            "__contains__": lambda self, key: key in names,
            "__iter__": lambda self: iter(names),
            "keys": lambda self: names.keys(),
            "items": lambda self: [(name, self._modules[word]) for name, word in names.items()],
        }
    elif issubclass(base, nn.Sequential):
        own["__getitem__"] = _item_of_sequence
    return type(base.__name__, (base,), own)


def _item_of_list(self: nn.ModuleList, index: Any) -> Any:
    found = list(self._modules.values())[index]
    return nn.ModuleList(found) if isinstance(index, slice) else found


def _item_of_sequence(self: nn.Sequential, index: Any) -> Any:
    found = list(self._modules.values())[index]
    return nn.Sequential(*found) if isinstance(index, slice) else found


# ---------------------------------------------------------------- Flax


def blank_flax(model: Any, seed: int = 0) -> tuple[Any, dict[str, str]]:
    """A live model that runs `model`, a gx.linen(...) or an nnx.Module, with its leaves under random names, and the new
    path -> the old path of each leaf."""
    return _blank_nnx(model, seed) if isinstance(model, nnx.Module) else _blank_linen(model, seed)


class Node:
    """A part of a tree of names: its word, its leaves (word, collection, shape, dtype, old path), its children."""

    def __init__(self, word: str) -> None:
        self.word, self.leaves, self.children = word, [], {}

    def __hash__(self) -> int:
        return id(self)

    def add(self, above: Sequence[str], leaf: tuple[Any, ...], draw: Iterator[str]) -> None:
        if above:
            self.children.setdefault(above[0], Node(next(draw))).add(above[1:], leaf, draw)
        else:
            self.leaves.append((next(draw), *leaf))


class Holder(fn.Module):
    """Variables of random names, and what they are called inside the model that it hides."""

    node: Node

    @fn.compact
    def __call__(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for word, collection, shape, dtype, path in self.node.leaves:
            if collection == "params":
                out[path] = self.param(word, lambda key, s=shape, d=dtype: jnp.zeros(s, d))
            else:
                out[path] = self.variable(collection, word, jnp.zeros, shape, dtype).value
        for child in self.node.children.values():
            out |= Holder(child, name=child.word)()
        return out


class Hidden(fn.Module):
    """A model of which only the variables are to be seen."""

    node: Node
    run: Callable[..., Any]

    @fn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(Holder(self.node, name=self.node.word)(), args, kwargs)


def _blank_linen(model: Any, seed: int) -> tuple[Any, dict[str, str]]:
    flat, structure = jax.tree.flatten((model.args, dict(model.kwargs)))
    places = [n for n, leaf in enumerate(flat) if hasattr(leaf, "shape")]

    def init(arrays: list[Any]) -> Any:
        full = list(flat)
        for n, array in zip(places, arrays, strict=True):
            full[n] = array
        args, kwargs = structure.unflatten(full)
        return model.module.init(jax.random.key(0), *args, **kwargs)

    variables = fn.unbox(jax.eval_shape(init, [flat[n] for n in places]))
    draw = words(seed + 1)
    root = Node(next(draw))
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        collection, *above, _ = parts = [key.key for key in keys]
        root.add(above, (collection, leaf.shape, leaf.dtype, "/".join(parts)), draw)

    def run(values: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        return model.module.apply(unflatten_dict(values, sep="/"), *args, mutable=False, **kwargs)

    made = gx.linen(Hidden(root, _opaque(run)), *model.args, **model.kwargs)
    return made, dict(_named(root, ()))


def _named(node: Node, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    here = (*above, node.word)
    for word, collection, _, _, path in node.leaves:
        yield "/".join((collection, *here, word)), path
    for child in node.children.values():
        yield from _named(child, here)


class NnxHolder(nnx.Module):
    """Variables of random names."""


class NnxHidden(nnx.Module):
    """A model of which only the variables are to be seen."""

    def __init__(self, inner: nnx.Module, draw: Iterator[str], names: dict[str, str]) -> None:
        graph, state = nnx.split(inner)
        variables = {"/".join(map(str, keys)): (keys, variable) for keys, variable in nnx.to_flat_state(state)}
        kept = [pair for pair in variables.values() if isinstance(pair[1], nnx.RngState)]
        places: dict[str, tuple[str, ...]] = {}
        folders: dict[tuple[Any, ...], tuple[str, ...]] = {(): ()}
        for path, (keys, variable) in variables.items():
            if isinstance(variable, nnx.RngState):
                continue
            for n in range(1, len(keys)):
                folders.setdefault(keys[:n], (*folders[keys[: n - 1]], next(draw)))
            *above, last = places[path] = (*folders[keys[:-1]], next(draw))
            at: Any = self
            for word in above:
                if not hasattr(at, word):
                    setattr(at, word, NnxHolder())
                at = getattr(at, word)
            setattr(at, last, type(variable)(variable.get_value()))
            names["/".join(places[path])] = path

        def run(values: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
            new = [(variables[path][0], variables[path][1].replace(value)) for path, value in values.items()]
            model = nnx.merge(graph, nnx.from_flat_state([*new, *kept]))
            model.eval()
            return model(*args, **kwargs)

        self.run = _Static((places, _opaque(run)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        places, run = self.run.value
        values: dict[str, Any] = {}
        for path, place in places.items():
            at: Any = self
            for word in place:
                at = getattr(at, word)
            values[path] = at[...]
        return run(values, args, kwargs)


class _Static:
    """Something that NNX keeps as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _blank_nnx(model: nnx.Module, seed: int) -> tuple[Any, dict[str, str]]:
    names: dict[str, str] = {}
    return NnxHidden(model, words(seed + 1), names), names


def _opaque(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as bare steps: traced in a thread of its own, where nothing that listens to modules hears it."""

    def call(values: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        flat, structure = jax.tree.flatten((dict(values), args, kwargs))
        places = [n for n, leaf in enumerate(flat) if hasattr(leaf, "shape")]
        specs = [jax.ShapeDtypeStruct(flat[n].shape, flat[n].dtype) for n in places]
        made: list[Any] = []

        def whole(arrays: list[Any]) -> Any:
            full = list(flat)
            for n, array in zip(places, arrays, strict=True):
                full[n] = array
            return run(*structure.unflatten(full))

        def trace() -> None:
            try:
                made.append(jax.make_jaxpr(whole, return_shape=True)(specs))
            except Exception as error:
                made.append(error)

        thread = threading.Thread(target=trace)
        thread.start()
        thread.join()
        if isinstance(made[0], Exception):
            raise made[0]
        closed, shapes = made[0]
        out = jax.extend.core.jaxpr_as_fun(closed)(*(flat[n] for n in places))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return call


# ---------------------------------------------------------------- one pair


class BlankPair:
    """A pair without names. `pair` is a module or an object as in the head of this file."""

    def __init__(self, pair: Any, seed: int = 0, buffers: bool = True) -> None:
        self.pair = pair
        self.torch, self.keys = blank_torch(pair.torch_model(), seed, buffers)
        self.like, self.paths = blank_flax(_live(pair.flax_model()), seed)
        self.arrays = pair.inputs()

    def inputs(self) -> gx.Inputs:
        """Both calls; outputs of four axes lie channels last in Flax."""
        with torch.no_grad():
            y = self.torch(*map(torch.from_numpy, self.arrays))
        highest = max(a.ndim for a in jax.tree.leaves(_outs(y, getattr(self.pair, "ty", None))))
        layout = None
        if getattr(self.pair, "fy", None) is not None:
            layout = "NCHW -> NHWC" if highest == 4 else "NCL -> NLC"
        return gx.Inputs(torch=tuple(map(torch.from_numpy, self.arrays)), flax=self._fx(self.arrays), out_layout=layout)

    def _fx(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(jnp.asarray, getattr(self.pair, "fx", lambda *a: a)(*arrays)))

    def plan(self, **options: Any) -> Any:
        return gx.plan(self.torch, self.like, **{"inputs": self.inputs(), **options})

    def verdict(self, plan: Any) -> str:
        """exact, asked, refused or WRONG: on other weights and inputs than the plan was made with."""
        if not plan.complete:
            return "asked" if plan.questions else "refused"
        module = _changed(self.pair.torch_model())
        state = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
        got = plan.run({new: torch.from_numpy(state[old]) for new, old in self.keys.items()}, sharding="host")
        values = {self.paths[path]: leaf for path, leaf in _flat(got).items() if path in self.paths}
        want = self.pair.true_map(state)
        if all(path in values and _same(values[path], leaf) for path, leaf in want.items()):
            return "exact"
        draw = np.random.default_rng(5)
        arrays = [
            (a + draw.standard_normal(a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a for a in self.arrays
        ]
        with torch.no_grad():
            y = _outs(module(*map(torch.from_numpy, arrays)), getattr(self.pair, "ty", None))
        z = _outs(self._run(values, self._fx(arrays)), getattr(self.pair, "fy", None))
        return "exact" if _distance(z, y) < TOLERANCE else "WRONG"

    def _run(self, values: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
        live = _live(self.pair.flax_model())
        if not isinstance(live, nnx.Module):
            return live.module.apply(unflatten_dict(values, sep="/"), *args)
        graph, state = nnx.split(live)
        leaves = [
            (keys, variable.replace(jnp.asarray(values["/".join(map(str, keys))])))
            if "/".join(map(str, keys)) in values
            else (keys, variable)
            for keys, variable in nnx.to_flat_state(state)
        ]
        model = nnx.merge(graph, nnx.from_flat_state(leaves))
        model.eval()
        return model(*args)


def _live(made: Any) -> Any:
    """What flax_model() gives, as gx.plan takes it."""
    model, example = made if isinstance(made, tuple) else (made, ())
    return model if isinstance(model, nnx.Module) else gx.linen(model, *example)


def _changed(module: nn.Module) -> nn.Module:
    """The module with other weights."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in OrderedDict([*module.named_parameters(), *module.named_buffers()]).items():
            if not tensor.is_floating_point() or ("running" not in name and name in dict(module.named_buffers())):
                continue
            tensor.mul_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))
            if not name.endswith("var"):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return module


def _flat(tree: Any, above: str = "") -> dict[str, np.ndarray]:
    if hasattr(tree, "items"):
        return {path: leaf for name, sub in tree.items() for path, leaf in _flat(sub, f"{above}{name}/").items()}
    return {above[:-1]: np.asarray(tree)}


def _outs(y: Any, pick: Callable[[Any], Any] | None) -> list[np.ndarray]:
    y = y if pick is None else pick(y)
    return [np.asarray(a.detach() if hasattr(a, "detach") else a) for a in (y if isinstance(y, (tuple, list)) else [y])]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, atol=1e-6, rtol=1e-5)


def _distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(float(np.max(np.abs(x - y))) / (1e-6 + float(np.abs(y).max())) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- all pairs


def main() -> int:
    """Print a line for each pair, and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-buffers", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(given.folder.resolve()))
    names = given.pairs or sorted(f.stem for f in given.folder.glob("p*.py") if f.stem[1].isdigit())
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        start = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            blank = BlankPair(importlib.import_module(name), given.seed, not given.keep_buffers)
            plan = blank.plan()
            row["verdict"] = blank.verdict(plan)
            row["proof"] = None if plan.proof is None else str(plan.proof)
            row["said"] = [str(x)[:400] for x in itertools.islice((*plan.questions, *plan.failures), 4)]
            row["assumed"] = [str(x)[:400] for x in plan.assumptions if "running" in str(x)]
        except gx.errors.GraftaxError as error:
            row = {"verdict": "error", "said": [str(error)[:800]]}
        row["seconds"] = round(time.perf_counter() - start, 2)
        results[name] = row
        why = "" if row["verdict"] == "exact" else f"  {row['said'][:1]} {row.get('assumed', '')}"
        print(f"{name:22} {row['verdict']:8} {row['seconds']:6.1f} s{why}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    verdicts = [row["verdict"] for row in results.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    print(f"{verdicts.count('exact')} of {len(verdicts)} settled exactly with blank names ({counts})")
    return int("WRONG" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
