"""Make the new value of one leaf from whatever the user gave, in the leaf's shape and dtype, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from graftax.adapters.containers import is_tensor
from graftax.adapters.jax_arrays import is_tracer
from graftax.adapters.jax_parts import is_split, traced_with_part, with_parts
from graftax.errors import Failure, GraftaxError, PlanError
from graftax.ops import LeafValue, Misfit, misfit_of
from graftax.ops.replace_op import value_data
from graftax.surgery.array_parts import as_array, as_codes, as_stored, host_part, own_part
from graftax.surgery.donors import FromCheckpoint, PartOfDonor, Target, donor_key, owner, readings_of, same_leaf
from graftax.surgery.given import VALUES, Computed, Given, given, kind_of, value_text
from graftax.surgery.places import Place
from graftax.surgery.roles import role_in
from graftax.surgery.selecting import Parts
from graftax.surgery.values import Mix, Quantized
from graftax.tree import Checkpoint, LeafIndex, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class InParts:
    """New values in parts of the leaf; the other elements stay. `home`: as in `Place`."""

    reads: ClassVar[bool] = True
    parts: Parts
    home: Callable[[], Checkpoint]

    @property
    def text(self) -> str:
        shown = (("" if index is None else f"{index.text} ") + value_text(value) for index, value in self.parts.items)
        return ", ".join(shown)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        return _with_parts(Place(path, spec, self.home), self.parts, old, lambda: old)

    def as_data(self) -> Any:
        items = [
            {"index": None if index is None else index.text, "value": value_data(kind_of(value))}
            for index, value in self.parts.items
        ]
        return {"kind": "parts", "items": items}


def leaf_value(place: Place, value: Any) -> LeafValue:
    """What the user gave, as the value of a place. Misfit if an array does not fit; PlanError."""
    if isinstance(value, Parts):
        return InParts(value, place.home)
    if isinstance(value, FromCheckpoint):
        value = replace(value, target=target_of(place.home(), place.path))
        return value if place.index is None else _donor_of_part(place, value, place.index)
    if isinstance(value, Mix):
        donor = leaf_value(place, value.donor)
        return replace(value, donor=donor.array if isinstance(donor, Given) else donor)
    if isinstance(value, Quantized):
        return replace(value, role=role_in(place, value))
    made = kind_of(value)
    if isinstance(made, Given):
        new = given(place.name, place.spec, value)
        if len(place.spec.shape) > 1 and is_tensor(value):
            _refuse_two_readings(place, value)
        return Given(new)
    return made


def checked_value(place: Place, value: Any) -> LeafValue:
    """As `leaf_value`. It raises what `new_leaf` would, as far as the shape and dtype of a leaf tell. Nothing is known
    of a function."""
    made = leaf_value(place, value)
    if (check := getattr(made, "check", None)) is not None:
        check(place.name, place.spec)
    return made


def new_leaf(place: Place, value: Any, old: Any, host: Callable[[], Any]) -> Any:
    """What comes into the place: an array of its spec (packed types also as their bytes).

    old   the old leaf, whole
    host  gives its values as NumPy

    Raises Misfit and other GraftaxErrors. An exception of a user's function passes through, with the path as a note.
    """
    if isinstance(value, Parts):
        return _with_parts(place, value, old, host)
    made: Any = leaf_value(place, value)
    if _is_traced(value, old):
        return made.traced(place.name, place.spec, old if place.index is None else old[place.index.key])
    if isinstance(made, Computed):
        return made.of(place.name, place.spec, own_part(place, old, host))
    return made.apply(place.name, place.spec, host_part(place, old, host) if made.reads else None)


def _is_traced(value: Any, leaf: Any) -> bool:
    """True if the new leaf is computed from traced values: the leaf's own, or those of a donor."""
    if not isinstance(value, VALUES) or not value.reads or is_tensor(leaf):
        return False
    return is_tracer(leaf) or (isinstance(value, Mix) and is_tracer(value.donor))


def _refuse_two_readings(place: Place, tensor: Any) -> None:
    """Misfit for a torch tensor that fits a Flax leaf both unchanged and transposed from torch's layout: a square
    weight. An array of NumPy or jax is taken unchanged."""
    from graftax.execute.opening import open_tree

    target = target_of(place.home(), place.path)
    if target.side != "torch":
        target = replace(target, side="flax", module=target.module if place.index is None else None)
        readings = readings_of(open_tree({"weight": tensor}), "weight", place.path, place.spec, target)
        if len(readings) > 1:
            raise Misfit(
                Failure(
                    "a torch tensor of this shape fits in more than one way",
                    key=place.name,
                    next=f'Write gx.from_checkpoint({{"weight": tensor}}, layout=...): {" or ".join(readings)}.',
                )
            )


def target_of(tree: Checkpoint, path: str) -> Target:
    """A leaf as a donor sees it: its side and the live module that holds it."""
    module, role = owner(tree, same_leaf(tree, path) or path)
    return Target(tree.side, module, role, tree.side_by == "names")


def _donor_of_part(place: Place, value: FromCheckpoint, index: LeafIndex) -> LeafValue:
    """The donor of a part of a leaf. One that has the size of the whole leaf gives the same part of itself."""
    donor: Any = value.opened().source
    key = donor_key(donor, value.key, place.path) if value.plan is None else None
    if key is None or donor[key].size == place.leaf.size != place.spec.size:
        return PartOfDonor(value, place.path, place.leaf, index)
    assert value.target is not None
    return replace(value, key=key, target=replace(value.target, module=None))


# ---------------------------------------------------------------- parts of one leaf


def _with_parts(place: Place, parts: Parts, old: Any, host: Callable[[], Any]) -> Any:
    """The old leaf with new values in its parts; every other element keeps its bits. A leaf on several devices stays
    there: of its shards only those are read and written that a part reaches. PlanError that lists every part that does
    not fit."""
    base: Any = None
    made: list[tuple[LeafIndex, Any]] = []
    failures: list[Failure] = []
    for index, value in parts.items:
        part = place.at(index)
        try:
            new = new_leaf(part, value, old, host)
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            failures += misfit_of(part.name, error).failures
            continue
        if index is None:
            base = new
        else:
            made.append((index, new))
    if failures:
        raise Misfit(*failures)
    if any(map(is_tracer, (old, base, *(new for _, new in made)))):
        if is_tensor(old):
            raise PlanError("a torch tensor cannot take a traced value")
        whole = old if base is None else base
        for index, new in made:
            whole = traced_with_part(whole, index.key, new)
        return whole
    spec = place.leaf
    if base is None and is_split(old):
        ranged = [(index.ranges(spec.shape), new) for index, new in made]
        return with_parts(old, [(at, as_array(new).reshape([*map(len, at)])) for at, new in ranged])
    whole = as_codes(host() if base is None else base, spec).copy()
    for index, new in made:
        whole[index.key] = as_array(new)
    return as_stored(whole, spec)
