"""Explain a difference by addition: Flax does not add an operand, or adds it with another factor; positions differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from graftax.parity.causes.elementwise import Explanation, Operand, fit_cap, sampled
from graftax.parity.causes.numbers import Array, Bar, nice, positions, relative
from graftax.parity.causes.resizing import METHODS, resize

_SHIFTS = 8  # a table of positions may be read this many rows too late or too early


def added(want: Array, have: Array, operands: Sequence[Operand], bar: Bar) -> list[Explanation]:
    """have = want + c x operand: a residual that is missing (c = -1), or another factor."""
    at, values = sampled(want, operands)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    out: list[Explanation] = []
    for operand, value in zip(operands, values, strict=True):
        if value is None:
            continue
        size = float(value @ value)
        factor = float((b - a) @ value) / size if size else 0.0
        if abs(factor) < 1e-7 or not np.isfinite(factor):
            continue
        factor = float(round(factor)) if abs(factor - round(factor)) < 1e-5 and round(factor) else factor
        error = relative(b - factor * value, a)
        if bar.fitted(error):
            out.append(_added(operand, factor, error))
    return out


def _added(operand: Operand, factor: float, error: float) -> Explanation:
    if factor == -1.0:
        return Explanation("missing residual", f"Flax does not add {operand.text}", f"add {operand.text}", error)
    if factor == 1.0 and not operand.table:
        text = f"Flax adds {operand.text} once more than torch"
        return Explanation("missing residual", text, f"do not add {operand.text}", error)
    # one side is taken to count it once; the other then counts it this many times
    where, times = ("Flax", 1 + factor) if factor > -1 else ("torch", 1 - factor)
    text = f"{operand.text} counts {nice(times)} x in {where} if it counts once in the other ({factor:+.6g} in all)"
    name = "embedding scale" if operand.table else "scale factor"
    return Explanation(name, text, f"check the factor of {operand.text}", error)


def scaled(want: Array, have: Array, bar: Bar, table: bool) -> Explanation | None:
    """have = c x want."""
    at = positions(want.shape)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    size = float(a @ a)
    factor = float(a @ b) / size if size else 0.0
    if not factor or abs(factor - 1) < 1e-7 or not bar.fitted(relative(b / factor, a)):
        return None
    name = "embedding scale" if table else "scale factor"
    text = f"Flax has {nice(factor)} x what torch has"
    return Explanation(name, text, f"multiply by {nice(1 / factor)}", relative(b / factor, a))


def capped(want: Array, have: Array, bar: Bar) -> Explanation | None:
    """One of the two is the other one after cap x tanh(x / cap)."""
    at = positions(want.shape)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    for x, y, side in ((b, a, "torch"), (a, b, "Flax")):
        found = fit_cap(x, y)
        if found is not None and bar.fitted(found[1]):
            call = f"{found[0]:g} * jnp.tanh(x / {found[0]:g})"
            fix = f"x = {call}" if side == "torch" else f"leave {call} out"
            return Explanation("logit softcap", f"only {side} has {call}", fix, found[1])
    return None


# ---------------------------------------------------------------- positions


def position_ids(want: Array, have: Array) -> Explanation | None:
    """Explain integers that an embedding gets: positions that start at another number, or ignore the padding."""
    if want.shape != have.shape or want.ndim < 1 or want.dtype.kind not in "iu" or have.dtype.kind not in "iu":
        return None
    a, b = want.astype(np.int64), have.astype(np.int64)
    shift = np.unique(b - a)
    if len(shift) == 1 and shift[0]:
        text = f"every position is {abs(int(shift[0]))} too {'large' if shift[0] > 0 else 'small'} in Flax"
        return Explanation("position ids", text, f"position_ids {int(-shift[0]):+d}", 0.0)
    kinds = [_positions(x) for x in (a, b)]
    if None in kinds or len(shift) == 1:
        return None
    if kinds[0] == kinds[1]:
        text = "both count the tokens of a mask, but different tokens: they read the padding differently"
    else:
        text = f"torch's positions {kinds[0]}, Flax's {kinds[1]}"
    counted = "jnp.cumsum(mask, axis=1)" if kinds[0] != _PLAIN else "jnp.arange(length)"
    return Explanation("position ids", text, f"position_ids from {counted}, as torch has them", 0.0)


_PLAIN, _MASKED = "count up from the start of every row", "follow the padding (cumulative sum of the mask)"


def _positions(ids: Array) -> str | None:
    """How rows of positions (.., T) count; None if they are not positions."""
    rows = ids.reshape(-1, ids.shape[-1])
    if rows.shape[-1] < 2:
        return None
    steps = np.diff(rows, axis=1)
    if (steps == 1).all() and (rows[:, 0] == rows[0, 0]).all():
        return _PLAIN
    filler = rows.min()
    for row in rows:
        # padding of one value at one end, and positions that count up
        rising = row[row != filler] if (np.diff(row) != 1).any() else row
        whole = np.diff(rising)
        if not ((whole == 1).all() or ((whole == 1) | (whole == 0)).all()):
            return None
    return _MASKED


def position_tables(want: Array, have: Array, tables: Mapping[str, Array], bar: Bar) -> Iterator[Explanation]:
    """Explain a table of positions (N, D): it is read at other rows, resized by another method, or not added. Its
    leading rows may belong to tokens outside the map."""
    if want.ndim != 3 or want.shape != have.shape:
        return
    off = have.astype(np.float64) - want.astype(np.float64)
    step = off.mean(axis=0)
    if not bar.fitted(relative(want + (off - step), want)):
        return
    for path, table in tables.items():
        rows = table.reshape(-1, table.shape[-1]).astype(np.float64)
        if table.ndim < 2 or rows.shape[1] != want.shape[2]:
            continue
        yield from _read(path, rows, step, want, bar)
        yield from _resized(path, rows, step, want, bar)


def _fits(step: Array, made: Array, want: Array, bar: Bar) -> float | None:
    error = relative(want + (step - made), want)
    return error if bar.fitted(error) else None


def _read(path: str, rows: Array, step: Array, want: Array, bar: Bar) -> Iterator[Explanation]:
    length = len(step)
    starts = [s for s in range(_SHIFTS + 1) if s + length <= len(rows)]
    for right in starts:
        error = _fits(step, -rows[right : right + length], want, bar)
        if error is not None:
            yield Explanation("missing residual", f"{path} is not added", f"add {path}[{right}:]", error)
        for wrong in starts:
            made = rows[wrong : wrong + length] - rows[right : right + length]
            error = None if right == wrong else _fits(step, made, want, bar)
            if error is not None:
                text = f"{path} is read from row {wrong}, in torch from row {right}"
                yield Explanation("position ids", text, f"start at row {right}", error)


def _resized(path: str, rows: Array, step: Array, want: Array, bar: Bar) -> Iterator[Explanation]:
    length = len(step)
    for extra in (0, 1, 2):
        for taken in _grids(len(rows) - extra):
            maps = rows[extra:].reshape(*taken, -1)
            for given in _grids(length - extra):
                if taken == given or not _same_shape(taken, given):
                    continue
                made = {name: resize(maps, given, how).reshape(length - extra, -1) for name, how in METHODS.items()}
                for right, a in made.items():
                    for wrong, b in made.items():
                        both = np.concatenate([np.zeros((extra, rows.shape[1])), b - a])
                        error = None if right == wrong else _fits(step, both, want, bar)
                        if error is not None:
                            text = f"{path} {taken} is resized to {given} by {right} in torch, by {wrong} in Flax"
                            yield Explanation("position embedding resize", text, METHODS[right].fix, error)
                            return


def _grids(count: int) -> Iterator[tuple[int, int]]:
    for height in range(1, count + 1):
        if count % height == 0 and max(height, count // height) <= 8 * min(height, count // height):
            yield height, count // height


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] > 1 and a[1] > 1 and 0.4 < (a[0] / a[1]) / (b[0] / b[1]) < 2.5
