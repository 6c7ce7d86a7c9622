"""What no file shows is stated, once a plan and with the check that proves it; and nothing is stated that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.match.planning import make_plan
from graftax.plans import Plan, PlanOptions
from graftax.tree import Checkpoint, Storage, TensorSpec

D = 8
ATTENTION = {f"layers.{i}.attn.{k}_proj.weight": (D, D + 2) for i in range(2) for k in "qkv"}
NORMS = {f"layers.{i}.{k}_norm.weight": (D,) for i in range(2) for k in ("attn", "mlp")}
OUT = {"lm_head.weight": (5, D)}


def planned(torch: dict[str, Any], flax: dict[str, Any] | None = None, rules: Any = None, **config: Any) -> Plan:
    flax = flax if flax is not None else {
        name.replace(".", "/").replace("weight", "scale" if len(shape) == 1 else "kernel"): shape[::-1]
        for name, shape in torch.items()
    }  # fmt: skip
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in torch.items()}
    like = Checkpoint("like", "flax", {name: TensorSpec(shape, "float32") for name, shape in flax.items()})
    specs = {name: TensorSpec(shape, "float32") for name, shape in torch.items()}
    source = Checkpoint("torch", "torch", specs, Storage(values.__getitem__), config=config or None)
    return make_plan(source, like, PlanOptions(rules=rules, unused="drop"))


def said(plan: Plan) -> set[str]:
    assert plan.complete, str(plan)
    assert all("graftax verify" in a.check and "check_parity" in a.check for a in plan.assumptions)
    assert len({a.text.partition(":")[0] for a in plan.assumptions}) == len(plan.assumptions)
    return {a.text.partition(":")[0] for a in plan.assumptions}


def test_a_decoder_states_what_its_files_cannot_show() -> None:
    plan = planned({**ATTENTION, **NORMS, **OUT})
    assert said(plan) == {"rotary", "scales", "norms"}
    norms = next(a for a in plan.assumptions if a.text.startswith("norms"))
    assert set(norms.targets) == {name.replace(".", "/").replace("weight", "scale") for name in NORMS}
    rotary = next(a for a in plan.assumptions if a.text.startswith("rotary"))
    parts = {"q_proj", "k_proj"}
    assert {name.split("/")[-2] for name in rotary.targets} == parts, "positions rotate the keys too"


def test_what_has_no_attention_and_no_norms_states_nothing() -> None:
    assert not planned({"a.weight": (D, 5), "b.weight": (3, D)}).assumptions


POSITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "a table of positions": ({"position_embeddings.weight": (9, D + 3)}, {}, False),
    "a bare table": ({"pos_embed": (1, 9, D + 3)}, {}, False),
    "relative ones": ({"layers.0.attn.relative_attention_bias.weight": (32, 4)}, {}, False),
    "norms after attention": ({f"layers.{i}.post_attention_layernorm.weight": (D,) for i in range(2)}, {}, True),
    "words that hold the word": ({"composer.weight": (9, D + 3), "purpose.weight": (9, D + 4)}, {}, True),
    "weights of positives": ({"pos_weight": (5,)}, {}, True),
    "a head of relations": ({"rel.weight": (9, D + 3)}, {}, True),
    "positives and negatives": ({"pos.weight": (9, D + 3), "neg.weight": (9, D + 4)}, {}, True),
    "a tagger": ({"layers.pos_tagger.weight": (9, D + 3)}, {}, True),
    "a table of a part without queries": ({"vision.pos_embed": (1, 9, D + 3)}, {}, True),
    "a table among embeddings": ({"embeddings.position_embeddings.weight": (9, D + 3)}, {}, False),
    "a head of parts of speech": ({"pos_head.weight": (9, D + 3)}, {}, True),
    "a table of another tower": (
        {
            "vision.position_embedding.weight": (9, D + 3),
            "vision.layers.0.attn.q_proj.weight": (D, D + 3),
            "vision.layers.0.attn.k_proj.weight": (D, D + 3),
        },
        {},
        True,
    ),
    "camel case": ({"PosEmbed.weight": (9, D + 3)}, {}, False),
    "config says rope": ({"pos_embed": (1, 9, D + 3)}, {"rope_theta": 1e4}, True),
    "config holds the word only": ({"pos_embed": (1, 9, D + 3)}, {"european": True}, False),
    "frequencies": ({"rotary_emb.inv_freq": (4,)}, {}, True),
    "frequencies and a table": ({"rotary_emb.inv_freq": (4,), "pos_embed": (1, 9, D + 3)}, {}, True),
    "config says absolute": ({}, {"position_embedding_type": "absolute"}, False),
    "config says rotary, beside a table": ({"pos_embed": (1, 9, D + 3)}, {"position_embedding_type": "rotary"}, True),
    "config has rope_theta": ({"pos_embed": (1, 9, D + 3)}, {"rope_theta": 1e4}, True),
    "config has no rope scaling": ({"pos_embed": (1, 9, D + 3)}, {"rope_scaling": None}, False),
    "config says alibi": ({}, {"alibi": True}, False),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_rotary_embeddings_are_stated_where_there_may_be_some(name: str) -> None:
    more, config, rotates = POSITIONS[name]
    flax = {n.replace(".", "/").replace("weight", "kernel"): s[::-1] for n, s in {**ATTENTION, **OUT}.items()}
    flax |= {n.replace(".", "/").replace("/weight", "/embedding"): s for n, s in more.items() if "inv_freq" not in n}
    assert ("rotary" in said(planned({**ATTENTION, **OUT, **more}, flax, **config))) is rotates


def test_norms_with_a_bias_or_statistics_are_what_they_are() -> None:
    torch = {"ln.weight": (D,), "ln.bias": (D,), "bn.weight": (D + 1,), "bn.running_mean": (D + 1,),
             "bn.running_var": (D + 1,), "bn.bias": (D + 1,), "prelu.weight": (D + 2,), **OUT}  # fmt: skip
    flax = {"ln/scale": (D,), "ln/bias": (D,), "bn/scale": (D + 1,), "bn/mean": (D + 1,), "bn/var": (D + 1,),
            "bn/bias": (D + 1,), "prelu/weight": (D + 2,), "lm_head/kernel": (D, 5)}  # fmt: skip
    assert not said(planned(torch, flax))


def test_an_offset_that_a_rule_says_is_not_assumed() -> None:
    rules = [
        {"torch": f"layers.{{i}}.{k}_norm.weight", "flax": f"layers/{{i}}/{k}_norm/scale", "offset": 1}
        for k in ("attn", "mlp")
    ]
    assert "norms" not in said(planned({**NORMS, **OUT}, rules=rules))
    assert "norms" in said(planned({**NORMS, **OUT}))


FUSED = {"h.0.attn.qkv.weight": (24, D), "h.1.attn.qkv.weight": (24, D), **OUT}


def test_parts_that_are_fused_on_both_sides_are_carried_in_their_order() -> None:
    plan = planned(FUSED)
    assert said(plan) == {"rotary", "scales", "fused"}
    fused = next(a for a in plan.assumptions if a.text.startswith("fused"))
    assert set(fused.targets) == {"h/0/attn/qkv/kernel", "h/1/attn/qkv/kernel"}
    split = {f"h/{i}/attn/{k}/kernel": (D, 8) for i in range(2) for k in ("query", "key", "value")}
    rule = {"torch": "h.{i}.attn.qkv.weight", "flax": [f"h/{{i}}/attn/{k}/kernel" for k in ("query", "key", "value")],
            "fused": "block"}  # fmt: skip
    assert said(planned(FUSED, {**split, "lm_head/kernel": (D, 5)}, [rule])) == {"rotary", "scales"}


def test_what_rules_pair_is_stated_too() -> None:
    torch = {"x.weight": (D,), "y.weight": (5, D)}
    flax = {"final_norm/scale": (D,), "attn/q/kernel": (D, 5)}
    rules = [{"torch": "x.weight", "flax": "final_norm/scale"}, {"torch": "y.weight", "flax": "attn/q/kernel"}]
    assert said(planned(torch, flax, rules)) == {"norms", "scales"}


def test_one_side_to_itself_states_nothing() -> None:
    specs = {name: TensorSpec(shape, "float32") for name, shape in {**ATTENTION, **NORMS}.items()}
    source, like = Checkpoint("a", "torch", specs), Checkpoint("b", "torch", {f"m.{n}": s for n, s in specs.items()})
    plan = make_plan(source, like, PlanOptions())
    assert plan.complete, str(plan)
    assert not plan.assumptions


def test_framework_modules_say_what_they_do() -> None:
    torch = pytest.importorskip("torch")
    import flax.linen as nn
    import jax

    import graftax as gx

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.MultiHeadDotProductAttention(2, name="mha")(x, x)
            return nn.RMSNorm(name="norm")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.norm = torch.nn.MultiheadAttention(8, 2), torch.nn.RMSNorm(8)

    like = gx.linen(Flax(), jax.ShapeDtypeStruct((1, 3, 8), "float32"))
    plan = gx.plan(Torch(), like)
    assert plan.complete, str(plan)
    assert not plan.assumptions
    assert {a.text.partition(":")[0] for a in gx.plan(Torch().state_dict(), like).assumptions} >= {"norms"}


def test_cells_that_bear_their_layers_number_assume_nothing() -> None:
    """lstm/0/cell against l0: both sides count layers. Linen's own counters are assumed to."""
    torch: dict[str, Any] = {}
    for layer in range(2):
        torch |= {f"lstm.weight_{k}_l{layer}": (4 * D, D) for k in ("ih", "hh")}
        torch |= {f"lstm.bias_{k}_l{layer}": (4 * D,) for k in ("ih", "hh")}

    def cells(*names: str) -> dict[str, Any]:
        gates = {f"{name}/{k}{g}/kernel": (D, D) for name in names for k in "ih" for g in "ifgo"}
        return gates | {f"{name}/h{g}/bias": (D,) for name in names for g in "ifgo"}

    assert not said(planned(torch, cells("lstm/0/cell", "lstm/1/cell")))
    counted = planned(torch, cells("OptimizedLSTMCell_0", "OptimizedLSTMCell_1"))
    assert any("layer by layer" in a.text for a in counted.assumptions)


def test_a_table_of_positions_speaks_for_its_own_tower_alone() -> None:
    tower = {name.replace("layers", "vision.layers"): shape for name, shape in ATTENTION.items()}
    plan = planned({**tower, "vision.position_embedding.weight": (9, D + 3), **ATTENTION, **OUT})
    rotary = next(a for a in plan.assumptions if a.text.startswith("rotary"))
    assert rotary.targets
    assert not any("vision" in name for name in rotary.targets)


def test_the_order_of_gates_in_one_tensor_is_assumed() -> None:
    gates = {"cell.gates.weight": np.zeros((16, 4), "float32"), "cell.gates.bias": np.zeros(16, "float32")}
    like = {"cell": {"gates": {"kernel": np.zeros((4, 16), "float32"), "bias": np.zeros(16, "float32")}}}
    plan = gx.plan(gates, like)
    assert plan.complete
    (said,) = (assumption for assumption in plan.assumptions if assumption.text.startswith("gates:"))
    assert set(said.targets) == {"cell/gates/kernel", "cell/gates/bias"}
