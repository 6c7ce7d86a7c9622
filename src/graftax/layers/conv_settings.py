"""Settings of convolutions in one form: strides and dilations per spatial axis, padding in pairs."""

from __future__ import annotations

from typing import Any, cast

from graftax.layers.base import Setting, Settings

Pairs = tuple[tuple[int, int], ...]


def _rank(settings: Settings) -> int:
    """The number of spatial axes, from the size of the kernel; 0 if it is not known."""
    size = settings.get("kernel_size")
    if isinstance(size, int):
        return 1
    return len(cast("tuple[int, ...]", size)) if isinstance(size, (tuple, list)) else 0


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """The setting for every spatial axis; None is 1."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * rank
    return tuple(int(v) for v in value)


def _spatial(torch: str, flax: str) -> Setting:
    def read(settings: Settings, name: str) -> tuple[int, ...] | None:
        return _each(settings[name], _rank(settings)) if name in settings and _rank(settings) else None

    return Setting(flax, torch, flax, lambda t: read(t, torch), lambda f: read(f, flax))


STRIDES = _spatial("stride", "strides")
DILATION = _spatial("dilation", "kernel_dilation")


def halves(size: tuple[int, ...], dilation: tuple[int, ...]) -> Pairs:
    """What SAME at stride 1, CIRCULAR, REFLECT and torch's 'same' pad: d (k - 1), the smaller half before."""
    total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    return tuple((n // 2, n - n // 2) for n in total)


_MODES = {"circular": "CIRCULAR", "reflect": "REFLECT"}


def conv_padding(t: Settings) -> Any:
    """torch's padding in Flax's form: pairs, or the name of a mode; a sentence if Flax has no name for it."""
    padding, mode, rank = t.get("padding"), t.get("padding_mode", "zeros"), _rank(t)
    if padding is None or not rank:
        return None
    named = halves(_each(t["kernel_size"], rank), _each(t.get("dilation"), rank))
    if isinstance(padding, str):
        pairs = named if padding == "same" else ((0, 0),) * rank
    else:
        pairs = tuple((p, p) for p in _each(padding, rank))
    if mode == "zeros" or not any(map(any, pairs)):
        return pairs
    if mode in _MODES and pairs == named:
        return _MODES[mode]
    return f"{pairs} of padding_mode={mode!r}, which Flax has no name for: pad by hand"


def transposed_padding(t: Settings) -> Any:
    """Flax pads the dilated input: d (k - 1) - p before and d (k - 1) - p + output_padding after."""
    rank = _rank(t)
    if not rank or t.get("padding") is None:
        return None
    size, dilation, padding = (_each(t.get(name), rank) for name in ("kernel_size", "dilation", "padding"))
    extra = _each(t.get("output_padding", 0), rank)
    rows = zip(size, dilation, padding, extra, strict=True)
    return tuple((d * (k - 1) - p, d * (k - 1) - p + e) for k, d, p, e in rows)


def _written(f: Settings) -> Any:
    """Flax's padding, in pairs unless it is a name."""
    padding, rank = f.get("padding"), _rank(f)
    if padding is None or not rank or isinstance(padding, str):
        return padding if rank else None
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)


def flax_padding(f: Settings) -> Any:
    """The padding of a Flax Conv. SAME with a stride depends on the input and stays a name."""
    padding, rank = _written(f), _rank(f)
    if padding == "VALID":
        return ((0, 0),) * rank
    if padding == "SAME" and set(_each(f.get("strides"), rank)) == {1}:
        return halves(_each(f["kernel_size"], rank), _each(f.get("kernel_dilation"), rank))
    return padding


def flax_transposed_padding(f: Settings) -> Any:
    """The padding of a Flax ConvTranspose, with names resolved as jax.lax.conv_transpose resolves them."""
    padding, rank = _written(f), _rank(f)
    if padding not in ("SAME", "VALID"):
        return padding
    dilation = _each(f.get("kernel_dilation"), rank)
    sizes = [d * (k - 1) + 1 for k, d in zip(_each(f["kernel_size"], rank), dilation, strict=True)]
    out: list[tuple[int, int]] = []
    for k, s in zip(sizes, _each(f.get("strides"), rank), strict=True):
        total = k + s - 2 + (max(k - s, 0) if padding == "VALID" else 0)
        before = k - 1 if padding == "VALID" or s > k - 1 else -(-total // 2)
        out.append((before, total - before))
    return tuple(out)
