"""gx.plan, port, port_file and the commands with inputs: what is proved, shown, kept and refused."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx
from safetensors.numpy import load_file
from torch import nn

import graftax as gx
from graftax.cli import run
from graftax.errors import GraftaxError, ModelError, ParityError, UsageError
from graftax.plans import Plan
from graftax.probe.search import Found, Search

from .pairs import BLOCK, BY_NAME, CONV, EXPERTS, MLP, FlaxIdle, Pair, flat, nested, redrawn, same

IMAGES = "NCHW -> NHWC"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of the block, proved."""
    return gx.plan(BLOCK.torch_model(), BLOCK.like(), inputs=BLOCK.inputs())


# ---------------------------------------------------------------- gx.plan


def test_the_proof_says_what_ran(plan: Plan) -> None:
    proof = plan.proof
    assert proof is not None
    assert proof.leaves == len(plan.like.specs) == 16
    assert proof.open == ()
    assert 0 <= proof.error < 1e-5
    assert (proof.source, proof.ratio) == ("", None)
    models = dict(proof.models)
    assert set(models) == {"torch", "flax"}
    assert all(len(code) == 64 for code in (*models.values(), proof.inputs))
    assert plan.complete
    assert BLOCK.right(plan)


def test_the_proof_is_shown_once(plan: Plan) -> None:
    text = str(plan)
    assert text.count("proof: 16 leaves proved by running both models") == 1
    assert "not proved" not in text


def test_the_proof_is_kept(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    for other in (gx.load_plan(tmp_path / "plan.json"), pickle.loads(pickle.dumps(plan))):
        assert other.proof == plan.proof
        assert other.entries == plan.entries


def test_a_plan_of_an_older_version_has_no_proof(tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    gx.plan(MLP.torch_model(), MLP.like(), inputs=MLP.inputs()).save(saved)
    data = json.loads(saved.read_text())
    del data["proof"]
    saved.write_text(json.dumps(data))
    assert gx.load_plan(saved).proof is None


@pytest.mark.parametrize(
    "proof", [[], "yes", {"leaves": 3}, {"leaves": "many", "error": 0}, {"leaves": 1, "error": None}]
)
def test_a_damaged_proof_is_an_error(proof: Any, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    gx.plan({"a.weight": np.zeros((2, 3))}, {"a/kernel": np.zeros((3, 2))}).save(saved)
    data = json.loads(saved.read_text())
    saved.write_text(json.dumps({**data, "proof": proof}))
    with pytest.raises(GraftaxError, match="damaged"):
        gx.load_plan(saved)


def test_the_code_and_the_inputs_are_in_the_proof(plan: Plan) -> None:
    """Another input, another activation: other hashes; the same again: the same."""
    assert plan.proof is not None
    again = gx.plan(BLOCK.torch_model(), BLOCK.like(), inputs=BLOCK.inputs()).proof
    assert again is not None
    assert (again.models, again.inputs) == (plan.proof.models, plan.proof.inputs)
    (x,) = BLOCK.inputs()
    other = gx.plan(BLOCK.torch_model(), BLOCK.like(), inputs=2 * x).proof
    assert other is not None
    assert other.models == plan.proof.models
    assert other.inputs != plan.proof.inputs


def test_inputs_false_takes_what_names_give() -> None:
    like = BLOCK.like(crossed=True)
    plan = gx.plan(BLOCK.torch_model(), like, inputs=False)
    assert plan.proof is None
    assert "running" not in str(plan)
    by_target = {t: e.sources for e in plan.entries for t in e.targets}
    assert by_target["params/up/kernel"] == ("up.weight",)
    ran = gx.plan(BLOCK.torch_model(), like, inputs=BLOCK.inputs())
    assert {t: e.sources for e in ran.entries for t in e.targets}["params/up/kernel"] == ("down.weight",)


def test_without_inputs_the_example_is_drawn_from() -> None:
    for pair in (BLOCK, CONV):
        plan = gx.plan(pair.torch_model(), pair.like())
        assert plan.proof is not None
        assert pair.right(plan)


class Frames(nn.Module):
    """Takes (N, frames, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 2)

    def forward(self, x: Any) -> Any:
        return self.conv(x.flatten(0, 1)).mean((2, 3)).view(*x.shape[:2], -1)


class FlaxFrames(fn.Module):
    """Takes (N, frames, H, W, C)."""

    @fn.compact
    def __call__(self, x: Any) -> Any:
        return fn.Conv(3, (2, 2), padding="VALID")(x).mean((2, 3))


def test_an_example_of_frames_is_tried_with_their_channels_after_them() -> None:
    plan = gx.plan(redrawn(Frames()), gx.linen(FlaxFrames(), np.zeros((1, 2, 4, 5, 3), np.float32)))
    assert plan.proof is not None


class Dropped(fn.Module):
    @fn.compact
    def __call__(self, x: Any, deterministic: bool) -> Any:
        return fn.Dense(3)(fn.Dropout(0.5, deterministic=deterministic)(x))


def test_a_flag_of_both_calls_that_torch_does_not_take_is_flax_s_alone() -> None:
    """As in check_parity."""
    module, x = nn.Sequential(nn.Linear(3, 3)).eval(), np.random.default_rng(0).standard_normal((4, 3), np.float32)
    like, inputs = gx.linen(Dropped(), x, deterministic=True), ((x,), {"deterministic": True})
    assert gx.plan(module, like, inputs=inputs).proof is not None
    assert gx.check_parity(module, like, inputs, weights=module)


def test_a_strict_search_without_time_does_not_mean_that_the_models_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Search] = []
    run_search = Search.run

    def no_time(self: Search) -> Found:
        runs.append(self)
        return Found() if len(runs) == 1 else run_search(self)

    monkeypatch.setattr(Search, "run", no_time)
    plan = gx.plan(MLP.torch_model(), MLP.like(), inputs=MLP.inputs())
    assert len(runs) == 2
    assert plan.proof is not None
    assert not plan.assumptions


def test_neither_model_is_changed() -> None:
    module, like = EXPERTS.torch_model().train(), EXPERTS.like()
    held = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    mine = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(like))]
    gx.plan(module, like, inputs=EXPERTS.call())
    assert module.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(held[name], tensor) for name, tensor in module.state_dict().items())
    assert all(map(np.array_equal, mine, jax.tree.leaves(nnx.state(like))))


def test_images_with_a_layout() -> None:
    (x,) = CONV.inputs()
    for options in (
        {"inputs": gx.Inputs(x, layout=IMAGES)},
        {"inputs": torch.from_numpy(x), "layout": IMAGES},
        {"inputs": gx.Inputs(torch=x, flax=x.transpose(0, 2, 3, 1))},
    ):
        plan = gx.plan(CONV.torch_model(), CONV.like(), **options)
        assert plan.proof is not None
        assert CONV.right(plan)


def test_images_without_a_layout_are_told_of_it() -> None:
    with pytest.raises(GraftaxError, match="layout"):
        gx.plan(CONV.torch_model(), CONV.like(), inputs=CONV.inputs())


def test_a_leaf_that_nothing_depends_on_is_open() -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.busy = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.busy(x)

    plan = gx.plan(Torch(), gx.linen(FlaxIdle(), jnp.zeros((1, 4))), inputs=TWO)
    wrong = [e.text for e in plan.entries if "params/idle/kernel" in e.targets and e.sources != ("idle.weight",)]
    assert not wrong, f"proved, and wrong: {wrong}"
    assert plan.proof is not None
    assert set(plan.proof.open) == {"params/idle/kernel", "params/idle/bias"}
    assert plan.proof.leaves == 2
    assert "not proved, because nothing in the run depends on them: params/idle/" in str(plan)


# ---------------------------------------------------------------- Flax to torch


@pytest.mark.parametrize("name", ["experts", "block", "tagger"])
def test_from_flax_to_torch(name: str) -> None:
    pair = BY_NAME[name]
    plan = gx.plan(pair.like(), pair.torch_model(), inputs=pair.call())
    assert plan.complete, str(plan)[:1500]
    assert plan.proof is not None
    module = pair.torch_model()
    want = pair.state(module)
    values = pair.true_map(want)
    made = plan.run(nested(values), sharding="host")
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in made.items()})
    again = pair.true_map(pair.state(module))
    assert all(same(again[path], values[path]) for path in values)


def test_a_port_from_nnx_to_torch_is_proved_on_its_weights() -> None:
    module, like = EXPERTS.torch_model(), EXPERTS.like()
    made = gx.port(like, module, inputs=EXPERTS.call())
    module.load_state_dict(made)
    (x,) = EXPERTS.inputs()
    np.testing.assert_allclose(EXPERTS.torch_out(module, (x,)), np.asarray(like(jnp.asarray(x))), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- a source that is a file


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_with_its_live_model(ending: str, tmp_path: Path) -> None:
    source, out = tmp_path / f"m.{ending}", tmp_path / "out.safetensors"
    save(MLP, source)
    model = MLP.torch_model()
    for parameter in model.parameters():
        parameter.data.zero_()  # its values do not count: the file's do
    gx.port_file(source, MLP.like(), out, inputs=MLP.inputs(), source_model=model)
    want, got = MLP.true_map(MLP.state(MLP.torch_model())), load_file(out)
    assert all(same(got[path], want[path]) for path in want)
    proof = proof_of(out)
    assert proof is not None
    assert proof["leaves"] == len(want)
    assert len(proof["source"]) == 64
    assert 0 < proof["ratio"] <= 5


def test_a_port_on_nothing_but_the_files_has_no_proof(tmp_path: Path) -> None:
    source, out = tmp_path / "m.pt", tmp_path / "out.safetensors"
    save(MLP, source)
    like = {path: np.zeros_like(leaf) for path, leaf in MLP.true_map(MLP.state(MLP.torch_model())).items()}
    with pytest.raises(UsageError, match="live"):
        gx.port_file(source, nested(like), out, inputs=MLP.inputs(), source_model=MLP.torch_model())
    assert not out.exists()


def test_the_live_model_must_be_that_of_the_file(tmp_path: Path) -> None:
    save(MLP, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="other keys"):
        gx.plan(tmp_path / "m.pt", MLP.like(), inputs=MLP.inputs(), source_model=BLOCK.torch_model())


# ---------------------------------------------------------------- refused


def test_inputs_need_two_models(tmp_path: Path) -> None:
    save(BLOCK, tmp_path / "m.pt")
    state = BLOCK.torch_model().state_dict()
    for source, like in (
        (tmp_path / "m.pt", BLOCK.like()),
        (state, BLOCK.like()),
        (BLOCK.torch_model(), nested(BLOCK.true_map(BLOCK.state(BLOCK.torch_model())))),
        (BLOCK.torch_model(), state),
    ):
        with pytest.raises(UsageError) as caught:
            gx.plan(source, like, inputs=BLOCK.inputs())
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("inputs", [True, "a file", 3, (), {}, object()], ids=lambda given: type(given).__name__)
def test_inputs_that_are_no_arrays(inputs: Any) -> None:
    with pytest.raises(UsageError):
        gx.plan(BLOCK.torch_model(), BLOCK.like(), inputs=inputs)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match=r"FlaxBlock|Block"):
        gx.plan(BLOCK.torch_model(), BLOCK.like(), inputs=np.zeros((2, 3, 5), "f4"))


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x if self.between is None else self.between(x))


class FlaxTwo(fn.Module):
    between: Any = None

    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.Dense(4, name="p")(x)
        return fn.Dense(4, name="q")(x if self.between is None else self.between(x))


TWO = np.random.default_rng(0).standard_normal((3, 4)).astype("f4")


def two(between: Any = None) -> Any:
    return gx.linen(FlaxTwo(between), jnp.zeros((1, 4)))


def test_dropout_in_train_mode_is_named() -> None:
    with pytest.raises(ModelError, match=r"(?s)train mode.*between.*Dropout"):
        gx.port(Two(nn.Dropout(0.5)).train(), two(), inputs=TWO)


def test_a_flax_model_that_drops_is_named() -> None:
    like = gx.linen(FlaxTwo(fn.Dropout(0.5, deterministic=False)), jnp.zeros((1, 4)), rngs={"params": 0, "dropout": 1})
    with pytest.raises(ModelError, match=r"FlaxTwo(.|\n)*[Dd]ropout"):
        gx.plan(Two().eval(), like, inputs=TWO)


@pytest.mark.parametrize(
    "between", [lambda x: x + torch.randn_like(x), lambda x: nn.functional.dropout(x)], ids=["randn", "dropout"]
)
def test_a_torch_model_that_draws_random_numbers(between: Any) -> None:
    with pytest.raises(ModelError, match="random numbers"):
        gx.plan(Two(between).eval(), two(), inputs=TWO)


def test_a_flax_model_that_calls_back() -> None:
    def back(x: Any) -> Any:
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ModelError, match="pure_callback"):
        gx.plan(Two().eval(), two(back), inputs=TWO)
    assert gx.plan(Two().eval(), two(back)).proof is None  # nobody asked for a proof: names decide


def test_a_torch_model_that_fails_is_named() -> None:
    def boom(x: Any) -> Any:
        raise RuntimeError("boom")

    with pytest.raises(ModelError, match=r"Two.*boom"):
        gx.plan(Two(boom).eval(), two(), inputs=TWO)


def test_inputs_that_are_not_finite_are_told_of() -> None:
    with pytest.raises(GraftaxError, match=r"finite|NaN|nan"):
        gx.plan(Two().eval(), two(), inputs=np.full((3, 4), np.nan, "f4"))


# ---------------------------------------------------------------- a port that is proved


def test_nothing_is_written_if_parity_fails(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ParityError) as caught:
        gx.port_file(BLOCK.torch_model(), BLOCK.like(scale=1.01), out, inputs=BLOCK.inputs(), rules=RULES)
    assert caught.value.report.outputs  # pyright: ignore[reportAttributeAccessIssue]
    assert not list(tmp_path.iterdir())


RULES = """rules = [
  { torch = "qkv.weight", flax = ["params/s/kernel", "params/r/kernel", "params/t/kernel"], fused = "block" },
  { torch = "qkv.bias", flax = ["params/s/bias", "params/r/bias", "params/t/bias"], fused = "block" },
  { torch = "proj.weight", flax = "params/o/kernel", layout = "linear" },
  { torch = "proj.bias", flax = "params/o/bias" },
  { torch = "n1.weight", flax = "params/pre/scale" },
  { torch = "n1.bias", flax = "params/pre/bias" },
  { torch = "n2.weight", flax = "params/post/scale" },
  { torch = "n2.bias", flax = "params/post/bias" },
]"""


def test_load_into_is_proved_first() -> None:
    like = EXPERTS.like(eps=0.1)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(like))]
    with pytest.raises((ParityError, gx.errors.PlanError)):
        gx.load_into(like, EXPERTS.torch_model(), inputs=EXPERTS.call())
    assert all(map(np.array_equal, before, jax.tree.leaves(nnx.state(like))))
    like = EXPERTS.like()
    gx.load_into(like, EXPERTS.torch_model(), inputs=EXPERTS.call())
    (x,) = EXPERTS.inputs()
    np.testing.assert_allclose(
        np.asarray(like(jnp.asarray(x))), EXPERTS.torch_out(EXPERTS.torch_model(), (x,)), rtol=1e-4, atol=1e-5
    )


def test_a_proof_beside_a_file_goes_with_its_bytes(tmp_path: Path) -> None:
    """OUT.proof.json speaks of the bytes of OUT: when OUT is written anew without a proof, there is none."""
    out = tmp_path / "out.npz"
    gx.port_file(MLP.torch_model(), MLP.like(), out, inputs=MLP.inputs())
    assert proof_of(out) is not None
    assert (tmp_path / "out.npz.proof.json").is_file()
    ones = {path: np.ones_like(leaf) for path, leaf in MLP.true_map(MLP.state(MLP.torch_model())).items()}
    gx.port_file(nested(ones), MLP.like(), out, inputs=False)
    assert proof_of(out) is None


# ---------------------------------------------------------------- the commands


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to be in, and the factories of `sides`."""
    module: Any = ModuleType("sides")
    for pair in (BLOCK, CONV):
        setattr(module, f"torch_{pair.name}", pair.torch_model)
        setattr(module, f"flax_{pair.name}", pair.like)
        setattr(module, f"inputs_{pair.name}", lambda pair=pair: pair.inputs())
    module.other_block = lambda: BLOCK.like(scale=1.001)
    monkeypatch.setitem(sys.modules, "sides", module)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run(list(argv))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_plan_from_the_command_line(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--like", "sides:flax_block", "--inputs", "sides:inputs_block")
    code, text, _ = call(capsys, "plan", "sides:torch_block", *given, "-o", "plan.json")
    assert code == 0
    assert "proof: 16 leaves proved by running both models" in text
    assert gx.load_plan(sides / "plan.json").proof is not None
    code, text, _ = call(capsys, "plan", "sides:torch_block", *given, "--json")
    assert json.loads(text)["result"]["proof"]["leaves"] == 16


def test_a_layout_from_the_command_line(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--like", "sides:flax_conv", "--inputs", "sides:inputs_conv", "--layout", IMAGES)
    code, text, _ = call(capsys, "plan", "sides:torch_conv", *given)
    assert code == 0
    assert "proof: 10 leaves" in text


def test_inputs_from_a_file(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("x.npz", arg0=BLOCK.inputs()[0])
    code, text, _ = call(capsys, "plan", "sides:torch_block", "--like", "sides:flax_block", "--inputs", "x.npz")
    assert code == 0
    assert "proof: 16 leaves" in text


def test_port_writes_the_proof_and_inspect_shows_it(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BLOCK, sides / "m.safetensors")
    given = ("--like", "sides:flax_block", "--inputs", "sides:inputs_block", "--source-model", "sides:torch_block")
    for out in ("out.safetensors", "out.npz"):
        assert call(capsys, "port", "m.safetensors", *given, "-o", out)[0] == 0
        code, text, _ = call(capsys, "inspect", out)
        assert code == 0
        assert "proof: 16 leaves proved by running both models" in text
        assert "on the real weights" in text
        assert proof_of(sides / out) is not None
    assert not (sides / "out.safetensors.proof.json").exists()
    assert json.loads((sides / "out.npz.proof.json").read_text())["leaves"] == 16


def test_port_writes_nothing_where_the_models_differ(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--like", "sides:other_block", "--inputs", "sides:inputs_block")
    code, out, err = call(capsys, "port", "sides:torch_block", *given, "-o", "out.safetensors")
    assert code == 1
    assert "Parity fails" in out + err
    assert not list(sides.iterdir())


def test_a_missing_model_is_a_usage_error(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BLOCK, sides / "m.pt")
    code, _, err = call(capsys, "plan", "m.pt", "--like", "sides:flax_block", "--inputs", "sides:inputs_block")
    assert code == 2
    assert "m.pt has only weights" in err
    assert "--source-model" in err


@pytest.mark.parametrize("out", ["out.safetensors", "out.npz"])
def test_a_replaced_leaf_ends_the_proof(out: str, sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--like", "sides:flax_block", "--inputs", "sides:inputs_block")
    assert call(capsys, "port", "sides:torch_block", *given, "-o", out)[0] == 0
    new = f"new_{out}"
    assert call(capsys, "replace", out, "params/o/bias", "--zeros", "-o", new)[0] == 0
    assert proof_of(sides / new) is None
    assert "proof" not in call(capsys, "inspect", new)[1]
    assert proof_of(sides / out) is not None


# ---------------------------------------------------------------- helpers


def save(pair: Pair, path: Path) -> None:
    state = pair.torch_model().state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def proof_of(path: Path) -> Any:
    """The proof of a file, as `inspect` finds it."""
    from graftax.formats import open_path
    from graftax.report.inspecting import inspection

    return inspection(open_path(str(path)))["proof"]


def test_the_helper_reads_what_is_there(tmp_path: Path) -> None:
    assert flat({"a": {"b": np.zeros(2)}}).keys() == {"a/b"}
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    assert proof_of(tmp_path / "x.npz") is None


def test_models_that_do_not_fit_into_memory_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftax.probe.both._memory", lambda: 1000)
    with pytest.raises(UsageError, match="small configuration"):
        gx.plan(Two().eval(), two(), inputs=np.ones((3, 4), "f4"))
    monkeypatch.setattr("graftax.probe.both.DRAWN_MOST", 10)
    assert gx.plan(Two().eval(), two()).proof is None
