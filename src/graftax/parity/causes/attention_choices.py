"""The choices in a form of attention, axis by axis, and the words for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from graftax.parity.causes.attention_forms import AttentionForm, Scene, head_dim
from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.numbers import nice
from graftax.parity.causes.rotary import OFFSETS, PARTS, STRETCHES, THETAS

Axis = Callable[[AttentionForm, Scene], Iterator[AttentionForm]]


def _on(name: str, *values: Any) -> Axis:
    def choices(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
        for value in values:
            if getattr(form, name) != value:
                yield replace(form, **{name: value})

    return choices


def _on_rotary(name: str, *values: Any) -> Axis:
    def choices(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
        if form.rotary.kind == "none" and name != "kind":
            return
        for value in values:
            if getattr(form.rotary, name) != value:
                yield replace(form, rotary=replace(form.rotary, **{name: value}))

    return choices


def _parts(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
    head = head_dim(scene, form)
    turned = int(head * form.rotary.part) // 2
    for part in PARTS if form.rotary.kind != "none" else ():
        if int(head * part) // 2 not in (0, turned):
            yield replace(form, rotary=replace(form.rotary, part=part))


def _windows(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
    keys = scene.key.shape[1]
    sizes = range(1, keys) if keys <= 64 else sorted({*(2**n for n in range(1, 12)), 1024, keys // 2, keys // 4})
    for size in (None, *(n for n in sizes if n < keys)):
        if size != form.window:
            yield replace(form, window=size)


def _groupings(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
    if form.heads != form.kv and form.kv > 1:
        yield replace(form, grouping="tile" if form.grouping == "repeat" else "repeat")


def _scales(form: AttentionForm, scene: Scene) -> Iterator[AttentionForm]:
    head = head_dim(scene, form)
    wide = head * form.heads
    powers = ((-0.5, 1.0), (0.0, 1.0), (-1.0, 1.0), (-0.25, 1.0), (0.5, 1.0), (-0.5, 2.0), (-0.5, 0.5))
    plain = tuple((0.0, factor) for factor in (wide**-0.5, (2 * head) ** -0.5, 0.125, 256**-0.5))
    for power, factor in (*powers, *plain):
        if abs(factor * head**power / form.scale(head) - 1) > 1e-9:
            yield replace(form, power=power, factor=factor)


AXES: Mapping[str, tuple[str, Axis]] = {
    "scale": ("attention scale", _scales),
    "causal": ("attention mask", _on("causal", "no", "yes", "strict", "future")),
    "polarity": ("attention mask", _on("polarity", "right", "inverted", "added", "queries")),
    "padding": ("attention mask", _on("padding", "found", "ignored", "inverted")),
    "kind": ("rotary interleave", _on_rotary("kind", "none", "half", "interleaved")),
    "theta": ("rotary theta", _on_rotary("theta", *THETAS)),
    "part": ("rotary part", _parts),
    "offset": ("rotary offset", _on_rotary("offset", *OFFSETS)),
    "stretch": ("rotary theta", _on_rotary("stretch", *STRETCHES)),
    "grouping": ("key-value heads", _groupings),
    "cap": ("logit softcap", _on("cap", None, 50.0, 30.0, 20.0, 100.0, 10.0, 5.0, 15.0, 2.0)),
    "window": ("sliding window", _windows),
}
"""Axis -> (the name of the cause, the other choices on this axis)."""


def neighbours(form: AttentionForm, scene: Scene, changes: int) -> Iterator[tuple[AttentionForm, tuple[str, ...]]]:
    """(a form with other choices on `changes` axes, the names of these axes)."""
    for names in combinations(AXES, changes):
        made: list[AttentionForm] = [form]
        for name in names:
            made = [other for one in made for other in AXES[name][1](one, scene)]
        for other in made:
            yield other, names


# ---------------------------------------------------------------- words


def explanation_of(
    right: AttentionForm, wrong: AttentionForm, names: Sequence[str], error: float, head: int
) -> Explanation:
    """The explanation for a difference on the named axes."""
    causes = list(dict.fromkeys(AXES[name][0] for name in names))
    if "kind" in names and "none" in (right.rotary.kind, wrong.rotary.kind):
        causes = ["rotary missing" if cause == "rotary interleave" else cause for cause in causes]
    texts, fixes = zip(*(_words(name, right, wrong, head) for name in names), strict=True)
    return Explanation(causes[0], "; ".join(texts), "; ".join(fixes), error)


def _words(name: str, right: AttentionForm, wrong: AttentionForm, head: int) -> tuple[str, str]:
    if name == "scale":
        want, have = (nice(form.scale(head)) for form in (right, wrong))
        return f"torch multiplies the scores by {want}, Flax by {have}", f"scores * {want}"
    if name in ("kind", "theta", "part", "offset", "stretch"):
        want, have = getattr(right.rotary, name), getattr(wrong.rotary, name)
        what = {
            "kind": "rotary pairs", "theta": "rotary theta", "part": "the rotated share of a head",
            "offset": "the offset of the queries' positions from the keys'", "stretch": "the factor of the positions",
        }[name]  # fmt: skip
        want, have = (f"{value:g}" if isinstance(value, float) else value for value in (want, have))
        return f"{what}: {want} in torch, {have} in Flax", f"{what}: {want}"
    if name == "window":
        want, have = (f"{form.window} tokens" if form.window else "no window" for form in (right, wrong))
        return f"torch sees {want}, Flax {have}", f"sliding window: {want}"
    if name == "cap":
        want, have = (f"capped at {form.cap:g}" if form.cap else "not capped" for form in (right, wrong))
        return f"the scores are {want} in torch, {have} in Flax", f"scores {want}"
    if name == "grouping":
        call = "jnp.repeat(k, groups, axis=2)" if right.grouping == "repeat" else "jnp.tile(k, (1, 1, groups, 1))"
        return f"key heads go to query heads by {right.grouping} in torch, by {wrong.grouping} in Flax", call
    want, have = getattr(right, name), getattr(wrong, name)
    words = _MASKS[name]
    return f"{words[have]} in Flax; in torch {words[want]}", f"the mask so that {words[want]} (True attends in Flax)"


_MASKS: Mapping[str, Mapping[str, str]] = {
    "causal": {
        "no": "every token sees all tokens",
        "yes": "a token sees itself and the tokens before it",
        "strict": "a token sees only the tokens before it, not itself",
        "future": "a token sees itself and the tokens after it",
    },
    "polarity": {
        "right": "the mask is True where a token is seen",
        "inverted": "the mask is inverted",
        "added": "the boolean mask is added to the scores as a number",
        "queries": "the padding mask lies on the queries and not on the keys",
    },
    "padding": {
        "found": "padding is not seen",
        "ignored": "padding is seen",
        "inverted": "only padding is seen",
    },
}
