"""Text that names a checkpoint: paths, factories, and which reading wins."""

from __future__ import annotations

import sys
import uuid

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from graftax import adapters
from graftax.adapters import factories
from graftax.errors import GraftaxError, PlanError, StorageError, UsageError


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
        checkpoint = adapters.open_tree(text)
        assert list(checkpoint) == ["params/w"]
        assert checkpoint.label == text
        assert checkpoint.read("params/w").sum() == 6
        assert flatten_dict(checkpoint.native).keys() == {("params", "w")}


def test_the_current_folder_is_importable_while_the_factory_runs(module):
    other = module("import numpy as np\nx = {'params': {'w': np.ones(1)}}\n")
    name = module(f"def make():\n    import {other}\n    return {other}.x\n")
    before = list(sys.path)
    assert list(adapters.resolve(f"{name}:make")) == ["params/w"]
    assert sys.path == before


def test_import_failures_name_what_and_why(module):
    with pytest.raises(UsageError, match=r"no_such_module_x cannot be imported.*ModuleNotFoundError") as caught:
        adapters.open_tree("no_such_module_x:make")
    assert caught.value.exit_code == 2
    broken = module("import math\n\nraise ValueError('half done')\n")
    with pytest.raises(UsageError, match=rf"{broken} cannot be imported: ValueError: half done \(.*line 3\)"):
        adapters.open_tree(f"{broken}:make")
    leaving = module("import sys\nsys.exit(3)\n")
    with pytest.raises(UsageError, match="SystemExit"):
        adapters.open_tree(f"{leaving}:make")


def test_a_missing_name_lists_what_is_there(module):
    name = module("def make_model():\n    pass\n")
    with pytest.raises(UsageError, match=r"has no 'make'[\s\S]*make_model"):
        adapters.open_tree(f"{name}:make")


def test_a_failing_factory_is_the_users_failure(module):
    name = module("def make():\n    return 1 / 0\n")
    with pytest.raises(GraftaxError, match=rf"the factory {name}:make failed: ZeroDivisionError.*line 2") as caught:
        adapters.open_tree(f"{name}:make")
    assert caught.value.exit_code == 70
    name = module("def make(size):\n    pass\n")
    with pytest.raises(GraftaxError, match="size") as caught:
        adapters.open_tree(f"{name}:make")
    assert caught.value.exit_code == 70


def test_a_factory_that_returns_no_weights_is_a_usage_error(module):
    name = module("def make():\n    return None\n")
    with pytest.raises(UsageError, match=rf"{name}:make does not return weights: .*NoneType"):
        adapters.open_tree(f"{name}:make")


def test_an_existing_path_wins(module, tmp_path):
    name = module("def make():\n    raise AssertionError('must not run')\n")
    save_file({"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / f"{name}:make")
    assert list(adapters.open_tree(f"{name}:make")) == ["fc.weight"]
    assert list(adapters.open_tree(tmp_path / f"{name}:make")) == ["fc.weight"]
    assert not factories.is_factory(f"{name}:make")
    with pytest.raises(PlanError, match="no"):
        adapters.open_tree(f"{name}:make::model")


@pytest.mark.parametrize("text", ["missing.safetensors", "a/b.pt::model", "a:b:c", "1mod:f", "mod:", "a/b:f", "x\0y"])
def test_other_text_is_left_to_the_formats(text, module):
    assert not factories.is_factory(text)
    with pytest.raises(StorageError):
        adapters.open_tree(text)
