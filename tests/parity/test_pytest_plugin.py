"""The pytest plugin in runs of its own: what a failure shows, golden files, what loading it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

MODELS = """
import numpy as np


def make_torch(seed=0):
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7, eps=1e-3)).eval()


def make_flax(epsilon=1e-3):
    import graftax as gx
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(epsilon=epsilon)(nn.Dense(7)(x))

    return gx.linen(Net(), np.zeros((3, 5), "f4"))


x = 0.05 * np.random.default_rng(0).normal(size=(3, 5)).astype("f4")
RULES = '''
{ torch = "0.weight", flax = "params/Dense_0/kernel", layout = "linear" }
{ torch = "0.bias", flax = "params/Dense_0/bias" }
{ torch = "1.weight", flax = "params/LayerNorm_0/scale" }
{ torch = "1.bias", flax = "params/LayerNorm_0/bias" }
'''
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Runs in this process forget the modules that they import, and frameworks cannot be imported twice."""
    pytest.importorskip("torch", reason="the torch side needs torch, which is an optional dependency")
    space: dict[str, Any] = {}
    exec(MODELS, space)
    from graftax.parity.check import check_parity

    str(check_parity(space["make_torch"](), space["make_flax"](1e-6), space["x"], rules=space["RULES"]))


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with two models to test."""
    monkeypatch.setenv("COLUMNS", "110")
    pytester.makepyfile(models=MODELS)
    return pytester


def lines(result: pytest.RunResult) -> str:
    return "\n".join(result.outlines)


def test_the_plugin_is_registered(pytestconfig: pytest.Config):
    assert pytestconfig.pluginmanager.has_plugin("graftax")


def test_loading_it_imports_nothing_heavy():
    code = (
        "import sys, graftax.parity.pytest_plugin\n"
        "heavy = ['torch', 'jax', 'flax', 'numpy', 'rich', 'jinja2', 'graftax.parity.check']\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_port_that_holds_passes(suite: pytest.Pytester):
    suite.makepyfile(
        """
        import graftax as gx
        from models import RULES, make_flax, make_torch, x

        def test_fixture(parity):
            report = parity(make_torch(), make_flax(), x, rules=RULES)
            assert report.ok and len(report.layers) >= 2

        def test_function():
            gx.assert_parity(make_torch(), make_flax(), x, rules=RULES)

        def test_check(parity):
            assert not parity.check(make_torch(), make_flax(1e-6), x, rules=RULES, causes=False)
        """
    )
    suite.runpytest_inprocess("-q").assert_outcomes(passed=3)


def test_a_failure_shows_the_report_and_no_traceback(suite: pytest.Pytester):
    suite.makepyfile(
        """
        import graftax as gx
        from models import RULES, make_flax, make_torch, x

        def test_fixture(parity):
            parity(make_torch(), make_flax(1e-6), x, rules=RULES)

        def test_function():
            gx.assert_parity(
                make_torch(), make_flax(1e-6), x, rules=RULES)

        def test_report():
            assert gx.check_parity(make_torch(), make_flax(1e-6), x, rules=RULES)
        """
    )
    result = suite.runpytest_inprocess()
    result.assert_outcomes(failed=3)
    text = lines(result)
    head, _, rest = text.partition("test_function ___")
    assert ">   parity(make_torch(), make_flax(1e-6), x, rules=RULES)" in head
    assert "Parity fails: Sequential (torch) and Net (Flax) diverge." in head
    assert "layer  1  ↔  LayerNorm_0" in head
    assert "cause  epsilon" in head
    assert "before it" in head  # the table of layers
    assert "test_a_failure_shows_the_report_and_no_traceback.py:5: ParityError" in head
    assert "check.py" not in text.partition("test_report ___")[0]
    assert "Traceback" not in text
    assert ">   gx.assert_parity(" in rest
    assert "<ParityReport: parity fails at LayerNorm_0 (epsilon)>" in rest
    summary = text.partition("short test summary info")[2]
    assert summary.count(" - parity fails at LayerNorm_0") == 2
    assert " - assert <ParityReport: parity fail" in summary


def test_tb_long_brings_the_traceback_back(suite: pytest.Pytester):
    suite.makepyfile(
        """
        from models import RULES, make_flax, make_torch, x

        def test_fixture(parity):
            parity(make_torch(), make_flax(1e-6), x, rules=RULES, causes=False)
        """
    )
    text = lines(suite.runpytest_inprocess("--tb=long"))
    assert "def test_fixture(parity):" in text
    assert "E   " in text


def test_other_errors_stay_what_they_are(suite: pytest.Pytester):
    suite.makepyfile(
        """
        import pytest
        from graftax.errors import ParityError
        from models import make_torch

        def test_expected(parity):
            with pytest.raises(ParityError):
                raise ParityError("by hand")

        def test_by_hand():
            raise ParityError("by hand")

        def test_plain():
            import graftax.errors
            assert 1 == 2
        """
    )
    result = suite.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=2)
    assert "assert 1 == 2" in lines(result)
    assert "by hand" in lines(result)


GOLDEN = """
    import sys
    from models import RULES, make_flax, make_torch, x

    EPSILON = 1e-3

    def test_port(parity):
        report = parity.golden(
            make_flax(EPSILON), torch=make_torch, inputs=x, rules=RULES, source="weights.pt", layout="N C -> N C"
        )
        assert "torch" not in sys.modules or not ALONE
"""


def golden_suite(suite: pytest.Pytester, epsilon: str = "1e-3", alone: bool = False) -> None:
    """A test by golden file; alone: it holds that torch was not imported."""
    text = GOLDEN.replace("EPSILON = 1e-3", f"EPSILON = {epsilon}").replace("ALONE", str(alone))
    suite.makepyfile(test_net=text)
    if not (suite.path / "weights.pt").exists():
        import torch

        space: dict[str, Any] = {}
        exec(MODELS, space)
        torch.save(space["make_torch"]().state_dict(), suite.path / "weights.pt")


def test_golden_files_are_recorded_and_replayed_without_torch(suite: pytest.Pytester):
    golden_suite(suite)
    missing = suite.runpytest_inprocess()
    missing.assert_outcomes(failed=1)
    assert "there is no golden file" in lines(missing)
    assert "pytest --graftax-update-golden 'test_net.py::test_port'" in lines(missing)
    assert "Traceback" not in lines(missing)

    suite.runpytest_inprocess("--graftax-update-golden").assert_outcomes(passed=1)
    file = suite.path / "golden" / "test_net.test_port.safetensors"
    recorded = file.read_bytes()

    golden_suite(suite, alone=True)
    suite.runpytest_subprocess().assert_outcomes(passed=1)  # the test itself holds that torch was not imported
    assert file.read_bytes() == recorded

    golden_suite(suite, "1e-6")
    broken = suite.runpytest_inprocess()
    broken.assert_outcomes(failed=1)
    assert "layer  1  ↔  LayerNorm_0" in lines(broken)
    assert f"golden file: {file}" in lines(broken)


def test_a_broken_golden_file_is_named(suite: pytest.Pytester):
    golden_suite(suite)
    (suite.path / "golden").mkdir()
    Path(suite.path / "golden" / "test_net.test_port.safetensors").write_bytes(b"nonsense" * 10)
    result = suite.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert "FormatError" in lines(result)
    assert "test_net.test_port.safetensors" in lines(result)


def test_recording_needs_torch_and_inputs(suite: pytest.Pytester):
    suite.makepyfile(
        """
        from models import make_flax

        def test_port(parity):
            parity.golden(make_flax(), name="a name/with: signs")
        """
    )
    result = suite.runpytest_inprocess("--graftax-update-golden")
    result.assert_outcomes(failed=1)
    assert "needs torch= and inputs= to record a-name-with-signs.safetensors" in lines(result)
    assert not (suite.path / "golden").exists()
