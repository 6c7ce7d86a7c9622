"""facenet-pytorch's P, R and O networks: legacy pickles of tensors that are not contiguous, a slope a channel, and maps
that were flattened in the order W H C."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graftax as gx
from graftax.ops import same_bits

from . import models_facenet as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow


def images(size: int, count: int):
    def make(rng: np.random.Generator) -> list[np.ndarray]:
        """Pixels scaled as MTCNN does it."""
        return [((rng.integers(0, 256, (count, 3, size, size)) - 127.5) * 0.0078125).astype(np.float32)]

    return make


P = """
  { torch = "conv4_1.weight", flax = "params/faces/kernel" },
  { torch = "conv4_2.weight", flax = "params/boxes/kernel" },
  { torch = "prelu{i}.weight", flax = "params/PReLU_{i-1}/negative_slope" },
"""
R = """
  { torch = "dense4.weight", flax = "dense/kernel", flatten = "W=3 H=3 C=64" },
  { torch = "prelu{i}.weight", flax = "prelus/{i-1}/slope" },
  { torch = "dense5_1.weight", flax = "faces/kernel" },
  { torch = "dense5_2.weight", flax = "boxes/kernel" },
"""
O = """
  { torch = "dense5.weight", flax = "params/dense/kernel", flatten = "W=3 H=3 C=128" },
  { torch = "prelu{i}.weight", flax = "params/prelu{i}/negative_slope" },
  { torch = "dense6_1.weight", flax = "params/faces/kernel" },
  { torch = "dense6_2.weight", flax = "params/boxes/kernel" },
  { torch = "dense6_3.weight", flax = "params/landmarks/kernel" },
"""  # noqa: E741
CASES = [
    Case("P linen", "pnet.pt", models.TorchP, models.linen_p_like, images(33, 2), models.LinenP, P),
    Case("R nnx", "rnet.pt", models.TorchR, models.nnx_r_like, images(24, 5), rules=R),
    Case("O linen", "onet.pt", models.TorchO, models.linen_o_like, images(48, 5), models.LinenO, O),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("facenet-pytorch")[request.param.file])


@pytest.mark.parametrize(("file", "leaves"), [("pnet.pt", 13), ("rnet.pt", 16), ("onet.pt", 21)])
def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str], file: str, leaves: int) -> None:
    found = inspect(capsys, weights("facenet-pytorch")[file])
    assert (found["format"], found["leaves"], found["dtypes"]) == ("torch", leaves, {"float32": leaves})


@pytest.mark.parametrize("file", ["pnet.pt", "rnet.pt", "onet.pt"])
def test_strided_tensors_are_read_as_torch_reads_them(weights: Weights, file: str) -> None:
    path = weights("facenet-pytorch")[file]
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    assert not all(tensor.is_contiguous() for tensor in theirs.values())
    ours = gx.open_checkpoint(path)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert same_bits(ours.read(name), tensor.contiguous().numpy()), name


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)


def test_a_flatten_in_the_usual_order_would_be_wrong(weights: Weights) -> None:
    """The parity above can see the order: C H W fits the shapes, and the outputs differ."""
    case = CASES[1]
    rules = case.rules.replace("W=3 H=3 C=64", "C=64 H=3 W=3")
    wrong = Ported(Case(**{**_fields(case), "rules": rules}), weights("facenet-pytorch")[case.file])
    with pytest.raises(AssertionError, match="ratio"):
        check_parity(wrong)


def _fields(case: Case) -> dict:
    return {name: getattr(case, name) for name in case.__slots__}
