"""Pairs of transformers 4.57, in the environment of scripts/hf_env.py: parity passes, the trace pairs what has
parameters, and three injected faults of each pair are found."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("hf_child.py")
NAMES = ("bert", "gpt2", "llama", "t5", "vit", "wav2vec2", "clip")
PAIRED = 0.98


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, script: Callable[[str], ModuleType]) -> Path:
    """The environment's Python: cached in the folder of GRAFTAX_HF_ENV, else made for this run."""
    hf_env = script("hf_env")
    cached = os.environ.get(hf_env.VARIABLE)
    folder = Path(cached) if cached else tmp_path_factory.mktemp("hf") / "env"
    try:
        return hf_env.make(folder.absolute())
    except hf_env.OutOfReach as error:
        pytest.skip(f"{error} (an environment in the folder ${hf_env.VARIABLE} needs no registry)")


@pytest.fixture(scope="module")
def findings(python: Path) -> dict[str, Any]:
    done = subprocess.run([python, CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.parametrize("name", NAMES)
def test_parity_passes(findings: dict[str, Any], name: str) -> None:
    found = findings[name]
    assert found["ok"], found
    assert found["weights"] == []
    assert found["settings"] == []


def test_what_has_parameters_is_paired(findings: dict[str, Any]) -> None:
    """Of all modules of the seven that have parameters, those with a row of their own. Tied heads count too."""
    missing = {name: found["unpaired"] for name, found in findings.items() if found["unpaired"]}
    everything = sum(found["parametrised"] for found in findings.values())
    assert sum(map(len, missing.values())) <= (1 - PAIRED) * everything, missing


@pytest.mark.parametrize("name", NAMES)
def test_injected_faults_are_found(findings: dict[str, Any], name: str) -> None:
    faults = findings[name]["faults"]
    assert len(faults) == 3
    assert [fault for fault in faults if not fault["found"]] == []
