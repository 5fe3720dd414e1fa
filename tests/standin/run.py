"""Runs Python on the stand-in driver: python tests/standin/run.py [-m MODULE | FILE] ARGUMENTS..."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from standin.hook import environment

if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
