"""Make the environment in which transformers still has its Flax models: 4.57, the last series with them.

    python scripts/hf_env.py [FOLDER]

Prints the Python of the environment. FOLDER: if not given, the environment variable GRAFTAX_HF_ENV, else .venv-hf in
this repository; one that is already there is used as it is. It is a virtual environment of its own that sees the
packages of the Python that runs this script (torch, jax, flax, graftax) and adds transformers to them, so that nothing
large is installed twice and nothing in the outer environment changes. Exit status 1 if the registry gives nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

VARIABLE = "GRAFTAX_HF_ENV"
REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers==4.57.*", "torch", "jax", "flax")
"""Already there, at the versions of constraints.txt, in an environment with graftax's test extra: all but the first."""
PROBE = "import transformers, flax, torch, graftax; assert transformers.__version__.startswith('4.57.')"


class OutOfReach(Exception):
    """The packages could not be installed."""


def default_folder() -> Path:
    return Path(os.environ.get(VARIABLE) or REPOSITORY / ".venv-hf")


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(folder: Path) -> bool:
    """Whether the environment is complete."""
    python = python_of(folder)
    return python.exists() and subprocess.run([python, "-c", PROBE], capture_output=True).returncode == 0


def make(folder: Path) -> Path:
    """The environment's Python; makes what is missing. Raises OutOfReach."""
    if works(folder):
        return python_of(folder)
    venv.create(folder, with_pip=True, clear=folder.exists())
    python = python_of(folder)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inner = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    outer = [sysconfig.get_path("purelib"), str(REPOSITORY / "src")]
    # addsitedir, unlike a bare path, follows the outer .pth files too: an editable install is one.
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in dict.fromkeys(outer))
    (inner / "outer.pth").write_text(lines, encoding="utf-8")
    command = [python, "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not works(folder):
        raise OutOfReach(f"transformers 4.57 could not be installed:\n{done.stderr[-2000:]}")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    try:
        print(make(parser.parse_args().folder.absolute()))
    except OutOfReach as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
