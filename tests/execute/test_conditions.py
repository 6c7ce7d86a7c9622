"""What ops take for granted of values is found out tile by tile as it is for whole tensors, wherever it is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import PlanError
from graftax.execute import streamed
from graftax.execute.conditions import check_conditions
from graftax.execute.fill_tile import held
from graftax.execute.loop_nests import NotLocal
from graftax.ops import CONDITIONS, Concat, Op, Rearrange, Split, apply_chain
from graftax.ops.chains import bind_chain
from graftax.ops.checked_ops import Crop, RequireZero, Same, Unrepeat
from graftax.ops.norm_ops import FoldWeightNorm
from graftax.tree import TensorSpec

SHAPE = (12, 10)
TURN = Rearrange("a b -> b a")
CASES: dict[str, tuple[tuple[Op, ...], int]] = {
    "same": ((Same(3),), 3),
    "same, turned": ((TURN, Same(2), TURN), 2),
    "unrepeat": ((Unrepeat(0, 3),), 1),
    "unrepeat, turned": ((TURN, Unrepeat(1, 4)), 1),
    "crop": ((Crop(0, 2, 3),), 1),
    "crop, turned": ((TURN, Crop(1, 0, 5, 1.5)), 1),
    "zero": ((RequireZero(0, 0, 4, 8),), 1),
    "zero of the second, after a split": ((Split(0, (4, 8)), RequireZero(1, 1, 2, 9, "no place for b_hn")), 1),
    "two": ((Concat(0, (12, 12)), Unrepeat(0, 2), Crop(0, 1, 0)), 2),
}


def fitting(ops: tuple[Op, ...], count: int) -> list[np.ndarray[Any, Any]]:
    """Values that pass: all rows the fill of what is cropped, zero, and the same; a few others where they may be."""
    fill = next((op.fill for op in ops if isinstance(op, Crop)), 0.0)
    return [np.full(SHAPE, fill, np.float32) for _ in range(count)]


def judged(ops: tuple[Op, ...], given: list[np.ndarray[Any, Any]]) -> str:
    try:
        apply_chain(ops, tuple(given))
    except PlanError as error:
        return str(error)
    return ""


def judged_in_tiles(ops: tuple[Op, ...], given: list[np.ndarray[Any, Any]], most: int) -> str:
    specs = tuple(TensorSpec(array.shape, "float32") for array in given)
    sources = [held(array, spec) for array, spec in zip(given, specs, strict=True)]
    try:
        check_conditions(ops, specs, sources, np.zeros(1 << 12, np.uint8), most)
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [16, 100, 1 << 20])
def test_every_single_value_is_judged_as_in_whole_tensors(case: str, most: int) -> None:
    chain, count = CASES[case]
    ops, _ = bind_chain(chain, tuple(TensorSpec(SHAPE, "float32") for _ in range(count)))
    assert judged(ops, fitting(ops, count)) == judged_in_tiles(ops, fitting(ops, count), most) == ""
    broken = 0
    for tensor in range(count):
        for place in range(SHAPE[0] * SHAPE[1]):
            given = fitting(ops, count)
            given[tensor].reshape(-1)[place] = 7
            expected = judged(ops, given)
            assert judged_in_tiles(ops, given, most) == expected, (tensor, place)
            broken += bool(expected)
    assert broken


def test_bits_count() -> None:
    given = [np.full(SHAPE, np.nan, np.float32) for _ in range(2)]
    assert judged_in_tiles((Same(2),), given, 64) == ""
    given[1][3, 4] = -given[1][3, 4]
    assert "as tied, but their values differ" in judged_in_tiles((Same(2),), given, 64)


def test_every_op_with_a_condition_is_here() -> None:
    assert {type(op) for ops, _ in CASES.values() for op in ops} >= set(CONDITIONS)


def test_ops_that_need_whole_tensors_say_so() -> None:
    ops = (FoldWeightNorm(0), Crop(0, 1, 0))
    specs = (TensorSpec((12, 1), "float32"), TensorSpec(SHAPE, "float32"))
    bound, _ = bind_chain(ops, specs)
    sources = [held(np.ones(spec.shape, np.float32), spec) for spec in specs]
    with pytest.raises(NotLocal):
        check_conditions(bound, specs, sources, np.zeros(1 << 12, np.uint8), 64)


TIED = [{"torch": ["emb.weight", "head.weight"], "flax": "emb/embedding", "fused": "tied"}]
PADDED = [{"torch": "vocab.weight", "flax": "vocab/embedding", "ops": "v d -> v d", "pad": {"v": 24}}]


@pytest.mark.parametrize("rules", [TIED, PADDED], ids=["tied", "padded"])
def test_a_port_within_a_budget_looks_at_them_and_holds_no_tensor_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: list[dict[str, Any]]
) -> None:
    table = np.random.default_rng(0).standard_normal((2024, 300), dtype=np.float32)
    table[2000:] = 0
    tied = rules is TIED
    arrays = {"emb.weight": table, "head.weight": table.copy()} if tied else {"vocab/embedding": table}
    made, like = ("emb/embedding", None) if tied else ("vocab.weight", {"vocab.weight": table[:2000]})
    side = "flax" if tied else "torch"

    def port(out: str) -> None:
        save_file(arrays, tmp_path / "s.safetensors")
        gx.port_file(tmp_path / "s.safetensors", like, tmp_path / out, rules, to=side, max_memory="2MiB")

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "run_entry", lambda *args: pytest.fail("run whole"))
        port("o.safetensors")
        port("o.npz")
    opened = gx.open_checkpoint(tmp_path / "o.safetensors")
    assert opened.read(made).tobytes() == (table if tied else table[:2000]).tobytes()
    arrays["head.weight" if tied else "vocab/embedding"][2023, 299] = 1
    for out in ("p.safetensors", "p.npz"):
        with pytest.raises(PlanError, match="as tied, but their values differ" if tied else "would drop rows"):
            port(out)
        assert not (tmp_path / out).exists()
