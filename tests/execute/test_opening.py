"""Text that names a checkpoint: paths, factories, and which reading wins."""

from __future__ import annotations

import sys
import uuid

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from graftax.errors import GraftaxError, PlanError, StorageError, UsageError
from graftax.execute import factories, opening


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current folder; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(text: str) -> str:
        name = f"mod_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_factory_gives_its_live_object(module):
    name = module(
        "import numpy as np\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def small():\n"
        "        return {'params': {'w': np.ones((2, 3), np.float32)}}\n"
        "tree = Zoo.small()\n"
    )
    for text in (f"{name}:Zoo.small", f"{name}:tree"):
        checkpoint = opening.open_tree(text)
        assert list(checkpoint) == ["params/w"]
        assert checkpoint.label == text
        assert checkpoint.read("params/w").sum() == 6
        assert flatten_dict(checkpoint.live.object).keys() == {("params", "w")}


def test_the_current_folder_is_importable_while_the_factory_runs(module):
    other = module("import numpy as np\nx = {'params': {'w': np.ones(1)}}\n")
    name = module(f"def make():\n    import {other}\n    return {other}.x\n")
    before = list(sys.path)
    assert list(opening.open_text(f"{name}:make")) == ["params/w"]
    assert sys.path == before


def test_import_failures_name_what_and_why(module):
    with pytest.raises(UsageError, match=r"no_such_module_x cannot be imported.*ModuleNotFoundError") as caught:
        opening.open_tree("no_such_module_x:make")
    assert caught.value.exit_code == 2
    broken = module("import math\n\nraise ValueError('half done')\n")
    with pytest.raises(UsageError, match=rf"{broken} cannot be imported: ValueError: half done \(.*line 3\)"):
        opening.open_tree(f"{broken}:make")
    leaving = module("import sys\nsys.exit(3)\n")
    with pytest.raises(UsageError, match="SystemExit"):
        opening.open_tree(f"{leaving}:make")


def test_a_missing_name_lists_what_is_there(module):
    name = module("def make_model():\n    pass\n")
    with pytest.raises(UsageError, match=r"has no 'make'[\s\S]*make_model"):
        opening.open_tree(f"{name}:make")


def test_a_failing_factory_is_the_users_failure(module):
    name = module("def make():\n    return 1 / 0\n")
    with pytest.raises(GraftaxError, match=rf"the factory {name}:make failed: ZeroDivisionError.*line 2") as caught:
        opening.open_tree(f"{name}:make")
    assert caught.value.exit_code == 70
    assert f"import {name} as m; m.make()" in str(caught.value)


def test_a_factory_that_returns_no_weights_is_a_usage_error(module):
    name = module("def make():\n    return None\n")
    with pytest.raises(UsageError, match=rf"{name}:make does not return weights: .*NoneType"):
        opening.open_tree(f"{name}:make")


def test_an_existing_path_wins(module, tmp_path):
    name = module("def make():\n    raise AssertionError('must not run')\n")
    save_file({"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / f"{name}:make")
    assert list(opening.open_tree(f"{name}:make")) == ["fc.weight"]
    assert list(opening.open_tree(tmp_path / f"{name}:make")) == ["fc.weight"]
    assert not factories.is_factory(f"{name}:make")
    with pytest.raises(PlanError, match="no"):
        opening.open_tree(f"{name}:make::model")


@pytest.mark.parametrize("text", ["missing.safetensors", "a/b.pt::model", "a:b:c", "1mod:f", "mod:", "a/b:f", "x\0y"])
def test_other_text_is_left_to_the_formats(text, module):
    assert not factories.is_factory(text)
    with pytest.raises(StorageError):
        opening.open_tree(text)


NEEDY = {
    "def make(x, *, y, z=1): return x": ("needs arguments (x, y)", "def make(): return make(...)"),
    "class make:\n    def __init__(self, n): self.n = n": ("the class", "def make(): return make(...)"),
    "from flax import nnx\nclass make(nnx.Module):\n    def __init__(self, rngs): pass": (
        "needs arguments (rngs)",
        "nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))",
    ),
    "import flax.linen as nn\nclass make(nn.Module):\n    features: int": (
        "needs arguments (features",
        "gx.linen(make(...), example_input)",
    ),
}


@pytest.mark.parametrize("code", NEEDY)
def test_a_factory_that_needs_arguments_is_a_usage_error(module, code: str):
    name = module(code)
    with pytest.raises(UsageError) as caught:
        factories.call_factory(f"{name}:make")
    assert caught.value.exit_code == 2
    for part in NEEDY[code]:
        assert part in str(caught.value)


@pytest.mark.parametrize("code", ["def make(*args, **kwargs): return {}", "make = dict", "class make(dict): pass"])
def test_a_factory_that_can_do_without_arguments_is_called(module, code: str):
    assert factories.call_factory(f"{module(code)}:make") == {}


def test_what_a_factory_prints_does_not_reach_stdout(module, capfd):
    name = module(
        "import numpy as np\nprint('imported')\ndef make():\n    print('made')\n    return {'w/kernel': np.ones(2)}"
    )
    opening.open_text(f"{name}:make")
    out, err = capfd.readouterr()
    assert out == ""
    assert "imported" in err
    assert "made" in err
