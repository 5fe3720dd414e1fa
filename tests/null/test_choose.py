"""What `backend=auto` comes to, and that it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xlpk.backends import choose, gpu_device
from xlpk.errors import ToolError
from xlpk.settings import AutoBackend, CpuBackend, GraphBackend, PersistentBackend


class FakeDriver:
    """As much of pycuda.driver as is asked."""

    class Device:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def name(self) -> str:
            return f"device {self.ordinal}"


def test_no_driver_is_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> Any:
        raise ToolError("the NVIDIA driver has no device: see `xlpk doctor`, or use backend=cpu")

    monkeypatch.setattr(gpu_device, "import_driver", absent)
    backend, note = choose.resolve(AutoBackend(), tmp_path)
    assert backend == CpuBackend()
    assert note == "backend=auto takes cpu: the NVIDIA driver has no device: see `xlpk doctor`"


def test_a_device_and_a_compiler_are_the_resident_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_device, "import_driver", FakeDriver)
    monkeypatch.setattr(choose, "find_nvcc", lambda: "nvcc")
    assert choose.resolve(AutoBackend(), tmp_path) == (PersistentBackend(), "backend=auto takes persistent: device 0")


def test_a_cached_cubin_does_instead_of_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_device, "import_driver", FakeDriver)
    monkeypatch.setattr(choose, "find_nvcc", lambda: None)
    backend, note = choose.resolve(AutoBackend(), tmp_path)
    assert (backend, note.startswith("backend=auto takes cpu: nvcc is not on PATH")) == (CpuBackend(), True)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "launched-1-2.cubin").touch()
    assert choose.resolve(AutoBackend(), tmp_path)[0] == PersistentBackend()


def test_what_was_asked_for_stays(tmp_path: Path) -> None:
    asked = GraphBackend(device=3)
    assert choose.resolve(asked, tmp_path) == (asked, "")
