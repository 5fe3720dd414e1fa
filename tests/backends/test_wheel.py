"""A wheel in a clean environment, used from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the wheel, and this environment's dependencies without its editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("xlpk-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=300)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


def test_it_runs_from_anywhere(python: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [python, "-c", "import xlpk, xlpk.conf, xlpk.kernels; print(xlpk.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(python.parents[1]))
    command = [python, "-m", "xlpk.run", "mode=forced_rejection", "spec.block=8", "tracking=none", "run.json=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert 0 < metrics["spec/accepted"] < metrics["spec/proposed"]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_its_console_script_is_declared(python: Path) -> None:
    (entry,) = python.parents[1].glob("lib/python*/site-packages/xlpk-*.dist-info/entry_points.txt")
    assert "xlpk = xlpk.cli:console" in entry.read_text()
