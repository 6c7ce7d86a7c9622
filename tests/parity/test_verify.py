"""graftax verify: exit codes, what is printed, golden files with no torch installed, inputs from files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import graftax
from graftax.cli import run
from graftax.cli.verify import _suggesting
from graftax.errors import PlanError, UsageError
from graftax.parity.input_files import example_inputs, named_inputs, read_inputs
from graftax.plans import Candidate, Question
from graftax.probe.inputs import Inputs

FACTORIES = """
import numpy as np
import graftax as gx
from flax import linen as nn, nnx


def torch_net():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 7), torch.nn.LayerNorm(7, eps=1e-3)
    ).eval()


def torch_fails():
    import torch

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(12, 7)

        def forward(self, x):
            raise RuntimeError("torch side, my own mistake")

    return Broken().eval()


class Net(nn.Module):
    epsilon: float = 1e-3
    fail: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        assert train is False
        if self.fail:
            raise RuntimeError("flax side, my own mistake")
        x = nn.Conv(3, (3, 3), padding="VALID")(x)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return nn.LayerNorm(epsilon=self.epsilon)(nn.Dense(7)(x))


def flax_net(**settings):
    return gx.linen(Net(**settings), np.zeros((2, 4, 4, 2), "f4"), train=False)


def flax_wrong():
    return flax_net(epsilon=1.0)


def flax_fails():
    return flax_net(fail=True)


def flax_nnx():
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def images():
    return np.random.default_rng(1).normal(size=(2, 2, 4, 4)).astype("f4")


instance = flax_net().module
wrapped = flax_net()


def nothing():
    raise ValueError("no images today")
"""
RULES = """
rules = [
  { torch = "0.weight", flax = "params/Conv_0/kernel", layout = "conv" },
  { torch = "0.bias", flax = "params/Conv_0/bias" },
  { torch = "2.weight", flax = "params/Dense_0/kernel", layout = "linear" },
  { torch = "2.bias", flax = "params/Dense_0/bias" },
  { torch = "3.weight", flax = "params/LayerNorm_0/scale" },
  { torch = "3.bias", flax = "params/LayerNorm_0/bias" },
]
"""
NCHW = ["--layout", "NCHW -> NHWC"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factories, rules, a golden file with its layers and torch's weights."""
    torch = pytest.importorskip("torch", reason="the torch side needs torch, which is an optional dependency")
    here = tmp_path_factory.mktemp("verify")
    (here / "nets.py").write_text(FACTORIES)
    (here / "rules.toml").write_text(RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(str(here))
        import nets  # pyright: ignore[reportMissingImports]

        torch.save(nets.torch_net().state_dict(), here / "net.pt")
        words = ["verify", "--torch", "nets:torch_net", "--flax", "nets:flax_net", "--rules", "rules.toml", *NCHW]
        assert run([*words, "--record", "g.safetensors", "--record-layers"]) == 0
        sys.modules.pop("nets")
    return here


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """graftax verify in the folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(folder))

    def verify(*words: str) -> tuple[int, str, str]:
        code = run(["verify", *words])
        sys.modules.pop("nets", None)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert len(err.encode()) <= 2048
        return code, out, err

    return verify


BOTH = ["--torch", "nets:torch_net", "--flax", "nets:flax_net", "--rules", "rules.toml", *NCHW]
WRONG = ["--torch", "nets:torch_net", "--flax", "nets:flax_wrong", "--rules", "rules.toml", *NCHW]
GOLDEN = ["--golden", "g.safetensors", "--rules", "rules.toml"]


def test_a_port_that_holds(call: Any):
    code, out, err = call(*BOTH)
    assert (code, err) == (0, "")
    assert out.startswith("Parity holds: Sequential (torch) and Net (Flax) agree.")
    assert "argument 0 was drawn from a normal distribution (seed 0)" in out
    assert call(*BOTH, "--inputs", "nets:images")[0] == 0


def test_a_model_may_stand_in_the_module_itself(call: Any):
    """No function around it: a live module is taken as it is, not called."""
    words = ["--torch", "nets:torch_net", "--rules", "rules.toml", *NCHW]
    assert call(*words, "--flax", "nets:wrapped")[0] == 0
    code, _, err = call(*words, "--flax", "nets:instance")
    assert code == 2
    assert "the Flax side has no example" in err


def test_a_port_that_fails_names_the_layer_and_writes_the_page(call: Any, folder: Path):
    code, out, err = call(*WRONG, "--report", "out.html", "--record", "not.safetensors")
    assert code == 1
    assert "layer  3  ↔  LayerNorm_0" in out
    assert "cause  epsilon" in out
    assert err.strip() == "ParityError: parity fails at LayerNorm_0 (epsilon)"
    assert "first divergence" in (folder / "out.html").read_text("utf-8")
    assert not (folder / "not.safetensors").exists()
    assert "not.safetensors was not written, because parity fails" in out


def test_json(call: Any):
    code, out, _ = call(*WRONG, "--json")
    document = json.loads(out)
    assert (document["schema"], document["command"], document["ok"], document["exit"]) == (1, "verify", False, code)
    result = document["result"]
    assert result["ok"] is False
    assert result["first"]["flax"] == "LayerNorm_0"
    assert result["first"]["where"] == "out"
    assert result["causes"][0]["name"] == "epsilon"
    assert {"outputs", "layers", "weights", "settings", "not_traced", "threshold", "seconds"} <= set(result)
    assert "LayerNorm_0" in document["errors"][0]["what"]


def test_tolerances(call: Any):
    assert call(*BOTH, "--atol", "1e-4", "--rtol", "1e-4")[0] == 0
    code, out, _ = call(*BOTH, "--atol", "1e-12", "--rtol", "0")
    assert code == 1
    assert "outside" in out


# ---------------------------------------------------------------- golden files


def test_a_golden_file_replays_where_torch_is_not_installed(folder: Path):
    """A process in which `import torch` fails."""
    (folder / "absent").mkdir(exist_ok=True)
    (folder / "absent" / "torch.py").write_text("raise ImportError('torch is not installed here')")
    own = Path(graftax.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder / "absent", own, folder))), "COLUMNS": "120"}

    def verify(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "graftax.cli", "verify", *GOLDEN, *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = verify("--flax", "nets:flax_net", "--source", "net.pt")
    assert (code, err) == (0, "")
    assert "5 layer calls" in out or "4 layer calls" in out
    code, out, err = verify("--flax", "nets:flax_wrong", "--source", "net.pt")
    assert code == 1
    assert "layer  3  ↔  LayerNorm_0" in out
    assert "cause  epsilon" in out


def test_a_golden_file_with_weights_of_its_own(call: Any):
    code, out, _ = call(*GOLDEN, "--flax", "nets:flax_net", "--weights", "net.pt")
    assert code == 0
    assert "the weights were not audited" in out
    code, _, err = call(*GOLDEN, "--flax", "nets:flax_net")
    assert code == 1
    assert "holds no weights, and neither does a golden file" in err
    assert "--weights" in err


def test_torch_alone_can_be_recorded(call: Any, folder: Path):
    words = ["--torch", "nets:torch_net", "--inputs", "nets:images", *NCHW, "--record", "alone.safetensors"]
    code, out, err = call(*words)
    assert (code, out.strip(), err) == (0, "recorded alone.safetensors: Sequential, its outputs", "")
    words = [
        "--golden",
        "alone.safetensors",
        "--rules",
        "rules.toml",
        "--flax",
        "nets:flax_wrong",
        "--source",
        "net.pt",
    ]
    code, out, _ = call(*words)
    assert code == 1
    assert "the golden file holds outputs only" in out
    code, out, _ = call(*words[:5], "nets:flax_net", *words[6:])
    assert code == 0


def test_a_malformed_golden_file(call: Any, folder: Path):
    (folder / "bad.safetensors").write_bytes(b"nonsense" * 20)
    code, out, err = call("--golden", "bad.safetensors", "--flax", "nets:flax_net")
    assert (code, out) == (3, "")
    assert "bad.safetensors is no golden file" in err
    assert call("--golden", "gone.safetensors", "--flax", "nets:flax_net")[0] == 5


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of --torch"),
        (["--torch", "nets:torch_net", "--golden", "g.safetensors"], "exactly one of --torch"),
        (["--torch", "nets:torch_net"], "--flax pkg.mod:factory is missing"),
        (["--golden", "g.safetensors"], "--flax pkg.mod:factory is missing"),
        (["--torch", "nets:torch_net", "--record", "x.safetensors"], "--inputs is missing"),
        (["--torch", "nets:torch_net", "--flax", "nets:flax_net", "--record-layers"], "goes with --record"),
        (["--golden", "g.safetensors", "--flax", "nets:flax_net", "--layout", "NCHW -> NHWC"], "--layout cannot go"),
        (["--torch", "net.pt", "--flax", "nets:flax_net"], "net.pt is no pkg.mod:factory"),
        (["--torch", "nets:torch_net", "--flax", "nets:flax_nnx"], "the Flax side has no example"),
        (["--torch", "nets:torch_net", "--flax", "nets:gone"], "has no 'gone'"),
        (["--torch", "nets:flax_net", "--flax", "nets:flax_net", *NCHW], "torch.nn.Module"),
        ([*BOTH[:-1], "NCHW"], "layout 'NCHW'"),
        ([*BOTH, "--inputs", "g.safetensors"], "its names do not form a call"),
    ],
)
def test_usage_errors_exit_2(call: Any, words: list[str], message: str):
    code, out, err = call(*words)
    assert message in err
    assert (code, out) == (2, "")


def test_a_model_that_fails_is_named_and_exits_70(call: Any):
    code, _, err = call("--torch", "nets:torch_fails", "--flax", "nets:flax_net", *NCHW, "--rules", "rules.toml")
    assert code in (1, 70)  # 1 where the rules already do not fit the module
    code, _, err = call("--torch", "nets:torch_net", "--flax", "nets:flax_fails", *NCHW, "--rules", "rules.toml")
    assert code == 70
    assert "flax side, my own mistake" in err
    code, _, err = call(*BOTH, "--inputs", "nets:nothing")
    assert code == 70
    assert "the factory nets:nothing failed: ValueError: no images today" in err


def test_open_questions_are_suggested(tmp_path: Path):
    """What stops a check because the plan is open is written as a rules file; other errors write nothing."""
    line = '{ torch = "a.weight", flax = "params/a/kernel", layout = "linear" }'
    asked = PlanError("open", questions=[Question("layout", "which?", candidates=(Candidate(line),))])
    for error in (asked, PlanError("does not fit"), UsageError("no such option")):
        path = tmp_path / f"{error}.toml"
        with pytest.raises(type(error)), _suggesting(str(path)):
            raise error
        assert path.exists() == (error is asked)
    assert line in (tmp_path / "open.toml").read_text()


def test_a_forgotten_layout_is_explained(call: Any):
    code, _, err = call(*BOTH[:-2], "--inputs", "nets:images")
    assert code == 70
    assert "NCHW -> NHWC" in err


def test_a_forgotten_layout_is_explained_where_torch_fails(call: Any):
    """Without --inputs both models get the example of gx.linen(...), in Flax's order."""
    words = ["--torch", "nets:torch_net", "--rules", "rules.toml"]
    code, _, err = call(*words, "--flax", "nets:flax_net")
    assert code == 70
    assert "Inputs of shape (2, 4, 4, 2) were passed to torch as they are; if that is Flax's NHWC" in err
    assert "--layout" in err
    assert call(*words, "--flax", "nets:flax_net", *NCHW)[0] == 0
    code, _, err = call(*words, "--flax", "nets:flax_net", "--record", "never.safetensors")
    assert "--layout" in err
    code, _, err = call("--torch", "nets:torch_fails", "--flax", "nets:flax_net", "--record", "no.safetensors", *NCHW)
    assert "were passed to torch" not in err, "a layout was given"


def test_a_report_does_not_replace_another_file(call: Any, folder: Path):
    (folder / "thesis.html").write_text("my thesis")
    code, _, err = call(*WRONG, "--report", "thesis.html")
    assert code == 5
    assert "is not a parity report" in err
    assert (folder / "thesis.html").read_text() == "my thesis"


# ---------------------------------------------------------------- inputs


def test_inputs_from_files(tmp_path: Path):
    x, mask = np.ones((2, 3), "f4"), np.zeros(4, "i4")
    np.savez(tmp_path / "plain.npz", x, mask)
    args, kwargs = read_inputs(str(tmp_path / "plain.npz"))
    assert (len(args), kwargs) == (2, {})
    save_file({"arg1": mask, "arg0": x, "mask": mask}, tmp_path / "in.safetensors")
    args, kwargs = read_inputs(str(tmp_path / "in.safetensors"))
    np.testing.assert_array_equal(args[0], x)
    assert (len(args), list(kwargs)) == (2, ["mask"])
    inputs = named_inputs({"torch.arg0": x, "flax.arg0": x, "flax.mask": mask}, "f")
    assert isinstance(inputs, Inputs)
    assert list(inputs.flax[1]) == ["mask"]
    assert inputs.torch[1] == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arg0", "arg2"], "arg1 is missing"),
        (["arg0", "arr_0"], "position 0 is given twice"),
        (["a b"], "neither a position nor the name of a parameter"),
        (["torch.arg0", "arg0"], "some names start with torch. or flax. and some do not: arg0"),
        ([], "holds no arrays"),
    ],
)
def test_names_that_make_no_call(names: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        named_inputs(dict.fromkeys(names, np.zeros(2)), "f")


def test_examples_that_say_nothing_are_drawn():
    import jax
    from flax import linen as nn

    import graftax as gx

    same = np.arange(6.0, dtype="f4").reshape(2, 3)
    model = gx.linen(
        nn.Dense(2), same, jax.ShapeDtypeStruct((2, 3), "float32"), ids=np.zeros((2, 3), "i4"), train=False
    )
    inputs, notes = example_inputs(model)
    (kept, drawn), kwargs = inputs.flax
    np.testing.assert_array_equal(kept, same)
    assert drawn.shape == (2, 3)
    assert drawn.std() > 0.3
    np.testing.assert_array_equal(kwargs["ids"], 0)
    assert "train" not in kwargs
    assert [note.split(":")[0] for note in notes] == [
        "argument 1 was drawn from a normal distribution (seed 0)",
        "ids is one integer everywhere, as in the example",
    ]
    with pytest.raises(UsageError, match=r"only the shape of argument 0 \(int32\), and such values are not drawn"):
        example_inputs(gx.linen(nn.Dense(2), jax.ShapeDtypeStruct((2, 3), "int32")))
    with pytest.raises(UsageError, match="was given no example"):
        example_inputs(gx.linen(nn.Dense(2)))
