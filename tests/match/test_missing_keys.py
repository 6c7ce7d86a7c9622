"""Names that a torch like ties, and a source that has a tensor for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx

torch = pytest.importorskip("torch")


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight


def _source(equal: bool) -> dict[str, Any]:
    table = np.arange(24, dtype="f4").reshape(6, 4)
    return {"emb": {"embedding": table}, "head": {"kernel": table.T if equal else -table.T}}


@pytest.mark.parametrize("like", [Tied(), Tied().state_dict()], ids=["module", "state_dict"])
def test_names_of_one_tensor_do_not_get_different_values(like: Any) -> None:
    plan = gx.plan(_source(equal=False), like)
    assert [failure.key for failure in plan.failures] == ["head.weight"]
    assert "is tied to emb.weight" in str(plan.failures[0])
    with pytest.raises(gx.errors.PlanError, match=r"is tied to emb\.weight"):
        gx.port(_source(equal=False), like)


def test_names_of_one_tensor_get_equal_values_and_the_plan_says_what_it_read() -> None:
    source, module = _source(equal=True), Tied()
    plan = gx.plan(source, module)
    assert plan.complete
    assert any("head" in read and "emb" in read for read in plan.reads)
    module.load_state_dict(gx.port(source, module))
    assert np.array_equal(module.emb.weight.detach(), source["emb"]["embedding"])
