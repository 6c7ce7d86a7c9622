"""Where contenders live that need packages of their own: one environment each, made only when it is asked for."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import hf_env
from benchmarks.measuring import NotRun

WEIGHTBRIDGE = "weightbridge==0.0.4"


def hugging(folder: Path | None) -> Path:
    """The Python that has transformers 4.57. It is made in `folder`/hf where a folder is given, else only looked for
    where scripts/hf_env.py puts it. Raises NotRun."""
    place = folder / "hf" if folder else hf_env.default_folder()
    if hf_env.works(place):
        return hf_env.python_of(place)
    if folder is None:
        raise NotRun("transformers 4.57 is not installed: scripts/hf_env.py makes its environment, or --envs FOLDER")
    try:
        return hf_env.make(place)
    except hf_env.OutOfReach as error:
        raise NotRun(str(error).splitlines()[0]) from error


def weightbridge(folder: Path | None) -> Path:
    """The Python that has weightbridge, and of this one's packages safetensors and NumPy. Raises NotRun."""
    if folder is None:
        raise NotRun(f"{WEIGHTBRIDGE} is not installed: --envs FOLDER makes its environment")
    place = folder / "weightbridge"
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(place, with_pip=True)
        inner = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
        (inner / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    command = [python, "-m", "pip", "install", "-q", WEIGHTBRIDGE]
    if subprocess.run([python, "-c", "import weightbridge"], capture_output=True).returncode:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotRun(f"{WEIGHTBRIDGE} could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    return python
