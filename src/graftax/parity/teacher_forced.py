"""The Flax side of the forced pass. Every paired module gets the reference input, and its reference output is passed
on. So each module, and each piece of code between two modules, is judged alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.parity.align import NEAR, Alignment, Turn
from graftax.parity.metrics import alarms, relative_l2
from graftax.parity.pairing import CallMap, ModulePair
from graftax.parity.records import THRESHOLD, Reference, Site

MASK = 1e4
"""A value this large stands for minus infinity. Models write masks in many ways; masks match only if they are equal."""
KEPT = 6
"""How many alarms keep their arrays for the search for causes."""

Args = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Match:
    """Flax array number `flax` is torch array number `torch` (of shape `taken`) after `turn`."""

    flax: int
    torch: int
    turn: Turn
    taken: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Met:
    """What the forced pass saw at one Flax call: the errors (None: nothing could be compared), the reason why not, and
    the matched arrays. in_floor: the error of the input that float32 explains."""

    site: Site
    in_error: float | None = None
    in_floor: float = 0.0
    out_error: float | None = None
    free_error: float | None = None
    text: str = ""
    inward: tuple[Match, ...] = ()
    outward: tuple[Match, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """The arrays of a call that alarms: the input that arrived, the input given instead, the output, and the wanted
    output. All in Flax's layout."""

    arrived: Args
    given: Args
    output: Any = None
    wanted: Any = None


@dataclass(slots=True, eq=False)
class ForcedTap:
    """Gives every paired Flax call the reference input, and measures the input and output that Flax had. Used for one
    pass."""

    reference: Reference
    calls: CallMap
    alignments: Mapping[ModulePair, Alignment]
    threshold: float = THRESHOLD
    met: dict[Site, Met] = field(default_factory=dict[Site, Met])
    kept: dict[Site, Arrays] = field(default_factory=dict[Site, Arrays])
    extra: dict[str, int] = field(default_factory=dict[str, int])
    """Flax path -> how many calls have no torch call."""
    _open: dict[Site, Arrays] = field(default_factory=dict[Site, Arrays])
    _unforced: float = 0.0
    """Flax goes on with its own output after a layer whose output could not be matched. What arrives at later layers
    may then carry what float32 loses up to there: the most that torch itself loses in such a layer and before it."""
    _begun: int = 0
    _uncalled: dict[Site, float] = field(default_factory=dict[Site, float])
    """Flax calls that torch made before the present one and Flax did not: what torch loses up to each."""
    _layers: list[tuple[Site, Site]] = field(init=False)
    """(torch call, Flax call) of every layer, in torch's order."""
    _place: dict[Site, int] = field(init=False)

    def restart(self) -> None:
        """Forget a run that did not finish."""
        for table in (self.met, self.kept, self.extra, self._open, self._uncalled):
            table.clear()
        self._unforced, self._begun = 0.0, 0

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Args | None:
        there = self.calls.sites.get(site)
        if there is None:
            self.extra[site.path] = self.extra.get(site.path, 0) + 1
            return None
        record = self.reference.records[there]
        floor = max(record.in_error, self._unforced, self._lost_before(there))
        met = self.met[site] = Met(there, in_floor=floor)
        arrived: Args = (args, kwargs)
        if not site.path:  # the model itself keeps its own inputs
            self._open[site] = Arrays(arrived, arrived)
            return None
        ours = [array for _, array in nests.arrays(arrived)]
        theirs = [array for _, array in nests.arrays((record.args, record.kwargs))]
        found = fits(ours, theirs, self.alignments[self.calls.pairs[site]], outward=False)
        if not found:
            met.text = f"its input {_shapes(ours)} could not be matched to torch's {_shapes(theirs)}"
            self._open[site] = Arrays(arrived, arrived)
            return None
        met.inward = tuple(fit.match for fit in found)
        met.in_error = max(fit.error for fit in found)
        given: Args = nests.rebuilt(arrived, _is_array, _with_wants(ours, found))
        self._open[site] = Arrays(arrived, given)
        if alarms(met.in_error, met.in_floor, self.threshold):
            self._keep(site, self._open[site])
        return given

    def __post_init__(self) -> None:
        by_torch = {there: here for here, there in self.calls.sites.items()}
        self._layers = [
            (site, here)
            for site in self.reference.began
            if (here := by_torch.get(site)) is not None and self.calls.pairs[here].leaf
        ]
        self._place = {site: n for n, (site, _) in enumerate(self._layers)}

    def _lost_before(self, there: Site) -> float:
        """What torch loses in layers before `there` that Flax has not called: nothing gave Flax their outputs."""
        for site, here in self._layers[self._begun : self._place.get(there, 0)]:
            if here not in self.met:
                self._uncalled[here] = self.reference.records[site].free_error
        self._begun = max(self._begun, self._place.get(there, 0))
        return max((lost for here, lost in self._uncalled.items() if here not in self.met), default=0.0)

    def leave(self, site: Site, output: Any) -> Any:
        began = self._open.pop(site, None)
        if began is None:
            return None
        met, record, pair = self.met[site], self.reference.records[self.met[site].site], self.calls.pairs[site]
        ours = [array for _, array in nests.arrays(output)]
        theirs = [array for _, array in nests.arrays(record.output)]
        found = fits(ours, theirs, self.alignments[pair], outward=True)
        if not found:
            if pair.leaf:  # the layers inside a container were given their own inputs
                self._unforced = max(self._unforced, record.free_error)
            met.text = met.text or f"its output {_shapes(ours)} could not be matched to torch's {_shapes(theirs)}"
            return None
        met.outward = tuple(fit.match for fit in found)
        met.out_error = max(fit.error for fit in found)
        wanted = nests.rebuilt(output, _is_array, _with_wants(ours, found))
        if site in self.kept or alarms(met.out_error, record.out_error, self.threshold):
            self._keep(site, Arrays(began.arrived, began.given, output, wanted))
        return wanted if site.path else None

    def _keep(self, site: Site, arrays: Arrays) -> None:
        if site in self.kept or len(self.kept) < KEPT:
            self.kept[site] = arrays


@dataclass(slots=True, eq=False)
class FreeTap:
    """Measures the outputs of an ordinary Flax run, in the layouts that the forced pass found. It replaces nothing, yet
    does not declare `replaces = False`: so the compiled program of the forced pass runs again, and no other is
    compiled."""

    reference: Reference
    met: Mapping[Site, Met]

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        return None

    def leave(self, site: Site, output: Any) -> None:
        met = self.met.get(site)
        if met is None or not met.outward:
            return
        ours = [array for _, array in nests.arrays(output)]
        theirs = [array for _, array in nests.arrays(self.reference.records[met.site].output)]
        met.free_error = max(
            relative_l2(ours[match.flax], match.turn(theirs[match.torch]))
            for match in met.outward
            if match.flax < len(ours)
        )


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredMatch:
    """A match, the torch array in Flax's layout, and Flax's error against it."""

    match: Match
    want: Any
    error: float


def fits(ours: list[Any], theirs: list[Any], alignment: Alignment, *, outward: bool) -> tuple[MeasuredMatch, ...]:
    """Match Flax arrays to torch arrays. First every Flax array takes the first torch array that agrees within NEAR:
    cells and attention take and give the same arrays in another order, and a first call may lack the state that Flax
    starts with as zeros. If none agrees, the first floating array (the first integer array, if there are no others)
    takes what its shape fits, or leaves it to another that comes nearer. Each later array takes the torch array at the
    same place if the shapes fit. Nothing is matched if only masks or integers are, and there are other arrays."""
    floats = [i for i, array in enumerate(ours) if _floating(array)]
    first = (floats or list(range(len(ours))))[:1]
    ranked = first + [i for i in range(len(ours)) if i not in first]
    found: dict[int, MeasuredMatch] = {}
    used: set[int] = set()
    misses: dict[int, list[MeasuredMatch]] = {}  # matches by shape that do not agree
    for i in ranked:
        misses[i] = []
        for j, array in enumerate(theirs):
            if j in used or _floating(array) != _floating(ours[i]):
                continue
            turn = alignment.turn(array, ours[i].shape, ours[i], outward)
            if turn is None:
                continue
            want = turn(array)
            fit = MeasuredMatch(Match(i, j, turn, tuple(array.shape)), want, beneath_mask(ours[i], want))
            if fit.error <= NEAR:
                found[i] = fit
                used.add(j)
                break
            misses[i].append(fit)
    for n, i in enumerate(ranked):
        left = [fit for fit in misses[i] if fit.match.torch not in used]
        if i in found or not left:
            continue
        fit, taken = left[0], sum(k in found for k in ranked[:n])
        if n == 0 and not found:
            rivals = [other for k in ranked for other in misses[k][:1] if other.match.torch == fit.match.torch]
            fit = min(rivals, key=lambda other: other.error)
        elif n > 0:
            in_place = fit.match.torch == taken and ours[i].ndim > 2
            if not in_place or _is_mask(ours[i]) or _is_mask(theirs[fit.match.torch]):
                continue
        used.add(fit.match.torch)
        found[fit.match.flax] = fit
    telling = [i for i in floats if not _is_mask(ours[i])]
    if telling and not any(i in found for i in telling):
        return ()
    return tuple(found[i] for i in ranked if i in found)


def beneath_mask(got: Any, want: Any) -> float:
    """relative_l2 without the masked values, if both arrays hold the same mask. Next to one -3e38 no other value would
    count: a bias that contains a mask would equal the mask alone."""
    if not (_is_mask(got) and _is_mask(want)):
        return relative_l2(got, want)
    masked = np.abs(got) >= MASK
    if not np.allclose(got[masked], want[masked], rtol=1e-6):
        return relative_l2(got, want)
    return relative_l2(np.where(masked, 0, got), np.where(masked, 0, want))


def _floating(array: Any) -> bool:
    return array.dtype.kind in "fcV"  # V: bfloat16 and its like


def _with_wants(ours: list[Any], found: tuple[MeasuredMatch, ...]) -> list[Any]:
    """The Flax arrays, with every matched one replaced by torch's."""
    new = list(ours)
    for fit in found:
        old = ours[fit.match.flax]
        new[fit.match.flax] = fit.want if fit.want.dtype == old.dtype else fit.want.astype(old.dtype)
    return new


def _is_mask(array: Any) -> bool:
    return array.dtype.kind == "f" and bool(array.size) and bool((np.abs(array) >= MASK).any())


def _shapes(arrays: list[Any]) -> str:
    return ", ".join(str(tuple(array.shape)) for array in arrays[:4]) or "(no array)"


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
