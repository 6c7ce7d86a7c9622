"""Which frameworks the adapters import, and that they work where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, blocked: set[str] = frozenset()) -> None:
    program = f"BLOCKED = {set(blocked)!r}{BLOCK}{code}" if blocked else code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_adapters_imports_no_framework():
    run(
        "import sys, graftax.adapters\n"
        "import graftax.adapters.torch_tree, graftax.adapters.linen_tree, graftax.adapters.nnx_tree\n"
        "import graftax.execute.factories, graftax.adapters.plain\n"
        "loaded = {'torch', 'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )


def test_linen_and_nnx_work_without_torch():
    run(
        """
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn, nnx
from graftax import adapters
from graftax.execute import opening

like = opening.open_tree(adapters.linen(nn.Dense(3), jnp.zeros((1, 2))))
arrays = {path: np.ones(spec.shape, spec.dtype) for path, spec in like.items()}
variables = like.live.rebuild(arrays)
assert opening.open_tree(variables).read("params/kernel").sum() == 6
assert adapters.map_leaves(variables, {"params/bias": np.zeros(3, np.float32)})["params"]["bias"].sum() == 0

module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
checkpoint = opening.open_tree(module)
adapters.assign(module, {"kernel": np.ones((2, 3), np.float32)})
assert checkpoint.live.rebuild({"kernel": np.ones((2, 3), "f4"), "bias": np.ones(3, "f4")}).bias[...].sum() == 3
for thing in (nnx.state(module), nnx.split(module)):
    assert set(opening.open_tree(thing)) == {"kernel", "bias"}
assert "torch" not in sys.modules
""",
        {"torch"},
    )


def test_torch_works_without_jax():
    run(
        """
import torch
from graftax import adapters
from graftax.execute import opening

module = torch.nn.Linear(2, 3)
checkpoint = opening.open_tree(module)
arrays = {key: checkpoint.read(key) for key in checkpoint}
module.load_state_dict(checkpoint.live.rebuild(arrays))
adapters.assign(module, arrays)
adapters.map_leaves(module.state_dict(), arrays)
assert set(opening.open_tree(module.state_dict())) == {"weight", "bias"}
""",
        {"jax", "flax", "orbax"},
    )


def test_opening_an_object_of_one_framework_does_not_import_the_other():
    run(
        "import sys, torch\nfrom graftax.execute import opening\nopening.open_tree(torch.nn.Linear(2, 3))\n"
        "assert not {'jax', 'flax'} & set(sys.modules)\n"
    )
    run(
        "import sys, jax.numpy as jnp\nfrom graftax.execute import opening\n"
        "opening.open_tree({'params': {'w': jnp.ones(1)}})\n"
        "assert not {'torch', 'flax'} & set(sys.modules)\n"
    )
