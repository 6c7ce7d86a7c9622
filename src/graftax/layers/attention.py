"""Rows for attention: torch's MultiheadAttention and a fused projection of query, key and value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from graftax.errors import LayoutError
from graftax.layers.base import Layer, LayerFacts, LayerForm, Makes, Refusal, Setting, Shape, Step
from graftax.layers.leaf_axes import ATTENTION_AXES
from graftax.ops import Op, Rearrange, RearrangeEach, Split

_PARTS = ("query", "key", "value")


def _heads(facts: LayerFacts) -> tuple[int, int] | None:
    """(heads, head_dim) of the Flax side."""
    for role in ("query/kernel", "key/kernel", "value/kernel"):
        shape = facts.flax.get(role, ())
        if len(shape) == 3:
            return shape[1], shape[2]
    return None


def attention_form(facts: LayerFacts) -> Iterable[LayerForm]:
    """torch in_proj_weight (3 H h, D), or one weight per projection, to query, key, value (D, H, h) and out (H, h,
    D)."""
    found = _heads(facts)
    if found is None:
        return
    heads, head = found
    width = heads * head
    sizes = (("d", head), ("h", heads))
    split = Rearrange("(h d) i -> i h d", sizes)
    bias = Rearrange("(h d) -> h d", sizes)
    thirds = Split(0, (width,) * 3)
    biases = tuple(f"{name}/bias" for name in _PARTS)
    if "in_proj_weight" in facts.torch:
        kernels: tuple[Step, ...] = (Step("in_proj_weight", tuple(f"{n}/kernel" for n in _PARTS), (thirds, split)),)
        variant = "fused in_proj_weight"
    else:
        kernels = tuple(Step(f"{n[0]}_proj_weight", f"{n}/kernel", (split,)) for n in _PARTS)
        variant = "separate q, k, v weights"
    steps = (
        *kernels,
        Step("in_proj_bias", biases, (thirds, bias), optional=True),
        Step("out_proj.weight", "out/kernel", (Rearrange("o (h d) -> h d o", sizes),)),
        Step("out_proj.bias", "out/bias", optional=True),
    )
    yield LayerForm(
        variant,
        steps,
        why="Flax's attention has an axis for the heads, torch's MultiheadAttention has none",
    )


def _wants_bias_kv(facts: LayerFacts) -> bool:
    return ("bias_k" in facts.torch or "bias_v" in facts.torch) and _is_attention(facts)


def _is_attention(facts: LayerFacts) -> bool:
    """False for a parameter of a user's own attention that happens to have the name."""
    return bool(_heads(facts)) and ("in_proj_weight" in facts.torch or "q_proj_weight" in facts.torch)


def _grouped_heads(facts: LayerFacts) -> bool:
    heads = facts.flax_settings.get("num_heads")
    kv = facts.flax_settings.get("num_kv_heads")
    return _is_attention(facts) and None not in (heads, kv) and heads != kv


# ---------------------------------------------------------------- fused query, key, value

FUSED = ("block", "interleaved")
"""The order of the rows of a fused weight: all queries, all keys, all values; or head by head (each group of heads with
its key and its value)."""


def fused_qkv_ops(fused: str, weight: Shape, targets: Sequence[Shape], heads: int | None = None) -> tuple[Op, ...]:
    """One fused weight (rows, in) or bias (rows) -> query, key and value leaves of the shapes `targets`.

    weight   (rows, in), (in, rows) as HF Conv1D has it, or (rows) for a bias
    targets  kernels (in, H, h) or (in, H h); biases (H, h) or (H h); key and value may have fewer heads
    heads    query heads, needed if the shapes do not show them

    Raises LayoutError if `fused` is unknown, the heads are not known, or the sizes do not fit.
    """
    if fused not in FUSED:
        raise LayoutError(f"unknown fused layout {fused!r}; known: {', '.join(FUSED)}")
    bias = len(weight) == 1
    lead = 0 if bias else 1  # axes before the produced ones in a target
    rows = [math.prod(shape[lead:]) for shape in targets]
    swapped = not bias and weight[0] != sum(rows) and weight[1] == sum(rows)
    start: tuple[Op, ...] = (Rearrange("i r -> r i"),) if swapped else ()
    if fused == "block":
        return (*start, Split(0, tuple(rows)), _each(targets, bias))
    counts = _head_counts(targets, lead, rows, heads)
    head = rows[0] // counts[0]
    if len(set(rows[1:])) != 1 or counts[0] % counts[1] or rows[1] != counts[1] * head:
        raise LayoutError(f"rows of {rows} for query, key and value do not interleave by heads of {head}")
    group = counts[0] // counts[1]
    tail = "" if bias else " i"
    grouped = Rearrange(f"(k s d){tail} -> s k d{tail}", (("d", head), ("k", counts[1]), ("s", group + 2)))
    split = Split(0, (group, 1, 1))
    patterns: list[str] = []
    sizes: list[tuple[tuple[str, int], ...]] = []
    for position, shape in enumerate(targets):
        flat = len(shape) == lead + 1
        first = "(k s)" if position == 0 else "k"
        out = ("(k s d)" if position == 0 else "(k d)") if flat else f"{first} d"
        patterns.append(f"{'s' if position == 0 else '1'} k d{tail} -> {'' if bias else 'i '}{out}")
        fixed = {"k": counts[1], "d": head} | ({"s": group} if position == 0 else {})
        sizes.append(tuple(sorted(fixed.items())))
    return (*start, grouped, split, RearrangeEach(tuple(patterns), tuple(sizes)))


def _each(targets: Sequence[Shape], bias: bool) -> Op:
    patterns: list[str] = []
    sizes: list[tuple[tuple[str, int], ...]] = []
    for shape in targets:
        split = len(shape) == (2 if bias else 3)
        patterns.append(("(h d) -> h d" if split else "") if bias else ("(h d) i -> i h d" if split else "o i -> i o"))
        sizes.append((("d", shape[-1]), ("h", shape[-2])) if split else ())
    return RearrangeEach(tuple(patterns), tuple(sizes))


def _head_counts(targets: Sequence[Shape], lead: int, rows: Sequence[int], heads: int | None) -> list[int]:
    if len(targets[0]) == lead + 2:
        return [shape[lead] for shape in targets]
    if not heads or rows[0] % heads:
        raise LayoutError("interleaved query, key and value need the number of heads: `heads = 8`")
    head = rows[0] // heads
    return [max(1, count // head) for count in rows]


_LETTER = re.compile(r"(?:.*[./_])?(?:to_|w_?)?(query|key|value|q|k|v)(?:_?(?:proj|lin|kernel|dense))?", re.IGNORECASE)


def projection_letter(role: str) -> str:
    """q, k or v for a role such as 'query/kernel', 'to_q/kernel', 'k_proj/bias'; '' for another."""
    module, _, leaf = role.rpartition("/")
    found = _LETTER.fullmatch(module) if leaf in ("kernel", "bias") else None
    return found[1][0].lower() if found else ""


def fused_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """Both readings of a fused projection to three: their shapes are identical, so a rule must choose."""
    kernels = {projection_letter(role): role for role in facts.flax if role.endswith("/kernel")}
    biases = {projection_letter(role): role for role in facts.flax if role.endswith("/bias")}
    weight = facts.torch.get("weight") or facts.torch.get("in_proj_weight")
    if weight is None or len(weight) != 2 or set(kernels) != {"q", "k", "v"}:
        return
    chosen = facts.hints.get("fused")
    shapes = [facts.flax[kernels[letter]] for letter in "qkv"]
    for fused in FUSED if chosen is None else (chosen,):
        try:
            ops = fused_qkv_ops(fused, weight, shapes, facts.hints.get("heads"))
            steps = [Step("weight|in_proj_weight", tuple(kernels[letter] for letter in "qkv"), ops)]
            if set(biases) == {"q", "k", "v"}:
                roles = tuple(biases[letter] for letter in "qkv")
                bias = facts.torch.get("bias") or facts.torch.get("in_proj_bias") or (0,)
                ops = fused_qkv_ops(fused, bias, [facts.flax[role] for role in roles], facts.hints.get("heads"))
                steps.append(Step("bias|in_proj_bias", roles, ops, optional=True))
        except LayoutError:
            continue
        why = (
            "the rows are all queries, then keys, then values"
            if fused == "block"
            else "the rows lie head by head: query, key, value"
        )
        yield LayerForm(
            f"fused {fused}", tuple(steps), "linear", rule=f'fused = "{fused}"', by="shapes", why=why, settled=False
        )


ATTENTION_ROWS: tuple[Layer, ...] = (
    Layer(
        "MultiheadAttention",
        torch=("MultiheadAttention",),
        linen=("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"),
        nnx=("MultiHeadAttention",),
        forms=(
            Makes(
                attention_form,
                (
                    "in_proj_weight, in_proj_bias -> query, key, value: split in 3, then (h d) i -> i h d",
                    "q_proj_weight, k_proj_weight, v_proj_weight (kdim, vdim) -> query, key, value: (h d) i -> i h d",
                    "out_proj.weight -> out/kernel: o (h d) -> h d o",
                ),
            ),
        ),
        settings=(
            Setting("num_heads", "num_heads", "num_heads", lambda t: t.get("num_heads"), lambda f: f.get("num_heads")),
        ),
        refusals=(
            Refusal(
                _wants_bias_kv,
                "bias_k and bias_v",
                "Flax attention has no learned extra key and value position",
                "Append them by hand: two parameters (1, 1, D), concatenated to the projected keys and values.",
            ),
            Refusal(
                lambda f: bool(f.torch_settings.get("add_zero_attn")) and f.torch_kind == "MultiheadAttention",
                "add_zero_attn",
                "Flax attention has no extra position of zeros",
                "Append a zero key and value by hand before the attention.",
            ),
            Refusal(
                _grouped_heads,
                "num_kv_heads against MultiheadAttention",
                "torch's MultiheadAttention has as many key and value heads as query heads",
                "Set num_kv_heads=num_heads, or average and repeat the torch heads first.",
            ),
        ),
        axes=ATTENTION_AXES,
        note="in_proj_weight (3D, D): split in 3, transpose, THEN cut into heads (D, H, h); out (H, h, D). kdim and "
        "vdim give three weights. A boolean mask means the opposite in Flax.",
    ),
    Layer(
        "Fused query, key, value",
        torch=("Linear", "NonDynamicallyQuantizableLinear", "Conv1D"),
        linen=(),
        nnx=(),
        forms=(
            Makes(
                fused_forms,
                (
                    'fused = "block": rows of all queries, then keys, then values',
                    'fused = "interleaved": head by head; with fewer key heads, group by group',
                ),
            ),
        ),
        flax_decides=False,
        note="Blocks and per-head interleaving have identical shapes: a rule must say `fused`.",
    ),
    Layer(
        "Rotary query and key",
        torch=("Linear", "NonDynamicallyQuantizableLinear"),
        linen=("Dense", "DenseGeneral", "Einsum"),
        nnx=("Linear", "LinearGeneral", "Einsum"),
        forms=(
            Makes(
                lambda _: (),
                (
                    'interleaved pairs -> halves: ops = "(h d p) i -> i (h p d)", h = HEADS, p = 2 (i h (p d) for a '
                    'head axis); a bias "(h d p) -> (h p d)"; a per-head norm\'s scale "(d p) -> (p d)"',
                ),
            ),
        ),
        flax_decides=False,
        note="No file shows the convention, so only a rule picks this. Weight, bias and any per-head norm of query and "
        "key move together (score error 4.9 where the scale does not); the key by its own number of heads; with "
        "partial rotary the first rotary_dim rows of each head only.",
    ),
)  # fmt: skip
