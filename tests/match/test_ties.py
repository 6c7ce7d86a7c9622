"""Equal tensors are tied only where no name and no number keeps them apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import graftax as gx

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
SINES = np.stack([np.sin(np.arange(8) * k) for k in range(4)], 1).astype("f4")


def rnd(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("f4")


def tensors(**arrays: Any) -> dict[str, Any]:
    return {name.replace("__", "."): torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def test_equal_tables_go_where_their_names_say() -> None:
    source = tensors(enc__pos__weight=SINES, dec__pos__weight=SINES, extra__pos__weight=rnd(8, 4))
    like = {"enc": {"pos": {"embedding": rnd(8, 4)}}, "dec": {"pos": {"embedding": rnd(8, 4)}}}
    plan = gx.plan(source, like)
    assert [q.sources for q in plan.questions] == [("extra.pos.weight",)]
    out = gx.port(source, like, unused="drop")
    assert all(np.array_equal(out[part]["pos"]["embedding"], SINES) for part in ("enc", "dec"))


def adapters(layers: int, alike: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i in range(layers):
        out[f"layers.{i}.ad.weight"] = torch.eye(4) if i < alike else torch.from_numpy(rnd(4, 4))
        out[f"layers.{i}.fc.weight"] = torch.from_numpy(rnd(5, 4))
    return out


def test_equal_layers_of_a_list_are_not_tied() -> None:
    like = {f"layers_{i}": {"ad": {"kernel": rnd(4, 4)}, "fc": {"kernel": rnd(4, 5)}} for i in range(2)}
    plan = gx.plan(adapters(3, 2), like, unused="drop")
    rows = [(e.sources, e.targets) for e in plan.entries if e.targets]
    assert all(len(a) == 1 and a[0].split(".")[1] == b[0].split("/")[0][-1] for a, b in rows)


def test_an_equal_layer_that_like_lacks_is_unexpected() -> None:
    source = adapters(2, 2)
    like = {"layers_0": {"ad": {"kernel": rnd(4, 4)}, "fc": {"kernel": rnd(4, 5)}}}
    like["layers_1"] = {"fc": {"kernel": rnd(4, 5)}}
    plan = gx.plan(source, like, rules=[{"torch": "layers.0.ad.weight", "flax": "layers_0/ad/kernel",
                                         "layout": "linear"}])  # fmt: skip
    assert not any("layers.1.ad.weight" in entry.sources for entry in plan.entries)
    assert any("layers.1.ad.weight" in question.sources for question in plan.questions)


class Head(torch.nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.emb.weight
        else:
            self.head.weight.data.copy_(self.emb.weight.data)


@pytest.mark.parametrize("tie", [True, False])
def test_the_storage_of_a_live_module_says_what_is_tied(tie: bool) -> None:
    plan = gx.plan(Head(tie), {"emb": {"embedding": rnd(6, 4)}})
    assert plan.complete == tie
    saved = {name: tensor.clone() for name, tensor in Head(tie).state_dict().items()}
    plan = gx.plan(saved, {"emb": {"embedding": rnd(6, 4)}})
    assert plan.complete
    assert any("2 tied names hold this tensor" in entry.evidence for entry in plan.entries)


@pytest.mark.parametrize("rows", [12, 13])
def test_a_tie_that_a_stack_of_as_many_values_hides(rows: int) -> None:
    """With 12 rows the table has as many values as each stack of three layers."""
    table, kernels = rnd(rows, 4), [[rnd(4, 4) for _ in range(3)] for _ in range(2)]
    source = tensors(embed__weight=table, lm_head__weight=table)
    source |= {f"layers.{i}.{n}.weight": torch.from_numpy(kernels[k][i]) for k, n in enumerate("qo") for i in range(3)}
    stacks = {n: {"kernel": np.stack([k.T for k in kernels[j]])} for j, n in enumerate("qo")}
    like = {"params": {"embed": {"embedding": table}, "layers": stacks}}
    plan = gx.plan(source, like)
    assert plan.complete, str(plan)
    made = plan.run(source)["params"]
    assert np.array_equal(made["embed"]["embedding"], table)
    assert all(np.array_equal(made["layers"][n]["kernel"], stacks[n]["kernel"]) for n in "qo")


class Tied(torch.nn.Module):
    """A table under three names, beside layers."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.shared, self.encoder, self.lm_head = (
            torch.nn.Embedding(rows, 4),
            torch.nn.Module(),
            torch.nn.Linear(4, rows),
        )
        self.encoder.embed_tokens = self.shared
        self.lm_head.weight = self.shared.weight
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("q", "o")}) for _ in range(3)
        )


@pytest.mark.parametrize("rows", [12, 13])
def test_names_that_like_ties_are_one_tensor(rows: int) -> None:
    table, head = rnd(rows, 4), rnd(rows)
    layers = {name: {"kernel": rnd(3, 4, 4)} for name in ("q", "o")}
    tree = {"params": {"token_embedder": {"embedding": table}, "lm_head": {"bias": head}, "layers": layers}}
    module = Tied(rows)
    plan = gx.plan(tree, module)
    assert plan.complete, str(plan)
    module.load_state_dict(plan.run(tree))
    assert np.array_equal(module.lm_head.weight.detach(), table)
    assert np.array_equal(module.encoder.embed_tokens.weight.detach(), table)
    assert np.array_equal(module.layers[2]["q"].weight.detach(), layers["q"]["kernel"][2].T)


TABLE, NORM = rnd(13, 8), rnd(8)
FLAX_SIDE = {"embed": {"embedding": TABLE}, "norm": {"scale": NORM}}


def test_a_head_that_the_source_does_not_store_may_be_tied() -> None:
    source = tensors(model__embed_tokens__weight=TABLE, model__norm__weight=NORM)
    like = {"model": FLAX_SIDE, "lm_head": {"kernel": rnd(8, 13)}}
    (question,) = gx.plan(source, like).questions
    assert question.targets == ("lm_head/kernel",)
    plan = gx.plan(source, like, rules=[question.candidates[0].rule])
    assert plan.complete, str(plan)
    made = plan.run(source)
    assert np.array_equal(made["lm_head"]["kernel"], TABLE.T)
    assert np.array_equal(made["model"]["embed"]["embedding"], TABLE)
    assert gx.plan(source, like, rules='{ flax = "lm_head/kernel", missing = "zeros" }').complete


def test_names_of_one_table_in_a_file() -> None:
    """like is a file, whose storage shows no tie: one answer fills all names."""
    like = {f"{name}.weight": torch.zeros(13, 8) for name in ("shared", "lm_head")} | {"norm.weight": torch.zeros(8)}
    tree = {"shared": {"embedding": TABLE}, "norm": {"scale": NORM}}
    (question,) = gx.plan(tree, like).questions
    plan = gx.plan(tree, like, rules=[question.candidates[0].rule])
    made = plan.run(tree)
    assert np.array_equal(made["shared.weight"], TABLE)
    assert np.array_equal(made["lm_head.weight"], TABLE)


@pytest.mark.parametrize("said", [True, False])
def test_config_says_that_a_head_is_tied(tmp_path: Any, said: bool) -> None:
    from safetensors.numpy import save_file

    save_file(
        {"model.embed_tokens.weight": TABLE, "model.norm.weight": NORM},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": said}))
    like = {"model": FLAX_SIDE, "lm_head": {"kernel": rnd(8, 13)}}
    plan = gx.plan(str(tmp_path), like)
    assert plan.complete == said
    if said:
        assert np.array_equal(plan.run(str(tmp_path))["lm_head"]["kernel"], TABLE.T)
        assert any("config.json says tie_word_embeddings" in entry.evidence for entry in plan.entries)
