"""What the rows of an ablation change: each a leaf, the floating weights of a module, or one head of an attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftax.errors import Failure, LayoutError, PlanError, UsageError, escape, option
from graftax.layers.heads import output_projection
from graftax.surgery import select
from graftax.surgery.live import LiveTree, live_tree
from graftax.surgery.selecting import listed, selector_text
from graftax.tree import Checkpoint, Side, match_paths, nearest

EACH = ("leaf", "module", "head")


@dataclass(frozen=True, slots=True)
class Target:
    """What one row changes.

    path    the leaf or the module that the row is called by; a scanned module with the place of its layer: `layers[3]`
    leaves  the selectors of `replace` that take the value: paths, each with the index of a part where it is one
    head    the number of the head, where it is one
    """

    path: str
    leaves: tuple[str, ...]
    head: int | None = None

    @property
    def text(self) -> str:
        return self.path if self.head is None else f"{self.path} head {self.head}"


def leaf_targets(params: Any, selector: Any, exclude: Any) -> list[Target]:
    """One target for each leaf, or part of a leaf, that the selector picks, in the tree's order. Names that share their
    memory (tied weights of a state_dict) are one target. PlanError if nothing is selected."""
    live = live_tree(params)
    names = _tied(live)
    found: dict[str, Target] = {}
    for text in select(params, selector, exclude):
        path = text if text in live.leaves else text[: text.rindex("[")]
        every = [name + text.removeprefix(path) for name in names.get(path, (path,))]
        found.setdefault(every[0], Target(text, tuple(every)))
    return list(found.values())


def module_targets(params: Any, selector: Any, exclude: Any) -> list[Target]:
    """One target for each module that the selector picks: all floating leaves below it but the excluded ones. A glob
    passes over modules that have none.

    Raises PlanError if nothing is selected, UsageError for a selector that is no text.
    """
    live = live_tree(params)
    names = _tied(live)
    kept = set(select(params, "**", exclude))
    made: list[Target] = []
    empty: list[str] = []
    for module, below in picked_modules(live, selector).items():
        weights = [path for path in below if path in kept and live.spec(path).floating]
        leaves = {name: None for path in weights for name in names.get(path, (path,))}
        if leaves:
            made.append(Target(module, tuple(leaves)))
        elif module in _texts(selector):
            empty.append(module)
    if empty or not made:
        none = f"nothing that {selector_text(selector)} selects has floating weights to change"
        failures = [Failure("has no floating weights to change", key=module) for module in empty] or [Failure(none)]
        raise PlanError(f"nothing was run on {escape(live.label)}:", failures)
    return made


def head_targets(params: Any, selector: Any, exclude: Any, tree: Checkpoint, start: str = "") -> list[Target]:
    """One target for each query head of each attention that the selector picks: its part of the output projection.

    tree   the model's leaves with its modules, or those of the weights
    start  what its paths have before those of the weights: 'params/' where these are params alone

    Raises PlanError if nothing is selected, or heads are not found.
    """
    live = live_tree(params)
    kept = set(select(params, "**", exclude))
    made: list[Target] = []
    failures: list[Failure] = []
    for module, below in picked_modules(live, selector).items():
        try:
            found = output_projection(tree, module, [start + path for path in below])
        except LayoutError as error:
            what, _, then = str(error).partition("\n")
            failures.append(Failure(what, next=then))
            continue
        path = found.path.removeprefix(start)
        for places, head, index in found.parts() if path in kept else ():
            layer = f"[{', '.join(map(str, places))}]" if places else ""
            made.append(Target(module + layer, (path + index.text,), head))
    if not failures and not made:
        failures.append(Failure(f"every output projection that {selector_text(selector)} selects is excluded"))
    if failures:
        raise PlanError(f"nothing was run on {escape(live.label)}:", failures)
    return made


def picked_modules(live: LiveTree, selector: Any) -> dict[str, list[str]]:
    """module path -> its leaves, for each module that a path, a glob or a list of them picks, in the tree's order.

    A Linen module's path has no collection: its leaves are those of all collections, unless the selector names one.
    """
    side = live.selectable().side
    texts = _texts(selector)
    known = _modules(live, "." if side == "torch" else "/")
    found: dict[str, list[str]] = {}
    failures: list[Failure] = []
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UsageError(
                f"{selector_text(text)} selects no modules", next="Give their path, or a glob: '**/attention'."
            )
        hits = next((hits for modules in known if (hits := _matched(modules, text, side))), {})
        found |= hits
        if not hits:
            failures.append(_no_module(live, text, known[0]))
    if failures:
        raise PlanError(f"nothing was run on {escape(live.label)}:", failures)
    return {path: found[path] for modules in known for path in modules if path in found}


def _texts(selector: Any) -> list[Any]:
    return list(selector) if isinstance(selector, (list, tuple)) else [selector]


def _matched(modules: Mapping[str, list[str]], text: str, side: Side) -> dict[str, list[str]]:
    return {path: modules[path] for path in match_paths(list(modules), text, side)}


def _no_module(live: LiveTree, text: str, known: Mapping[str, Any]) -> Failure:
    hit = match_paths(list(live.leaves), text, live.selectable().side)
    if hit:
        return Failure(
            f"{escape(repr(text))} selects leaves, not modules: {listed(hit)}",
            next=f"{option('each', 'leaf')} takes leaves. A module is selected by its own path; "
            f"{option('exclude')} keeps leaves as they are.",
        )
    near = nearest(text, known) or listed(known)
    return Failure(f"{escape(repr(text))} is no module", next=f"Near: {near}" if near else "The tree has no modules.")


# ---------------------------------------------------------------- the tree


def _tied(live: LiveTree) -> dict[str, tuple[str, ...]]:
    """name -> all names of the same memory, the one that counts first, of the tied tensors of a state_dict."""
    groups: dict[str, list[str]] = {}
    for name, first in live.other_names().items() if live.torch else ():
        groups.setdefault(first, [first]).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _modules(live: LiveTree, sep: str) -> list[dict[str, list[str]]]:
    """module path -> its leaves, modules in the tree's order: by paths without the collection, then (where there are
    collections) by whole paths."""
    has = live.kind == "container" and any(path.startswith("params/") for path in live.leaves)
    found: list[dict[str, list[str]]] = []
    for start in (1, 0) if has else (0,):
        modules: dict[str, list[str]] = {}
        for path in live.leaves:
            parts = path.split(sep)
            for stop in range(start + 1, len(parts)):
                modules.setdefault(sep.join(parts[start:stop]), []).append(path)
        found.append(modules)
    return found
