"""NNX: Modules, State and (GraphDef, State). Paths are attribute paths, list indices in decimal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from graftax.adapters import containers, flax_tree, jax_arrays, settings
from graftax.errors import Failure, PlanError, UsageError, escape, with_article
from graftax.tree import Checkpoint, Key, Live, Module, Storage
from graftax.tree.dtypes import same_bits


def open_nnx(node: Any, label: str) -> Checkpoint:
    """An nnx.Module (abstract too), an nnx.State or (GraphDef, State) as a Checkpoint.

    Weights are Param, BatchStat, the user's own Variable types, and raw arrays (the scales of nnx.WeightNorm). Random,
    cache, intermediate and optimizer state stays as it is. `aliases` maps the other paths of a shared Param to the
    listed one.
    """
    from flax import nnx

    if isinstance(node, tuple):
        try:
            module = nnx.merge(*node, copy=True)
        except ValueError:  # the state is only a part: its names and values are known, its modules are not
            module = None
        return _open_state(node[1], node, module, label)
    if isinstance(node, nnx.State):
        return _open_state(node, node, None, label)
    parts = split_module(node)
    base = flax_tree.open_container(parts.state, label)
    aliases = aliases_of(node, base)
    return Checkpoint(
        label=label,
        side="flax",
        specs=base.specs,
        storage=Storage(reader=_shown(parts.state, base), aliases=aliases, metadata=base.storage.metadata),
        live=Live(
            modules=modules_of(node, base, aliases),
            object=node,
            rebuild=lambda arrays, sharding=None, adopt=False, rngs=None: join_module(
                parts, with_random_state(_rebuilt(parts.state, arrays, sharding, adopt), rngs)
            ),
            placed=base.live.placed,
        ),
        real_keys=base.real_keys,
    )


def _open_state(state: Any, native: Any, module: Any, label: str) -> Checkpoint:
    base = flax_tree.open_container(state, label)
    aliases = {} if module is None else aliases_of(module, base)
    return Checkpoint(
        label=label,
        side="flax",
        specs=base.specs,
        storage=Storage(reader=_shown(state, base), aliases=aliases, metadata=base.storage.metadata),
        live=Live(
            modules={} if module is None else modules_of(module, base, aliases),
            object=native,
            rebuild=lambda arrays, sharding=None, adopt=False, rngs=None: with_random_state(
                _rebuilt(state, arrays, sharding, adopt), rngs
            ),
            placed=base.live.placed,
        ),
        real_keys=base.real_keys,
    )


def _rebuilt(state: Any, arrays: Mapping[str, Any], sharding: Any, adopt: bool) -> Any:
    """The State with new leaves. PlanError if the model would read other values from it."""
    made = flax_tree.rebuild_container(state, arrays, sharding, adopt)
    failures = _shown_otherwise(made, arrays)
    if failures:
        raise PlanError("these Variables return other values than they were given:", failures)
    return made


def _shown(state: Any, base: Checkpoint) -> Callable[[str], Any] | None:
    """A reader that refuses leaves for which the model reads another value than the stored one."""
    read = base.storage.reader
    own = {path for path, leaf in _variables(state) if containers.is_variable(leaf) and _overrides(leaf, "get_value")}
    if read is None or not own:
        return read

    def reader(path: str) -> Any:
        failures = _shown_otherwise(state, {path}) if path in own else []
        if failures:
            raise PlanError("a Variable cannot be read:", failures)
        return read(path)

    return reader


@dataclass(frozen=True, slots=True)
class SplitModule:
    """A Module as nnx.split gives it, and the keys of raw arrays without values. NNX takes such arrays for static
    attributes of the GraphDef (nnx.eval_shape of a WeightNorm); here they are leaves of the state."""

    graphdef: Any
    state: Any
    abstract: tuple[tuple[Key, ...], ...]


def split_module(module: Any) -> SplitModule:
    import jax
    from flax import nnx
    from jax.core import Tracer

    graphdef, state = nnx.split(module)
    abstract: list[tuple[Key, ...]] = []
    for path, leaf in nnx.iter_graph(module):
        if not isinstance(leaf, (jax.ShapeDtypeStruct, Tracer)) or containers.is_random_key(leaf):
            continue
        keys: Any = tuple(path)
        node = state
        for key in keys[:-1]:
            if key not in node:
                node[key] = {}
            node = node[key]
        if keys[-1] not in node:
            node[keys[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            abstract.append(keys)
    return SplitModule(graphdef, state, tuple(abstract))


def join_module(parts: SplitModule, state: Any) -> Any:
    """A new Module from `parts` and `state`."""
    from flax import nnx

    raw: list[tuple[tuple[Key, ...], Any]] = []
    for keys in parts.abstract:
        node = state
        for key in keys[:-1]:
            node = node[key]
        raw.append((keys, node[keys[-1]]))
        del node[keys[-1]]
    module = nnx.merge(parts.graphdef, state)
    for keys, value in raw:
        holder: Any = module
        for key in keys[:-1]:
            holder = getattr(holder, key) if isinstance(key, str) and hasattr(holder, "__dict__") else holder[key]
        if hasattr(holder, "__dict__") and isinstance(keys[-1], str):
            setattr(holder, keys[-1], _as_data(nnx, value))
        elif isinstance(holder, (dict, list)):
            cast("Any", holder)[keys[-1]] = value
        else:  # an nnx.List
            holder[keys[-1]] = _as_data(nnx, value)
    return module


def with_random_state(state: Any, rngs: Any) -> Any:
    """`state` with its abstract random state made from `rngs` (an nnx.Rngs, or a seed), in a new container.

    Without `rngs` abstract state stays abstract, and a warning names it: the module then works as long as nothing
    random is drawn.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    waiting = [(path, leaf) for path, leaf in _variables(state) if _is_abstract_state(leaf)]
    random = [] if rngs is None else [item for item in waiting if isinstance(item[1], nnx.RngState)]
    left = [path for path, leaf in waiting if rngs is None or not isinstance(leaf, nnx.RngState)]
    if left:
        names = ", ".join(escape(path) for path in left[:3]) + (" ..." if len(left) > 3 else "")
        hint = "pass rngs=nnx.Rngs(seed) to make random state" if rngs is None else "they are not random state"
        warnings.warn(f"{len(left)} non-weight leaves have no values and stay abstract ({names}); {hint}", stacklevel=3)
    made: Any = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    for path, variable in random:
        spec = containers.variable_value(variable)
        if isinstance(variable, nnx.RngKey):
            tag = variable.get_metadata("tag", "default")
            key = getattr(made, tag)() if tag in made else made()
            value = jax.random.split(key, spec.shape) if spec.shape else key
            if value.dtype != spec.dtype:
                raise UsageError(f"{escape(path)} is {with_article(str(spec.dtype))}, rngs gives {value.dtype}")
        else:
            value = jnp.zeros(spec.shape, spec.dtype)
        containers.set_variable(variable, value)
    return state


def _variables(state: Any) -> list[tuple[str, Any]]:
    from flax import nnx

    pairs: Any = nnx.to_flat_state(state)
    return [(containers.path_of(tuple(keys)), leaf) for keys, leaf in pairs]


def _is_abstract_state(leaf: Any) -> bool:
    if not containers.is_variable(leaf) or containers.is_weight(leaf):
        return False
    value = containers.variable_value(leaf)
    return hasattr(value, "dtype") and jax_arrays.is_abstract(value)


def _as_data(nnx: Any, value: Any) -> Any:
    """Mark the attribute as data: NNX marked it as static when it had no values."""
    return nnx.data(value) if hasattr(nnx, "data") else value


# ---------------------------------------------------------------- aliases and modules of the graph


def aliases_of(node: Any, base: Checkpoint) -> dict[str, str]:
    """The other path of a shared Variable, or of a leaf in a shared Module -> the listed path."""
    from flax import nnx

    aliases: dict[str, str] = {}
    for group in nnx.find_duplicates(node):
        paths: list[Any] = [tuple(path) for path in group]
        names = [containers.path_of(path) for path in paths]
        below = [[path for path in base if path == name or path.startswith(f"{name}/")] for name in names]
        listed = next((i for i, paths in enumerate(below) if paths), None)
        if listed is None:
            continue
        for i, name in enumerate(names):
            if i != listed:
                aliases |= {name + path[len(names[listed]) :]: path for path in below[listed] if not below[i]}
    return aliases


def modules_of(node: Any, base: Checkpoint, aliases: Mapping[str, str]) -> dict[str, Module]:
    """module path -> Module, parents first, in the order in which attributes were set. A shared leaf appears under its
    own role with the path that the state has."""
    from flax import nnx

    found: dict[Any, Any] = {tuple(path): module for path, module in nnx.iter_modules(node)}
    ranked = sorted(found, key=lambda keys: _rank(node, keys))
    below: dict[str, dict[str, str]] = {containers.path_of(keys): {} for keys in ranked}
    for full, listed in [*((path, path) for path in base), *aliases.items()]:
        parts = full.split("/")
        for i in range(len(parts)):
            leaves = below.get("/".join(parts[:i]))
            if leaves is not None:
                leaves["/".join(parts[i:])] = listed
    return {
        name: Module(
            name,
            type(found[keys]).__name__,
            settings.bases(type(found[keys])),
            settings.collect(vars(found[keys]).items()),
            below[name],
            *settings.calls_of(type(found[keys]), vars(found[keys])),
            settings.code_of(type(found[keys])),
        )
        for name, keys in zip(below, ranked, strict=True)
    }


def _rank(node: Any, keys: tuple[Key, ...]) -> tuple[int, ...]:
    """The position of `keys` in the order of attributes, dict keys and list items, from the root down."""
    out: list[int] = []
    current: Any = node
    for key in keys:
        if isinstance(current, Mapping) and not hasattr(current, "__dict__"):
            names = list(current)
            out.append(names.index(key) if key in names else 0)
            current = current.get(key)
        elif isinstance(current, (list, tuple)) and isinstance(key, int):
            out.append(key)
            current = current[key] if key < len(current) else None
        elif hasattr(current, "__dict__") and (key in vars(current) or str(key) in vars(current)):
            name: Any = key if key in vars(current) else str(key)  # an nnx.List may use either kind of key
            out.append(list(vars(current)).index(name))
            current = vars(current)[name]
        else:
            out.append(key if isinstance(key, int) else 0)
            current = None
    return tuple(out)


# ---------------------------------------------------------------- in place, and one leaf at a time


def map_module(module: Any, arrays: Mapping[str, Any], make: flax_tree.Make) -> Any:
    """A new Module with new leaves at the paths of `arrays`; every other leaf is the same array object."""
    parts = split_module(module)
    return join_module(parts, flax_tree.make_container(parts.state, arrays, make))


def assign_module(module: Any, arrays: Mapping[str, Any], given: bool = False) -> None:
    """Set the values of a Module's weights in place. Everything is checked and every array made before the first is
    set. Then the values are read back, and on a failure the old values are restored. `given`: the arrays become the
    leaves as they are. PlanError lists the leaves that do not fit or do not read back."""
    state = split_module(module).state
    found = flax_tree.leaf_table(state, "the module")
    flax_tree.check_fit(found, arrays, "the module")
    abstract = [path for path in arrays if jax_arrays.is_abstract(found[path])]
    if abstract:
        raise UsageError(
            f"{len(abstract)} leaves have no values that could be set in place; the first is {escape(abstract[0])}",
            next="gx.port(source, module) returns a new Module.",
        )
    make = flax_tree.maker("given" if given else None)
    new = {path: make(path, found[path], array) for path, array in arrays.items()}
    old = {path: found[path] for path in arrays}
    try:
        _set(module, state, new)
        failures = _not_held(module, new)
    except BaseException:
        _set(module, state, old, hooks=False)
        raise
    if failures:
        _set(module, state, old, hooks=False)
        raise PlanError(
            f"nothing was assigned to the {escape(type(module).__name__)}: it does not read back what it was given",
            failures,
        )


def _set(module: Any, state: Any, new: Mapping[str, Any], hooks: bool = True) -> None:
    """Store `new` (path -> leaf) in the Variables of a Module, through their own set_value if they have one, and in its
    raw arrays. state: the Module's state, for its paths."""
    from flax import nnx

    raw: dict[Any, Any] = {}
    for keys, leaf in cast("Any", nnx.to_flat_state(state)):
        prefix = containers.path_of(tuple(keys))
        if not containers.is_variable(leaf):
            if prefix in new:
                raw[tuple(keys)] = new[prefix]
            continue
        if not any(path == prefix or path.startswith(f"{prefix}/") for path in new):
            continue
        variable = _at(module, keys)

        def visit(path: str, old: Any, prefix: str = prefix) -> Any:
            return new.get(f"{prefix}/{path}" if path else prefix, old)

        value = containers.remade(containers.variable_value(variable), visit)
        if hooks and _overrides(variable, "set_value"):
            variable.set_value(value)
        else:
            containers.set_variable(variable, value)
    if raw:
        nnx.update(module, nnx.from_flat_state(raw))


def _at(module: Any, keys: Iterable[Key]) -> Any:
    """The value that a Module holds at a path."""
    for key in keys:
        if isinstance(key, str) and not isinstance(module, Mapping):
            module = getattr(module, key)  # works for named tuples too
        else:
            module = cast("Any", module)[key]
    return module


def _not_held(module: Any, new: Mapping[str, Any]) -> list[Failure]:
    """The paths at which a Module does not hold the new leaf bit for bit (two Variables over one array reference), and
    those at which its code reads another value."""
    state = split_module(module).state
    now = flax_tree.leaf_table(state, "the module")
    failures = [
        Failure("does not read back as it was assigned", key=path)
        for path, leaf in new.items()
        if path not in now or not (now[path] is leaf or _same(now[path], leaf))
    ]
    return [*failures, *_shown_otherwise(state, new)]


def _shown_otherwise(state: Any, paths: Collection[str]) -> list[Failure]:
    """The Variables of a State at `paths` for which the model reads another value than the stored one, through their
    own get_value or on_get_value."""
    out: list[Failure] = []
    for path, variable in _variables(state):
        if path not in paths or not containers.is_variable(variable) or not _overrides(variable, "get_value"):
            continue
        stored = containers.variable_value(variable)
        if not jax_arrays.is_abstract(stored) and not _same(variable.get_value(), stored):
            text = f"the model reads another value than the stored one: {type(variable).__name__} has its own get_value"
            out.append(Failure(text, key=path, next="Port with plain Variables, then set the values."))
    return out


def _overrides(variable: Any, name: str) -> bool:
    """True if a Variable has its own `get_value` or `set_value`, or (deprecated) hooks that do the same."""
    from flax import nnx

    own = getattr(type(variable), name, None) is not getattr(nnx.Variable, name, None)
    return own or bool(variable.get_metadata().get(f"on_{name}"))


def _same(a: Any, b: Any) -> bool:
    """True if equal bit for bit. An array of which a part lies in other processes is not compared."""
    import numpy as np

    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in (a, b)):
        return getattr(a, "shape", None) == b.shape and a.dtype == b.dtype
    return same_bits(np.asarray(a), np.asarray(b))
