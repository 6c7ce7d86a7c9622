"""`sharding=`: where each leaf of a tree goes, from the user's argument and from like.

Nothing is replicated silently. These are errors, all reported at once: an axis name that neither the mesh nor the rules
know, a leaf that no selector covers, and a shape that cannot be divided as requested.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftax.adapters import containers
from graftax.adapters.notes import Note, Rules, is_sharding
from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.tree import Checkpoint, Side, TensorSpec, is_glob, match_paths, nearest, subtree
from graftax.tree.dtypes import numpy_dtype

HOST = "host"
Place = Any
"""The place of one leaf: a jax Sharding; None for jax's default device; "host" for a NumPy array."""
_ACCEPTED = (
    "Accepted: None (as like), 'host' (NumPy), a jax Sharding, a Mesh (with like's own axis names), "
    "gx.on_mesh(mesh, specs, rules), a tree of Shardings or PartitionSpecs, or {selector: one of these}."
)


@dataclass(frozen=True, slots=True)
class OnMesh:
    """The result of `on_mesh`: a mesh, and how the leaves are laid out on it."""

    mesh: Any
    specs: Any = None
    rules: Rules = ()


def on_mesh(mesh: Any, specs: Any = None, rules: Any = None) -> OnMesh:
    """The layout of a tree's leaves on `mesh`, for `sharding=`.

      specs  a PartitionSpec for all leaves, a tree of them, or {selector: PartitionSpec}; None: the axis names of like
             (Linen's Partitioned and LogicallyPartitioned boxes, NNX's out_sharding)
      rules  {axis name: mesh axis} or pairs of them, for names that are not mesh axes. A mesh axis may be a tuple of
             several; None means that the axis is not cut. Of pairs with one name, the first applies whose mesh axes the
             leaf does not use yet, as in Linen.

    Raises UsageError if `mesh` is not a jax.sharding.Mesh or the rules are malformed.
    """
    if not _is_mesh(mesh):
        raise UsageError(
            f"on_mesh takes a jax.sharding.Mesh, not {type(mesh).__name__}", next="jax.make_mesh makes one."
        )
    pairs = rules.items() if isinstance(rules, Mapping) else () if rules is None else rules
    try:
        listed = tuple((name, axis) for name, axis in pairs)
    except (TypeError, ValueError):
        raise UsageError("rules are {axis name: mesh axis}, or pairs of these") from None
    failures = [
        Failure("the rule names an unknown mesh axis", key=str(name), expected=_axes_text(mesh), found=escape(part))
        for name, axis in listed
        for part in _axes(axis)
        if part not in mesh.axis_names
    ]
    if failures:
        raise UsageError(f"{len(failures)} rules do not fit the mesh", failures)
    return OnMesh(mesh, specs, listed)


def places(
    sharding: Any, specs: Mapping[str, TensorSpec], side: Side, label: str, like: Checkpoint | None
) -> dict[str, Place]:
    """path -> Place of every leaf of `specs`, the output tree (with its `side`, and its `label` for messages).

    sharding=None follows `like`. Raises UsageError for an argument that is not a sharding, PlanError with every leaf
    that cannot be laid out as requested.
    """
    notes = _notes(like)
    if sharding is None and not notes:
        return dict.fromkeys(specs)
    if sharding is not None and side == "torch":
        raise UsageError(
            "sharding= does not apply to torch tensors",
            next="Leave it out, or use sharding='host' for NumPy arrays.",
        )
    wanted = _PlacementCheck(specs, side, notes, [])
    found = wanted.of(sharding)
    for path, place in found.items():
        wanted.check(path, place, followed=sharding is None)
    if wanted.failures:
        raise PlanError(
            f"{len(wanted.failures)} of {len(specs)} leaves of {escape(label)} cannot be laid out as requested:",
            wanted.failures,
        )
    return found


def spans_processes(sharding: Any, like: Checkpoint | None) -> bool:
    """True if `sharding` (None: the sharding of `like`) names devices of several processes. Then all of them load
    together."""
    if sharding is None:
        notes = _notes(like)
        ambient = _ambient_mesh() if notes else None
        return _spans(ambient) or any(_spans(note.sharding) or _spans(note.mesh) for note in notes.values())
    if isinstance(sharding, OnMesh):
        return _spans(sharding.mesh)
    node = containers.variable_value(sharding) if containers.is_variable(sharding) else sharding
    if _is_spec(node):
        return _spans(_ambient_mesh())
    children = containers.children_of(node)
    if children is None:
        return _spans(node)
    return any(spans_processes(child, None) for _, child in children if child is not None)


def _spans(obj: Any) -> bool:
    """True for a Sharding or a Mesh with devices of several processes."""
    devices = obj.devices.flat if _is_mesh(obj) else obj.device_set if _is_real(obj) else ()
    return len({device.process_index for device in devices}) > 1


def _notes(like: Checkpoint | None) -> Mapping[str, Note]:
    return like.live.placed() if like is not None and like.live.placed is not None else {}


@dataclass(slots=True)
class _PlacementCheck:
    """The requested placement of the leaves `specs`, and the failures found."""

    specs: Mapping[str, TensorSpec]
    side: Side
    notes: Mapping[str, Note]
    failures: list[Failure]

    def of(self, sharding: Any) -> dict[str, Place]:
        if sharding is None:
            return {path: self._as_like(path) for path in self.specs}
        if sharding == HOST:
            return dict.fromkeys(self.specs, HOST)
        if _is_mesh(sharding):
            sharding = on_mesh(sharding)
        mesh, rules, given = None, (), sharding
        if isinstance(sharding, OnMesh):
            mesh, rules, given = sharding.mesh, sharding.rules, sharding.specs
            if given is None:
                return self._by_names(mesh, rules)
        out: dict[str, Place] = {}
        for path, place in self._spread(given).items():
            made = self._made(path, place, mesh, rules)
            if made is not None:
                out[path] = made
        return out

    # ------------------------------------------------------------ from like

    def _as_like(self, path: str) -> Place:
        note = self.notes.get(path, Note())
        own = note.sharding
        if _is_real(own) and note.free:
            own = None  # it is not binding: the box decides
        if _is_real(own):
            return own
        if own is None and note.names is None:
            return None
        mesh = note.mesh if _is_mesh(note.mesh) else _ambient_mesh()
        if mesh is None:
            if own is None and not _many_processes():
                return None  # names without a mesh: nothing needs to be cut
            self._fail(path, "like names axes, but no mesh is given", next="Give sharding=mesh, or use jax.set_mesh.")
            return None
        if own is not None and not own.mesh.empty and dict(own.mesh.shape) != dict(mesh.shape):
            self._fail(path, "like is laid out for another mesh", _axes_text(own.mesh), _axes_text(mesh))
            return None
        return self._noted(path, note, mesh, ())

    def _by_names(self, mesh: Any, rules: Rules) -> dict[str, Place]:
        known = {path: note for path, note in self.notes.items() if path in self.specs}
        if not any(note.names is not None or _spec_of(note.sharding) is not None for note in known.values()):
            raise UsageError(
                "a mesh is given, but like has no axis names or specs for its leaves",
                next="Give specs: sharding=gx.on_mesh(mesh, {'**/kernel': PartitionSpec(...), '**': PartitionSpec()}).",
            )
        out = {path: self._noted(path, known.get(path, Note()), mesh, rules) for path in self.specs}
        return {path: place for path, place in out.items() if place is not None}

    def _noted(self, path: str, note: Note, mesh: Any, rules: Rules) -> Place:
        """The place that a note gives on `mesh`. With the user's own rules its names count first; otherwise a spec that
        jax or Flax has already computed counts first."""
        spec = _spec_of(note.sharding)
        settled = spec is not None and any(part is not None for part in spec)
        if note.names is not None and (rules or not settled):
            return self._translated(path, note.names, mesh, (*rules, *note.rules, *_context_rules()), note.linen)
        return self._named(path, spec if spec is not None else (), mesh)

    # ------------------------------------------------------------ from the user

    def _spread(self, given: Any) -> dict[str, Any]:
        """path -> what `given` says of it: a Sharding, a PartitionSpec or "host"."""
        if _is_place(given):
            return dict.fromkeys(self.specs, given)
        wanted = _selectors(given)
        paths = list(self.specs)
        out: dict[str, Any] = {}
        for _, hits, place in sorted((self._hits(paths, *item) for item in wanted), key=lambda hit: hit[0]):
            out.update(dict.fromkeys(hits, place))
        for path in paths:
            if path not in out:
                self._fail(path, "sharding= does not cover this leaf", next="Add it, or '**' for all remaining leaves.")
        return {path: out[path] for path in paths if path in out}

    def _hits(self, paths: list[str], raw: str, text: str, place: Any) -> tuple[tuple[int, int], list[str], Any]:
        """(rank, paths, place) of a selector. The ranks rise in this order: '**', other globs, a subtree (longer paths
        rank higher), a leaf by name. The highest rank wins."""
        for name in dict.fromkeys((raw, text)):
            if name in self.specs:
                return (2, 0), [name], place
            found = match_paths(paths, name, self.side)
            if found:
                return ((-1 if name == "**" else 0, 0) if is_glob(name) else (2, 0)), found, place
            below = subtree(paths, name, self.side) or subtree(paths, f"params/{name}", self.side)
            if below:
                return (1, -len(below)), below, place
        near = nearest(raw, paths)
        raise PlanError(f"sharding selector {escape(raw)!r} matches nothing", next=f"Near: {near}" if near else "")

    def _made(self, path: str, place: Any, mesh: Any, rules: Rules) -> Place:
        if not _is_spec(place):
            if mesh is not None and place != HOST:
                raise UsageError("on_mesh takes PartitionSpecs; a Sharding has its own mesh: pass it as sharding=")
            return place
        on = mesh if mesh is not None else _ambient_mesh()
        if on is None:
            raise UsageError(
                "PartitionSpecs are given without a mesh",
                next="sharding=gx.on_mesh(mesh, specs), or call inside jax.set_mesh(mesh).",
            )
        return self._translated(path, tuple(place), on, (*rules, *_context_rules()), True)

    # ------------------------------------------------------------ names -> mesh axes

    def _translated(self, path: str, names: tuple[Any, ...], mesh: Any, rules: Rules, ordered: bool) -> Place:
        """A sharding from axis names that rules may translate. A mesh axis that no rule names stands for itself."""
        ruled = {name for name, _ in rules}
        twice = sorted({name for name in names if isinstance(name, str) and name in ruled and names.count(name) > 1})
        if twice:
            self._fail(path, f"axis {', '.join(map(escape, twice))} is named twice in {_spec_text(names)}")
            return None
        parts: list[Any] = [None if isinstance(name, str) and name in ruled else name for name in names]
        used = {axis for part in parts for axis in _axes(part)}
        settled: set[int] = set()
        for name, axis in rules:
            place = names.index(name) if name in names else None
            if place is None or place in settled or (ordered and used & set(_axes(axis))):
                continue
            settled.add(place)
            parts[place] = axis
            used |= set(_axes(axis))
        return self._named(path, parts, mesh)

    def _named(self, path: str, parts: Sequence[Any], mesh: Any) -> Place:
        from jax.sharding import NamedSharding, PartitionSpec

        spec = self.specs[path]
        text = f"{_spec_text(parts)} for {spec}"
        unknown = sorted({str(axis) for part in parts for axis in _axes(part) if axis not in mesh.axis_names})
        if unknown:
            self._fail(
                path,
                f"axis {', '.join(map(escape, unknown))} is neither a mesh axis nor in the rules ({text})",
                expected=_axes_text(mesh),
                next="Add a rule: gx.on_mesh(mesh, specs, rules={name: mesh axis, or None not to cut it}).",
            )
            return None
        try:
            return NamedSharding(mesh, PartitionSpec(*parts))
        except Exception as error:  # jax raises its own classes for a repeated axis and the like
            self._fail(path, f"{text}: {escape(error, 300)}")
            return None

    # ------------------------------------------------------------ checks

    def check(self, path: str, place: Place, followed: bool) -> None:
        """Record a failure if the leaf cannot be divided like this, or if jax would narrow its dtype."""
        if place is None or place == HOST:
            return
        if _is_abstract(place):
            self._fail(path, "its sharding is on an AbstractMesh, which has no devices", next="Give sharding=mesh.")
            return
        spec, parts = self.specs[path], _spec_of(place)
        how = f"{_spec_text(parts)} on {_axes_text(place.mesh)}" if parts is not None else escape(place)
        if parts is not None and len(parts) > len(spec.shape):
            self._fail(path, f"{how} has more axes than {spec}")
        elif parts is not None and any(_is_open(part) for part in parts):
            self._fail(path, f"{how} leaves an axis open", next="Name a mesh axis, or None.")
        elif (why := _uneven(spec.shape, parts, place)) is not None:
            self._fail(
                path, f"{spec} cannot be cut by {how}: {why}", next="All shards of one leaf must have the same shape."
            )
        elif jax_narrows(spec) and not (followed and len(place.device_set) == 1):
            self._fail(
                path,
                f"jax cannot hold {spec.dtype} without jax_enable_x64",
                next="jax.config.update('jax_enable_x64', True), dtype= another, or 'host' for this leaf.",
            )

    def _fail(self, path: str, what: str, expected: str = "", found: str = "", next: str = "") -> None:
        self.failures.append(Failure(what, key=path, expected=expected, found=found, next=next))


def jax_narrows(spec: TensorSpec) -> bool:
    """True if jax, as configured, would hold the leaf in a narrower dtype."""
    import jax

    dtype = numpy_dtype(spec.dtype)
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


# ---------------------------------------------------------------- the user's argument


def _selectors(given: Any) -> list[tuple[str, str, Any]]:
    """(selector as written, the selector as a path, place) from a tree of places or a flat map of selectors."""
    out: list[tuple[str, str, Any]] = []

    linen = containers.is_variables(given)

    def visit(node: Any, keys: tuple[Any, ...]) -> None:
        aside = linen and keys and keys[0] in containers.LINEN_STATE
        if aside or (containers.is_variable(node) and not containers.is_weight(node)):
            return  # random state and caches are not loaded
        inner = containers.variable_value(node) if containers.is_variable(node) else node
        inner = containers.axis_value(inner) if containers.is_axis_box(inner) else inner
        where = containers.path_of(keys)
        if _is_place(inner):
            raw = str(keys[0]) if len(keys) == 1 and isinstance(keys[0], str) else where
            out.append((raw, where, inner))
            return
        children = containers.children_of(inner)
        if children is None:
            at = f" at {escape(where)}" if where else ""
            raise UsageError(
                f"sharding={escape(inner)!r}{at} ({type(inner).__name__}) is not a sharding", next=_ACCEPTED
            )
        for key, child in children:
            visit(child, (*keys, key))

    visit(given, ())
    if not out:
        raise UsageError("an empty tree of shardings says nothing", next=_ACCEPTED)
    return out


def _is_place(obj: Any) -> bool:
    return _is_spec(obj) or is_sharding(obj) or (isinstance(obj, str) and obj == HOST)


def _is_spec(obj: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(obj, jax.sharding.PartitionSpec)


def _is_mesh(obj: Any) -> bool:
    return type(obj).__name__ == "Mesh" and hasattr(obj, "devices") and not obj.empty


def _is_real(obj: Any) -> bool:
    """True for a Sharding over devices."""
    return is_sharding(obj) and not _is_abstract(obj)


def _is_abstract(sharding: Any) -> bool:
    return type(getattr(sharding, "mesh", None)).__name__ == "AbstractMesh"


def _spec_of(sharding: Any) -> tuple[Any, ...] | None:
    spec = getattr(sharding, "spec", None)
    return None if spec is None else tuple(getattr(spec, "partitions", spec))


def _axes(part: Any) -> tuple[Any, ...]:
    """The mesh axes that divide one axis of a leaf."""
    if part is None or _is_open(part):
        return ()
    return tuple(part) if isinstance(part, (tuple, list)) else (part,)


def _is_open(part: Any) -> bool:
    """True for PartitionSpec.UNCONSTRAINED."""
    return type(part).__name__ == "UnconstrainedSingleton"


def _uneven(shape: tuple[int, ...], parts: tuple[Any, ...] | None, sharding: Any) -> str | None:
    """The reason why a shape cannot be divided like this; None if it can."""
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:
        for axis, part in enumerate(parts or ()):
            count = math.prod(sharding.mesh.shape[name] for name in _axes(part))
            if shape[axis] % count:
                return f"axis {axis} has {shape[axis]} rows, which {count} shards do not divide evenly"
        return escape(error, 300)
    return None


def _spec_text(parts: Sequence[Any]) -> str:
    return f"PartitionSpec({', '.join(repr(part) for part in parts)})"


def _axes_text(mesh: Any) -> str:
    return "mesh axes " + ", ".join(f"{escape(name)}={count}" for name, count in mesh.shape.items())


# ---------------------------------------------------------------- context of the call


def _ambient_mesh() -> Any:
    """The mesh of jax.set_mesh; None if none is set."""
    import jax

    get = getattr(jax.sharding, "get_mesh", None)
    mesh = None if get is None else get()
    return mesh if _is_mesh(mesh) else None


def _context_rules() -> Rules:
    """The rules of nn.logical_axis_rules and nnx.logical_axis_rules."""
    spmd = sys.modules.get("flax.core.spmd")
    return () if spmd is None else tuple(spmd.get_logical_axis_rules() or ())


def _many_processes() -> bool:
    import jax

    return jax.process_count() > 1
