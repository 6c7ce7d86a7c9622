"""What every command of scripts/bench.py is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """smoke: tiny sizes, seconds long, to see that everything works and every value is right; folder: for checkpoints
    and what is made of them; scale: multiplies the size of what is measured."""

    folder: Path
    smoke: bool = False
    repeats: int = 5
    seed: int = 0
    scale: float = 1.0
    quiet: bool = False

    def say(self, text: str) -> None:
        """Progress, to standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
