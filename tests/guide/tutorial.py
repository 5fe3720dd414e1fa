"""The `$` lines of docs/tutorial.md: runs them in a shell, and compares or replaces what the page says they print.

`python tests/guide/tutorial.py` runs them all and writes their output into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIMIT_S = 600


@dataclass(frozen=True)
class Step:
    """A command and what the page says that it prints."""

    command: str
    output: str


def steps(page: str) -> list[list[Step]]:
    """The blocks of the page, each a list of steps."""
    blocks = []
    for body in BLOCK.findall(page):
        first, *rest = re.split(r"^\$ ", body, flags=re.MULTILINE)
        assert first == "", "a block begins with a command"
        blocks.append([Step(*text.split("\n", 1)) for text in rest])
    return blocks


def prepare(folder: Path, cache: Path) -> None:
    """A working folder whose kernels are built."""
    (folder / "outputs").mkdir(parents=True)
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "outputs" / "cache").symlink_to(cache)


def run(command: str, folder: Path) -> str:
    """What the command prints, both streams in order."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.stdout.replace(str(folder.resolve()), "FOLDER")


def stable(output: str) -> list[str]:
    """The lines without what differs between two runs: figures, what follows from them, dates, ids, column widths."""
    text = re.sub(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-[0-9a-f]{4}", "DATE/TIME-ID", output)
    text = re.sub(r"\b[0-9a-f]{32}\b", "ID", text)
    text = re.sub(r"(?<!exit code )\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\binf\b", "#", text)
    text = re.sub(r" \(ETA #:#\)", "", text)
    verdict = r"(faster|slower|higher|lower) by #x \(# % interval #x\.\.#x\)|no difference shown \(#x\.\.#x\)"
    text = re.sub(verdict, "VERDICT", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def write(cache: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "xlpk"
        prepare(folder, cache)
        bodies = iter(
            ["".join(f"$ {step.command}\n{run(step.command, folder)}" for step in block) for block in steps(page)]
        )
    PAGE.write_text(BLOCK.sub(lambda _: f"```console\n{next(bodies)}```", page), encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "outputs" / "cache")
