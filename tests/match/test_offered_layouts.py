"""Fused parts, grouped convolutions, padded vocabularies, bare parameters: some offered answer gives the right values,
and none is taken in silence that gives others."""

from __future__ import annotations

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import graftax as gx
from graftax.tree import flatten, join_path

torch = pytest.importorskip("torch")

E, L, D, F, H, K, G = 4, 3, 8, 12, 4, 2, 6  # experts, layers, model, hidden, heads, key heads, head_dim
Arrays = dict[str, np.ndarray]
DRAW = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return DRAW.standard_normal(shape).astype("float32")


def experts(woven: bool, turned: bool) -> tuple[Arrays, Arrays]:
    gate, up, down = draw(E, D, F), draw(E, D, F), draw(E, F, D)
    fused = np.stack([gate, up], -1).reshape(E, D, 2 * F) if woven else np.concatenate([gate, up], -1)
    bias = draw(2, E, F)
    flat = np.stack(list(bias), -1).reshape(E, 2 * F) if woven else np.concatenate(list(bias), -1)
    there = {"wi_0": gate, "wi_1": up, "wo": down, "wi_0_bias": bias[0], "wi_1_bias": bias[1]}
    torch_side = {"experts.gate_up_proj": fused.swapaxes(1, 2) if turned else fused,
                  "experts.down_proj": down.swapaxes(1, 2) if turned else down,
                  "experts.gate_up_proj_bias": flat}  # fmt: skip
    return torch_side, {f"mlp/{name}": leaf for name, leaf in there.items()}


def rows(kernel: np.ndarray) -> np.ndarray:
    """(in, heads, head_dim) as a torch weight."""
    return kernel.reshape(kernel.shape[0], -1).T


def layers_of_qkv(axis: int, woven: bool, bias: bool) -> tuple[Arrays, Arrays]:
    parts = {name: draw(L, D, n, G) for name, n in (("query", H), ("key", K), ("value", K))}
    biases = {name: draw(L, n, G) for name, n in (("query", H), ("key", K), ("value", K))}

    def joined(found: list[np.ndarray]) -> np.ndarray:
        """q, k and v of (heads, head_dim, ...)"""
        if not woven:
            return np.concatenate([one.reshape(-1, *one.shape[2:]) for one in found])
        split = [one.reshape(K, one.shape[0] // K, *one.shape[1:]) for one in found]
        return np.concatenate(split, 1).reshape(-1, *found[0].shape[2:])

    torch_side: Arrays = {}
    for i in range(L):
        torch_side[f"layers.{i}.attn.qkv.weight"] = joined([part[i].transpose(1, 2, 0) for part in parts.values()])
        torch_side[f"layers.{i}.attn.out.weight"] = draw(D, D)
        if bias:
            torch_side[f"layers.{i}.attn.qkv.bias"] = joined([part[i] for part in biases.values()])
    there = {f"layers/attn/{name}/kernel": np.moveaxis(part, 0, axis) for name, part in parts.items()}
    outs = [torch_side[f"layers.{i}.attn.out.weight"].T for i in range(L)]
    there["layers/attn/out/kernel"] = np.stack(outs, axis)
    there |= {f"layers/attn/{n}/bias": np.moveaxis(part, 0, axis) for n, part in biases.items()} if bias else {}
    return torch_side, there


def pairs_of_parts(at: int) -> tuple[Arrays, Arrays]:
    """Gate and up of every layer in one leaf, whose axis for the parts stands at `at`, that for the layers before it or
    behind it."""
    gating, down = draw(2, L, D, F), draw(L, F, D)
    torch_side = {
        f"layers.{i}.mlp.{name}.weight": gating[j, i].T for i in range(L) for j, name in enumerate(("gate", "up"))
    }
    torch_side |= {f"layers.{i}.mlp.down.weight": down[i].T for i in range(L)}
    return torch_side, {"layers/mlp/gating": np.moveaxis(gating, 0, at), "layers/mlp/down/kernel": down}


def fused_in_flax() -> tuple[Arrays, Arrays]:
    parts = draw(3, L, D, D)
    torch_side = {f"layers.{i}.attn.{n}.weight": parts[j, i].T for i in range(L) for j, n in enumerate("qkv")}
    torch_side |= {f"layers.{i}.norm.weight": draw(D) for i in range(L)}
    norms = np.stack([torch_side[f"layers.{i}.norm.weight"] for i in range(L)])
    return torch_side, {"layers/attn/qkv/kernel": np.concatenate(list(parts), -1), "layers/norm/scale": norms}


def grouped(transposed: bool) -> tuple[Arrays, Arrays]:
    weight, full = draw(4, 3, 2, 2), np.zeros((4, 6, 2, 2), "float32")
    full[:2, :3], full[2:, 3:] = weight[:2], weight[2:]
    kernel = full.transpose(2, 3, 1, 0) if transposed else full[..., ::-1, ::-1].transpose(2, 3, 0, 1)
    bias = draw(6)
    return {"up.weight": weight, "up.bias": bias}, {"up/kernel": kernel, "up/bias": bias}


def vocabulary(head: bool) -> tuple[Arrays, Arrays]:
    table, out, body = draw(96, D), draw(96, D), draw(D, D)
    torch_side = {"embed_tokens.weight": table, "body.weight": body, **({"lm_head.weight": out} if head else {})}
    padded = [np.concatenate([one, np.zeros((32, D), "float32")]) for one in (table, out)]
    there = {"token_embedder/embedding": padded[0], "body/kernel": body.T}
    return torch_side, {**there, **({"lm_head/kernel": padded[1].T} if head else {})}


def bare_pairs(width: int) -> tuple[Arrays, Arrays]:
    """w_in and b_in of a user's own module are a Linear, stored (in, out)."""
    inner, outer, one, other = draw(D, width), draw(width, D), draw(width), draw(D)
    torch_side = {"mlp.w_in": inner, "mlp.b_in": one, "mlp.w_out": outer, "mlp.b_out": other}
    there = {"fc_in/kernel": inner, "fc_in/bias": one, "fc_out/kernel": outer, "fc_out/bias": other}
    return torch_side, {f"mlp/{name}": leaf for name, leaf in there.items()}


def relative_positions(buckets: int) -> tuple[Arrays, Arrays]:
    """T5 keeps (buckets, heads), T5X (heads, buckets)."""
    table, proj = draw(buckets, 8), draw(8, 6)
    torch_side = {"encoder.relative_attention_bias.weight": table, "encoder.proj.weight": proj}
    return torch_side, {"encoder/relpos_bias/rel_embedding": table.T, "encoder/proj/kernel": proj.T}


CASES = {
    "bare pairs": bare_pairs(F),
    "bare pairs, square": bare_pairs(D),
    "relative positions": relative_positions(32),
    "relative positions, square": relative_positions(8),
    **{f"experts, {'row by row' if w else 'in blocks'}, {'out, in' if t else 'in, out'}": experts(w, t)
       for w in (False, True) for t in (False, True)},
    **{f"layers of q, k, v on axis {axis}, {'group by group' if w else 'in blocks'}": layers_of_qkv(axis, w, b)
       for axis, b in ((0, True), (1, False)) for w in (False, True)},
    "layers, then parts": pairs_of_parts(1),
    "parts, then layers": pairs_of_parts(0),
    "parts behind": pairs_of_parts(2),
    "fused in flax": fused_in_flax(),
    "grouped and transposed": grouped(True),
    "grouped and flipped": grouped(False),
    "padded table": vocabulary(False),
    "padded table and head": vocabulary(True),
}  # fmt: skip


@pytest.mark.parametrize("back", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", CASES)
def test_an_offered_answer_gives_the_right_values(name: str, back: bool) -> None:
    torch_side, flax_side = CASES[name]
    state = {key: torch.tensor(np.ascontiguousarray(leaf)) for key, leaf in torch_side.items()}
    source, like = (unflatten_dict(flax_side, sep="/"), state) if back else (state, unflatten_dict(flax_side, sep="/"))
    want = torch_side if back else flax_side

    def right(plan: gx.Plan) -> bool:
        made = plan.run(source)
        got = made if back else {join_path(keys): leaf for keys, leaf in flatten(made)}
        return all(np.array_equal(np.asarray(got[path]), leaf) for path, leaf in want.items())

    def leads(rules: list[str], tries: int, before: frozenset[str] = frozenset()) -> bool:
        plan = gx.plan(source, like, rules=rules or None)
        still = frozenset(target for question in plan.questions for target in question.targets)
        assert not rules or still < before, "an answer settles something, and opens nothing"
        assert rules or not plan.complete or right(plan), "taken in silence, and wrong"
        if plan.complete:
            return right(plan)
        asked = [question for question in plan.questions if question.candidates]
        assert asked, str(plan)
        return tries > 0 and any(leads([*rules, one.rule], tries - 1, still) for one in asked[0].candidates)

    assert leads([], 4)
