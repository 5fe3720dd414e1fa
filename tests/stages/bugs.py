"""A bug planted in a copy of the sources: what a file says, once, and what the bug makes of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from xlpk.toolchain import kernels_folder


@dataclass(frozen=True)
class Bug:
    """What a source says, once, and what a bug makes of it. `file`: within kernels, or xlpk/simulator."""

    name: str
    file: str
    right: str
    wrong: str
    weak_hash: bool = False  # with one that collides


def broken(tmp_path: Path, edits: list[tuple[str, str, str]]) -> Path:
    """The kernels with edits (file, what stands there once, what takes its place)."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, right, wrong in edits:
        text = (folder / file).read_text()
        assert text.count(right) == 1, f"{file} has it once: {right}"
        (folder / file).write_text(text.replace(right, wrong))
    return folder
